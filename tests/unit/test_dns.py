"""Questions to a resolver, and what is taken for an answer."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from nsrun import dns

QUESTION = dns.question(7, "example.com", dns.A)
NAME = b"\xc0\x0c"  # a reference to the question's


def record(kind: int, data: bytes) -> bytes:
    return NAME + struct.pack("!HHIH", kind, dns.INTERNET, 60, len(data)) + data


def answer(*records: bytes, number: int = 7, code: int = 0) -> bytes:
    header = struct.pack("!6H", number, 0x8180 | code, 1, len(records), 0, 0)
    return header + QUESTION[12:] + b"".join(records)


ONE, TWO = record(dns.A, b"\x0a\xc0\0\1"), record(dns.A, b"\x0a\xc0\0\2")
ALIAS = record(5, b"\3www" + NAME)


def test_a_question_is_as_in_the_standard() -> None:
    """RFC 1035, 4.1: one question, recursion wanted, labels by their length."""
    header = "0007 0100 0001 0000 0000 0000"
    assert bytes.fromhex(header) + b"\7example\3com\0" + b"\0\1" + b"\0\1" == QUESTION


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (answer(ONE, TWO), ["10.192.0.1", "10.192.0.2"]),
        (answer(ALIAS, ONE), ["10.192.0.1"]),
        (answer(code=3), []),
        (answer(record(dns.AAAA, bytes(16))), []),
    ],
)
def test_addresses_are_those_of_the_kind_that_was_asked_for(
    message: bytes, found: list[str]
) -> None:
    """An alias before them is passed over, and a failure has none."""
    assert dns.answers(message, 7, dns.A) == [ip_address(one) for one in found]


def test_what_is_no_answer_to_that_is_none() -> None:
    """Another number, a cut at any place, an address of another length."""
    whole = answer(ONE, TWO)
    assert dns.answers(whole, 8, dns.A) is None
    for length in range(len(whole)):
        assert dns.answers(whole[:length], 7, dns.A) is None, length
    assert dns.answers(answer(record(dns.A, b"\1\2\3")), 7, dns.A) is None
