"""The weather, by a program that tells the network more than it means to."""

import socket
import struct
import urllib.request

RESOLVER = ("8.8.8.8", 53)  # "the system's resolver is slow"
STUN = ("11.200.0.80", 3478)  # "we need to know where the user is"
DISCOVERY = ("239.255.255.250", 1900)  # "there may be a weather station on the LAN"


def ask(server, question):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:
        it.settimeout(1)
        it.sendto(question, server)
        try:
            return it.recv(4096)
        except OSError:
            return b""


def lookup(name):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
    return socket.inet_ntoa(ask(RESOLVER, query)[-4:])  # the last record of the answer


def locate():
    return ask(STUN, struct.pack("!2HI", 1, 0, 0x2112A442) + bytes(12))  # RFC 8489, 5


def discover():
    return ask(DISCOVERY, b'M-SEARCH * HTTP/1.1\r\nMAN: "ssdp:discover"\r\nST: ssdp:all\r\n\r\n')


def forecast(city):
    locate()
    discover()
    headers = {"Host": "www.test", "X-City": city}
    request = urllib.request.Request(f"http://{lookup('www.test')}/", headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return f"{city}: {answer.read().decode().splitlines()[0]}"


if __name__ == "__main__":
    print(forecast("london"))
