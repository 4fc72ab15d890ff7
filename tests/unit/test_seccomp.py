"""The system call filter, run by an interpreter of the few instructions that it uses."""

from __future__ import annotations

import struct

import pytest

from nsrun import seccomp

ALLOW = 0x7FFF0000


NOTIFY, KILL = 0x7FC00000, 0x80000000


def answer(machine: str, arch: int, number: int, *arguments: int, strict: bool = False) -> int:
    """What the kernel would answer (seccomp(2)): ALLOW, NOTIFY, KILL, or the error number."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*arguments, *[0] * (6 - len(arguments))))
    program = seccomp.strict_program if strict else seccomp.program
    code = list(struct.iter_unpack("<HBBI", program(machine)))
    word = position = 0
    while True:
        kind, yes, no, operand = code[position]
        position += 1
        if kind == 0x20:
            (word,) = struct.unpack_from("<I", data, operand)
        elif kind == 0x15:
            position += yes if word == operand else no
        elif kind == 0x35:
            position += yes if word >= operand else no
        elif kind == 0x54:
            word &= operand
        else:
            assert kind == 0x06
            return int(operand if operand in (ALLOW, NOTIFY, KILL) else operand & 0xFFFF)


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


@pytest.mark.promise("P6", "P10")
@pytest.mark.parametrize("machine", seccomp.STRICT)
def test_strict_leaves_connect_to_init(machine: str) -> None:
    """Every connect(), whatever its arguments; no Unix socket that need not connect to send."""
    arch, ioctl, socket, uring, key = seccomp.CALLS[machine][0]
    connect, socketpair, _ = seccomp.STRICT[machine]
    assert answer(machine, arch, connect, 3, 1 << 40, 110, strict=True) == NOTIFY
    cloexec, nonblock = 0o2000000, 0o4000
    for call in (socket, socketpair):
        for flags in (0, cloexec, nonblock, cloexec | nonblock, 1 << 32):
            for kind in range(16):
                expected = ALLOW if kind in (1, 5) else seccomp.EACCES
                assert answer(machine, arch, call, 1, kind | flags, strict=True) == expected
    assert answer(machine, arch, socket, 1 | 1 << 32, 2, strict=True) == seccomp.EACCES
    for kind in (1, 2, 3):
        assert answer(machine, arch, socket, 2, kind, strict=True) == ALLOW
    assert answer(machine, arch, socket, 40, 1, strict=True) == seccomp.EAFNOSUPPORT
    assert answer(machine, arch, ioctl, 0, seccomp.TIOCSTI, strict=True) == seccomp.EPERM
    for number in (uring, key):
        assert answer(machine, arch, number, strict=True) == seccomp.ENOSYS
    assert answer(machine, arch, 0, strict=True) == ALLOW


@pytest.mark.promise("P10")
@pytest.mark.parametrize("machine", seccomp.STRICT)
def test_strict_ends_calls_of_another_abi(machine: str) -> None:
    """i386, 32-bit Arm, x32: their numbers mean other calls, socketcall(2) among them."""
    native = seccomp.CALLS[machine][0][0]
    for arch in (0xC000003E, 0x40000003, 0xC00000B7, 0x40000028, 0x8):
        if arch != native:
            assert answer(machine, arch, 102, strict=True) == KILL
    assert answer(machine, native, seccomp.X32 | 42, strict=True) == KILL
