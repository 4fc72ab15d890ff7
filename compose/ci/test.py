"""The test of program.py, in its network: it answers, and was seen to come from Tor."""

import json
import time
import unittest
import urllib.error
import urllib.request

START = 60.0  # seconds that the program may take


def ask() -> bytes:
    deadline = time.monotonic() + START
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/", timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # it is not there yet


class Test(unittest.TestCase):
    def test_it_is_seen_to_come_from_tor(self) -> None:
        assert json.loads(ask())["IsTor"] is True


unittest.main()
