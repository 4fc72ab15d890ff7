"""A filter of system calls for workloads: the few doors no namespace closes. Pure, hot path.

ioctl TIOCSTI, TIOCLINUX   push characters into the terminal, which the shell outside would run
socket of another family   AF_VSOCK and others are in no network namespace
io_uring_setup             makes sockets without a call that could be filtered
request_key                has the kernel start a helper outside, which may look up a name by DNS

Classic BPF over struct seccomp_data (seccomp(2)). Calls of
a foreign architecture that is not listed for the machine are let through: a filter cannot know
their numbers. On i386 sockets may be made by socketcall(2), whose arguments are out of reach.
"""

from __future__ import annotations

TIOCSTI, TIOCLINUX = 0x5412, 0x541C
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_ALG: bound to a namespace, or no network
FAMILIES = (1, 2, 10, 16, 17, 38)
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

# machine -> AUDIT_ARCH_*, and the numbers of ioctl, socket, io_uring_setup and request_key
# (linux/audit.h, asm/unistd.h)
CALLS = {
    "x86_64": (
        (0xC000003E, 16, 41, 425, 249),
        (0xC000003E, 0x40000202, 0x40000029, 0x400001A9, 0x400000F9),  # x32
        (0x40000003, 54, 359, 425, 287),
    ),
    "aarch64": ((0xC00000B7, 29, 198, 425, 218), (0x40000028, 54, 281, 425, 310)),
    "riscv64": ((0xC00000F3, 29, 198, 425, 218),),
    "ppc64le": ((0xC0000015, 54, 326, 425, 270),),
}

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets; of arguments the low half
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

Instruction = tuple[int, int, int, int]  # code, skip if true, skip if false, operand


def program(machine: str) -> bytes:
    """The filter for ``machine`` (uname -m) as an array of struct sock_filter; empty if unknown."""
    code: list[Instruction] = []
    for arch, ioctl, socket, uring, key in CALLS.get(machine, ()):
        body = [
            *_when(ioctl, _SECOND, (TIOCSTI, TIOCLINUX), listed=EPERM, other=0),
            *_when(socket, _FIRST, FAMILIES, listed=0, other=EAFNOSUPPORT),
            *_when(uring, _NUMBER, (uring,), listed=ENOSYS, other=0),
            *_when(key, _NUMBER, (key,), listed=ENOSYS, other=0),
        ]
        code += [(_LOAD, 0, 0, _ARCH), (_EQUAL, 0, len(body), arch), *body]
    if code:
        code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(
        op.to_bytes(2, "little") + bytes((yes, no)) + operand.to_bytes(4, "little")
        for op, yes, no, operand in code
    )


def _when(
    number: int, offset: int, values: tuple[int, ...], *, listed: int, other: int
) -> list[Instruction]:
    """For system call ``number``: answer by whether the word at ``offset`` is one of ``values``."""
    count = len(values)
    return [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, count + 3, number),
        (_LOAD, 0, 0, offset),
        *((_EQUAL, count - index, 0, value) for index, value in enumerate(values)),
        _answer(other),
        _answer(listed),
    ]


def _answer(errno: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | errno if errno else _ALLOW)
