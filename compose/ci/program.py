"""A program to be tested: a server that fetches a page for whoever asks it.

With CLOCK=ntp it asks a time server first, as some programs do without a word: by UDP, which Tor
does not carry.
"""

import os
import socket
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

NTP_QUERY = b"\x1b" + 47 * b"\0"  # version 3, client (RFC 5905, 7.3)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        try:
            with urllib.request.urlopen(os.environ["URL"], timeout=60) as page:
                told = page.read()
        except OSError as error:
            self.send_error(502, str(error))
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(told)


if os.environ.get("CLOCK") == "ntp":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(NTP_QUERY, ("203.0.113.123", 123))
HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
