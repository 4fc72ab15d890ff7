"""The system call filter, run by an interpreter of the few instructions that it uses."""

from __future__ import annotations

import struct

import pytest

from nsrun import seccomp

ALLOW = 0x7FFF0000


def answer(machine: str, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would answer (seccomp(2)): ALLOW, or the error number."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, *[0] * (6 - len(arguments))))
    code = list(struct.iter_unpack("<HBBI", seccomp.program(machine)))
    word = position = 0
    while True:
        kind, yes, no, operand = code[position]
        position += 1
        if kind == 0x20:
            (word,) = struct.unpack_from("<I", data, operand)
        elif kind == 0x15:
            position += yes if word == operand else no
        else:
            assert kind == 0x06
            return int(operand if operand == ALLOW else operand & 0xFFFF)


@pytest.mark.parametrize(
    ("machine", "arch", "ioctl", "socket", "uring", "key"),
    [(machine, *one) for machine, calls in seccomp.CALLS.items() for one in calls],
)
def test_only_the_doors_are_shut(
    machine: str, arch: int, ioctl: int, socket: int, uring: int, key: int
) -> None:
    """For every machine and architecture: two requests, all but six families, and io_uring."""
    for request in (0x5412, 0x541C, 0xFFFF_FFFF_0000_5412):  # the kernel looks at 32 bits
        assert answer(machine, arch, ioctl, 0, request) == seccomp.EPERM
    for request in (0x5401, 0x5413, 0):
        assert answer(machine, arch, ioctl, 0, request) == ALLOW
    allowed = [family for family in range(64) if answer(machine, arch, socket, family) == ALLOW]
    assert allowed == sorted(seccomp.FAMILIES)
    assert answer(machine, arch, socket, 40) == seccomp.EAFNOSUPPORT
    assert answer(machine, arch, uring, 8) == seccomp.ENOSYS
    assert answer(machine, arch, key) == seccomp.ENOSYS
    for other in (0, 1, 59, 221, 1000):
        if other not in (ioctl, socket, uring, key):
            assert answer(machine, arch, other, 0x5412, 0x5412) == ALLOW


def test_an_unknown_machine_has_no_filter() -> None:
    """There is nothing to say about system calls whose numbers are not known."""
    assert seccomp.program("vax") == b""


def test_another_architecture_passes() -> None:
    """A filter for x86_64 says nothing about, say, MIPS."""
    assert answer("x86_64", 0x8, 16, 0, 0x5412) == ALLOW
