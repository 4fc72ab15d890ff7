"""The processes around a strict workload: one outside that waits, and two inside.

    ttp (outside)      forks init, waits; ends, stops and is signalled as the command is
     └ init (pid 1)    reaps what is orphaned
        ├ COMMAND      in the process group of both, so that a terminal treats them as one job
        └ connects     answers for connect(2) (connects.py)

When init dies, the kernel kills all below it (pid_namespaces(7)); init dies with the process
outside, for as long as the command lives, and with the one that answers. What the command leaves
running stays, with init. Only the one that answers touches what a command may have made, such as a
file system by FUSE that never answers: were a thread of init stuck there, nothing could be killed.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os
import select
import time

from nsrun import connects, enter, linux

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs 6 ms
    from typing import NoReturn

NAMESPACES = (
    *(linux.CLONE_NEWPID, linux.CLONE_NEWIPC, linux.CLONE_NEWUTS),
    *(linux.CLONE_NEWCGROUP, linux.CLONE_NEWTIME),
)
CLOCKS = (("monotonic", 1), ("boottime", 7))  # of clock_gettime(2)
STOPPED, ENDED, MAP = b"s", b"e", b"m"
_blocked: set[int] = set()  # signals that were so before us, and will be for the command

# What init may do, in the workload's user namespace: look into the command (pidfd_getfd(2),
# /proc/PID/mem) and see files as it does. With many users, act as each of them, too.
KEEPS = ("SYS_PTRACE", "SYS_CHROOT")
KEEPS_FOR_MANY = ("SETUID", "SETGID", "DAC_OVERRIDE")


def stay_outside(descriptors: dict[str, int]) -> None:
    """Go on as pid 1 of new namespaces; the process that was called stays behind and waits."""
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # joining a user namespace closed /proc/self to us
    linux.unshare(sum(NAMESPACES))
    _set_clocks_back()
    outside, inside = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    every = set(_signal.valid_signals()) - {_signal.SIGKILL, _signal.SIGSTOP}
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, every)
    pid = os.fork()
    if pid:
        inside.close()
        _wait(outside, pid, every)
    outside.close()
    os.close(descriptors["supervisor"])
    # who maps users is whom we leave behind: the supervisor does not know our process
    descriptors["supervisor"] = descriptors["outside"] = inside.detach()
    _blocked.update(before)


def _set_clocks_back() -> None:
    """The workload's uptime begins now: that of the host tells one machine from others."""
    text = "".join(f"{name} -{int(time.clock_gettime(clock))} 0\n" for name, clock in CLOCKS)
    with open("/proc/self/timens_offsets", "w") as offsets:
        offsets.write(text)


# ---- outside -----------------------------------------------------------------------------------


def _wait(inside: _socket.socket, pid: int, every: set[int]) -> NoReturn:
    """Tell init of every signal we get, stop and end as the command does."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        terminal = -1
    _let_go({inside.fileno(), terminal})
    signals = linux.signalfd(every - {_signal.SIGCHLD})
    ready = select.poll()
    for fd in (signals, inside.fileno()):
        ready.register(fd, select.POLLIN)
    while True:
        for fd, _ in ready.poll():
            if fd == signals:
                _send(inside, os.read(signals, 128)[:1])  # ssi_signo, least byte first
                continue
            try:
                message = inside.recv(8)
            except ConnectionResetError:  # it ended with a signal of ours unread; its word is next
                message = inside.recv(8)
            if message == MAP:
                _map_users(pid)
                _send(inside, MAP)
            elif message[:1] == STOPPED:
                _stop(message[1])
            else:  # it told how the command ended, or itself ended before there was one
                told = message[:1] == ENDED
                status = int.from_bytes(message[1:], "little") if told else os.waitpid(pid, 0)[1]
                _take_back(terminal)
                end(status)


def _send(peer: _socket.socket, message: bytes) -> None:
    try:
        peer.send(message)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it ended; that is the next thing to be read


def _map_users(pid: int) -> None:
    """Map every user and group of ours to itself in the new user namespace of process ``pid``."""
    for kind in ("uid_map", "gid_map"):
        with open(f"/proc/self/{kind}") as ours:
            ranges = [line.split() for line in ours]
        text = "".join(f"{first} {first} {count}\n" for first, _, count in ranges)
        with open(f"/proc/{pid}/{kind}", "w") as theirs:
            theirs.write(text)


def _stop(number: int) -> None:
    """Stop as the command did, until we are continued."""
    os.kill(os.getpid(), number)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {number})
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {number})


def _take_back(terminal: int) -> None:
    """A shell gives the terminal to a group of its own, and cannot name ours to give it back."""
    try:
        os.killpg(os.tcgetpgrp(terminal), 0)
    except ProcessLookupError:
        os.tcsetpgrp(terminal, os.getpgrp())
    except OSError:
        pass  # no terminal, or somebody else has it


def end(status: int) -> NoReturn:
    """End as a child did, by an exit code or by a signal; ``status`` is that of waitpid(2)."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)  # if there is a core to dump, it is the command's
        if number not in (_signal.SIGKILL, _signal.SIGSTOP):
            _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {number})
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


# ---- inside ------------------------------------------------------------------------------------


def stay_as_init(
    uid: int, gid: int, groups: list[int], set_ids: list[int], descriptors: dict[str, int]
) -> None:
    """Go on as the command; pid 1 stays behind, as the user ``uid``, and never returns.

    ``set_ids`` are the numbers of setgroups, setresgid and setresuid on this machine where the
    workload may have many users, else empty.
    """
    answering, asking = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    early = _signal.sigpending()
    command = os.fork()
    if command == 0:
        answering.close()
        descriptors["asking"] = asking.detach()
        for number in early:  # what hit us all before there was a command
            os.kill(os.getpid(), number)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _blocked)
        return
    asking.close()
    if os.geteuid() != uid:
        linux.prctl(linux.PR_SET_KEEPCAPS, 1)
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    # with SYS_PTRACE, which the command lacks, and not dumpable: it cannot look into us (ptrace(2))
    linux.capset(KEEPS + KEEPS_FOR_MANY if set_ids else KEEPS)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    answerer = os.fork()
    if answerer == 0:
        _answer(answering, descriptors, tuple(set_ids))
    linux.prctl(linux.PR_SET_PDEATHSIG, _signal.SIGKILL)  # of the process outside
    outside = _socket.socket(fileno=descriptors["outside"])
    _let_go({outside.fileno()})
    _reap(outside, command, answerer)


def filter_connects(program: str, number: int, descriptors: dict[str, int]) -> None:
    """Filter system calls by a BPF program, in hexadecimal, with connect(2) answered for."""
    listener = linux.set_seccomp_filter(bytes.fromhex(program), number)
    asking = _socket.socket(fileno=descriptors["asking"])
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, listener.to_bytes(4, "little"))
    asking.sendmsg([b"l"], [rights])
    asking.close()
    os.close(listener)


def _answer(
    asking: _socket.socket, descriptors: dict[str, int], set_ids: tuple[int, ...]
) -> NoReturn:
    """Answer for connect(2) until nobody is left who could call it."""
    code = 1
    try:
        os.setsid()  # signals to the job are not for us
        allowed = [fd for name, fd in descriptors.items() if name.startswith("socket ")]
        _let_go({asking.fileno(), *allowed})
        sockets = {(found.st_dev, found.st_ino) for found in map(os.fstat, allowed)}
        rules = connects.Rules(frozenset(enter.OWN_DEVICES), frozenset(sockets), set_ids)
        _, ancillary, _, _ = asking.recvmsg(1, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
        if ancillary:  # else the command ended before it was one
            connects.serve(int.from_bytes(ancillary[0][2], "little"), rules)
        code = 0
    finally:
        os._exit(code)


def _reap(outside: _socket.socket, command: int, answerer: int) -> NoReturn:
    """Wait for all that ends, tell what becomes of the command, pass signals on to it."""
    children = linux.signalfd({_signal.SIGCHLD})
    ready = select.poll()
    for fd in (children, outside.fileno()):
        ready.register(fd, select.POLLIN)
    while True:
        for fd, _ in ready.poll():
            if fd == children:
                os.read(children, 128)
                command = _collect(outside, ready, command, answerer)
            elif message := outside.recv(1):
                _pass_on(message[0], command)
            else:
                os._exit(1)  # it was killed; the kernel is about to kill us too


def _collect(outside: _socket.socket, ready: select.poll, command: int, answerer: int) -> int:
    """Reap; returns ``command``, or 0 when it has ended. Ends with the last process."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            os._exit(0)
        if pid == 0:
            return command
        if pid == answerer and status and not os.WIFSTOPPED(status):
            os._exit(1)  # killed: better no workload than one in which connect() hangs
        if pid == command and os.WIFSTOPPED(status):
            _send(outside, STOPPED + bytes((os.WSTOPSIG(status),)))
        elif pid == command:
            linux.prctl(linux.PR_SET_PDEATHSIG, 0)  # what it left behind may stay
            ready.unregister(outside.fileno())
            _send(outside, ENDED + status.to_bytes(4, "little"))
            outside.close()
            command = 0


def _pass_on(number: int, command: int) -> None:
    """Give the command a signal that the process outside got.

    If we got one too, then the whole process group did, by the terminal or by kill(2); and with it
    the command, unless it left the group: that of outside has no number here, getpgid(2) says 0.
    """
    ours = number in _signal.sigpending()
    if ours:
        _signal.sigwait({number})
    if not ours or os.getpgid(command) != 0:
        os.kill(command, number)


def _let_go(kept: set[int]) -> None:
    """Keep nothing open or busy that is the command's: who reads from it waits for its end."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError:
                continue  # the directory that was listed
    os.chdir("/")


VERBS = {function.__name__: function for function in (stay_outside, stay_as_init, filter_connects)}
