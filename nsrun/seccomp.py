"""A filter of system calls for workloads: the few doors no namespace closes. Pure, hot path.

ioctl TIOCSTI, TIOCLINUX   push characters into the terminal, which the shell outside would run
socket of another family   AF_VSOCK and others are in no network namespace
io_uring_setup             makes sockets without a call that could be filtered
request_key                has the kernel start a helper outside, which may look up a name by DNS

Classic BPF over struct seccomp_data (seccomp(2)). Calls of
a foreign architecture that is not listed for the machine are let through: a filter cannot know
their numbers. On i386 sockets may be made by socketcall(2), whose arguments are out of reach.

The strict filter is for one architecture, and ends a process that uses another. It also refuses
Unix datagram sockets, which take an address with every message, and leaves each connect(2) to the
workload's init (nsrun/connects.py), as no filter can read the address.
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

# machine -> numbers of connect, socketpair and seccomp, for a strict workload
STRICT = {"x86_64": (42, 53, 317), "aarch64": (203, 199, 277), "riscv64": (203, 199, 277)}
# machine -> numbers of setgroups, setresgid and setresuid
SET_IDS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147), "riscv64": (159, 149, 147)}
AF_UNIX, SOCK_STREAM, SOCK_SEQPACKET = 1, 1, 5
EACCES = 13
X32 = 0x40000000  # this bit of a number makes it one of another ABI with the same AUDIT_ARCH

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_AT_LEAST, _AND = 0x35, 0x54  # BPF_JMP|JGE|K, BPF_ALU|AND|K
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets; of arguments the low half
_ALLOW, _ERRNO, _NOTIFY, _KILL = 0x7FFF0000, 0x00050000, 0x7FC00000, 0x80000000

Instruction = tuple[int, int, int, int]  # code, skip if true, skip if false, operand


def program(machine: str) -> bytes:
    """The filter for ``machine`` (uname -m) as an array of struct sock_filter; empty if unknown."""
    code: list[Instruction] = []
    for arch, *numbers in CALLS.get(machine, ()):
        body = _doors(*numbers)
        code += [(_LOAD, 0, 0, _ARCH), (_EQUAL, 0, len(body), arch), *body]
    if code:
        code.append((_RETURN, 0, 0, _ALLOW))
    return _assemble(code)


def strict_program(machine: str) -> bytes:
    """The filter of a strict workload. Raises KeyError if the machine is unknown."""
    arch, *numbers = CALLS[machine][0]
    connect, socketpair, _ = STRICT[machine]
    return _assemble(
        [
            (_LOAD, 0, 0, _ARCH),
            (_EQUAL, 1, 0, arch),
            (_RETURN, 0, 0, _KILL),
            (_LOAD, 0, 0, _NUMBER),
            (_AT_LEAST, 0, 1, X32),
            (_RETURN, 0, 0, _KILL),
            (_EQUAL, 0, 1, connect),
            (_RETURN, 0, 0, _NOTIFY),
            *_no_datagrams(numbers[1]),
            *_no_datagrams(socketpair),
            *_doors(*numbers),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )


def _doors(ioctl: int, socket: int, uring: int, key: int) -> list[Instruction]:
    return [
        *_when(ioctl, _SECOND, (TIOCSTI, TIOCLINUX), listed=EPERM, other=0),
        *_when(socket, _FIRST, FAMILIES, listed=0, other=EAFNOSUPPORT),
        *_when(uring, _NUMBER, (uring,), listed=ENOSYS, other=0),
        *_when(key, _NUMBER, (key,), listed=ENOSYS, other=0),
    ]


def _no_datagrams(number: int) -> list[Instruction]:
    """For socket(2) or socketpair(2): of AF_UNIX, only types that must connect to send.

    The kernel makes SOCK_DGRAM of SOCK_RAW; flags are above the lowest four bits.
    """
    return [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 7, number),
        (_LOAD, 0, 0, _FIRST),
        (_EQUAL, 0, 5, AF_UNIX),
        (_LOAD, 0, 0, _SECOND),
        (_AND, 0, 0, 0xF),
        (_EQUAL, 2, 0, SOCK_STREAM),
        (_EQUAL, 1, 0, SOCK_SEQPACKET),
        _answer(EACCES),
    ]


def _assemble(code: list[Instruction]) -> bytes:
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
