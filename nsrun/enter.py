"""What a client does to itself before it becomes the command. On the hot path.

A plan's ``enter`` part is a list of (verb, arguments…); each verb is a function here. The order is
the plan's. Everything happens to the calling process, which must have one thread only, and
nothing is undone: when a step fails the process ends and the command is never run (P4).
Needs no module that costs more than a fraction of a millisecond to import.
"""

from __future__ import annotations

import _socket
import os

from nsrun import linux

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs 6 ms
    from typing import Any

WORKLOAD_MARK = "/run/ttp/workload"
OWN_DEVICES: list[int] = []  # st_dev of the file systems made for this workload by replace()


def perform(op: list[Any], descriptors: dict[str, int]) -> None:
    """Carry out one operation. ``descriptors`` are open files received from the supervisor.

    Raises OSError, with the path concerned where there is one.
    """
    verb, *arguments = op
    function = _VERBS.get(verb) or _strict_verb(verb)
    if verb in _WITH_DESCRIPTORS:
        arguments.append(descriptors)
    function(*arguments)


def _strict_verb(verb: str) -> Any:
    from nsrun import init, strict  # what costs others nothing

    return strict.VERBS.get(verb) or init.VERBS[verb]


def close_doors() -> None:
    """Close inherited descriptors that lead around the namespaces.

    Sockets of any family but AF_UNIX are still in the host's network; from a directory one could
    walk to what is about to be hidden. The three standard streams are the caller's own and stay.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2:
            try:
                kind = os.fstat(fd).st_mode & 0o170000
            except OSError:
                continue  # the directory that was listed
            if kind == 0o040000 or (kind == 0o140000 and _in_a_network(fd)):
                os.close(fd)


def _in_a_network(fd: int) -> bool:
    inherited = _socket.socket(fileno=fd)
    family = inherited.family
    inherited.detach()
    return bool(family != _socket.AF_UNIX)


def own_network() -> None:
    """Make a network namespace in a user namespace of our own, as its root.

    For a gateway of root's, which plugs a link into it: then nobody has more rights than before.
    """
    outer = (os.geteuid(), os.getegid())
    linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNET)
    _map_user((0, 0), outer)


def join_user(descriptors: dict[str, int]) -> None:
    linux.setns(descriptors["user"], linux.CLONE_NEWUSER)


def join_network(descriptors: dict[str, int]) -> None:
    linux.setns(descriptors["network"], linux.CLONE_NEWNET)


def join_workload(network: int, pids: list[int]) -> None:
    """Join the network namespace with this inode number, by a process in it, and before that the
    user namespace that owns it. It is the kernel who says whether we may: ioctl_ns(2), setns(2).
    """
    import fcntl

    ns_get_userns = 0xB701
    for pid in pids:
        try:
            space = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it has ended
        if os.fstat(space).st_ino == network:
            owner = fcntl.ioctl(space, ns_get_userns)
            if os.fstat(owner).st_ino != os.stat("/proc/self/ns/user").st_ino:
                linux.setns(owner, linux.CLONE_NEWUSER)
            linux.setns(space, linux.CLONE_NEWNET)
            os.close(owner)
            os.close(space)
            return
        os.close(space)
    raise ProcessLookupError(3, "its last process has just ended")


def new_mounts() -> None:
    """Private, not slave: a mount that the host makes later must not uncover what we cover."""
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)


def hide_run(kept: list[str], session: str, session_kept: list[str], uid: int, gid: int) -> None:
    """Replace /run and the user's runtime directory by empty ones with only what is ``kept``."""
    session = os.path.realpath(session) if session and os.path.isdir(session) else ""
    roots = ["/run"] + [root for root in ("/var/run",) if not os.path.islink(root)]
    found = {root: _open_entries(root, kept) for root in roots if os.path.isdir(root)}
    in_session = _open_entries(session, session_kept) if session else []
    for root, entries in found.items():
        replace(root, entries, 0o755, 0, 0)
    if session:
        if not os.path.isdir(session):  # it was below /run, which is empty now
            os.makedirs(session)
        replace(session, in_session, 0o700, uid, gid)


def hide(path: str) -> None:
    """Put nothing in the place of a directory, a file or a socket; one that is absent stays so."""
    if os.path.isdir(path):
        linux.mount("none", path, "tmpfs", _PLAIN | linux.MS_RDONLY, "mode=555,size=4k")
    elif os.path.exists(path):
        linux.mount("/dev/null", path, "", linux.MS_BIND)


def replace_etc(files: dict[str, str], covered: bool, descriptors: dict[str, int]) -> None:
    """Put ``files`` (names relative to /etc) in the place of the host's.

    A file mounted over a file vanishes when the host renames another onto it, as resolvconf and
    NetworkManager do, so the whole directory is ``covered`` by a read-only overlay where that
    takes nothing from the command: one that is not root could not write there anyway. For root,
    or where /etc cannot be covered (it has mounts of its own in a container), single files are.
    Losing those is no leak: DNS to any address goes to Tor.
    """
    stage = "/run/ttp/etc"
    os.makedirs(stage)
    with open(WORKLOAD_MARK, "w"):
        pass
    contents = {name: text.encode("utf-8", "surrogateescape") for name, text in files.items()}
    if "ca_bundle" in descriptors:
        size = os.fstat(descriptors["ca_bundle"]).st_size
        contents["ssl/certs/ca-certificates.crt"] = os.pread(descriptors["ca_bundle"], size, 0)
    for name, content in contents.items():
        write(f"{stage}/{name}", content)
    if covered and not _has_mounts("/etc"):
        try:
            linux.mount("ttp", "/etc", "overlay", linux.MS_RDONLY, f"lowerdir={stage}:/etc")
        except OSError:
            pass  # no overlay here, or not in user namespaces
        else:
            return
    for name, content in contents.items():
        target = os.path.realpath(f"/etc/{name}")
        if target.startswith("/run/"):  # a link into /run, which is ours
            write(target, content)
        elif os.path.exists(target):
            linux.mount(f"{stage}/{name}", target, "", linux.MS_BIND)


def new_sys() -> None:
    """Show the workload's own interfaces in /sys: the old one has the host's, and their addresses.

    Where the kernel allows no new one (it does not in some containers), those are hidden.
    """
    kept = _open_entries("/sys/fs", ["cgroup"])
    try:
        linux.mount("sysfs", "/sys", "sysfs", _PLAIN | linux.MS_NOEXEC)
    except OSError:
        for path in ("/sys/class/net", "/sys/devices/virtual/net"):
            hide(path)
    else:
        for name, fd in kept:
            linux.mount(f"/proc/self/fd/{fd}", f"/sys/fs/{name}", "", linux.MS_BIND | linux.MS_REC)
    for _, fd in kept:
        os.close(fd)


def come_back() -> None:
    """Enter the working directory anew, by its path: else the old one stays, hidden as it is.

    Where that fails the command must not begin in another one: it may be ``rm -r *``.
    """
    os.chdir(os.readlink("/proc/self/cwd"))


def work_in(directory: str) -> None:
    """Enter ``directory``, which may be relative to the working directory's path."""
    os.chdir(f"{os.readlink('/proc/self/cwd')}/{directory}" if directory[:1] != "/" else directory)


def new_user(uid: int, gid: int) -> None:
    """Make a user namespace in which the present user is ``uid`` again, with power over nothing.

    Processes outside it, of the same user too, can no longer be traced or looked into.
    """
    outer = (os.geteuid(), os.getegid())
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # joining a user namespace closed /proc/self to us
    linux.unshare(linux.CLONE_NEWUSER)
    _map_user((uid, gid), outer)


def new_users(descriptors: dict[str, int]) -> None:
    """The same for root, who may become others: every user and group is itself again.

    Only a process outside may write such a map: the supervisor does, when asked.
    """
    linux.unshare(linux.CLONE_NEWUSER)
    os.write(descriptors["supervisor"], b"m")
    try:
        answer = os.read(descriptors["supervisor"], 1)
    except BlockingIOError:  # after client.PATIENCE
        raise TimeoutError(110, "the supervisor is silent") from None
    if answer != b"m":
        raise PermissionError(1, "the supervisor did not map its users")


def read_only(path: str) -> None:
    """Make everything below ``path`` read-only, for a command whose user could write there."""
    linux.mount(path, path, "", linux.MS_BIND | linux.MS_REC)
    linux.mount_setattr_readonly(path)


def drop_capabilities(kept: list[str]) -> None:
    linux.drop_bounding(kept)
    linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)


def become(uid: int, gid: int, groups: list[int]) -> None:
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def no_new_privileges() -> None:
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def filter_calls(program: str) -> None:
    """Refuse the system calls that the BPF program (nsrun/seccomp.py), in hexadecimal, refuses."""
    if program:
        linux.set_seccomp_filter(bytes.fromhex(program))


_PLAIN = linux.MS_NOSUID | linux.MS_NODEV
_WITH_DESCRIPTORS = {
    *("join_user", "join_network", "replace_etc", "new_users"),
    *("close_all_doors", "hold_sockets", "show_sockets"),
    *("stay_outside", "stay_as_init", "filter_connects"),
}
_VERBS = {
    function.__name__: function
    for function in (
        *(own_network, close_doors, join_user, join_network, join_workload, new_mounts, hide_run),
        *(hide, replace_etc, new_sys, come_back, work_in, new_user, new_users, read_only),
        *(drop_capabilities, become, no_new_privileges, filter_calls),
    )
}


def _map_user(inner: tuple[int, int], outer: tuple[int, int]) -> None:
    """In our new user namespace, user and group ``outer`` are to be ``inner``."""
    write("/proc/self/setgroups", b"deny")
    write("/proc/self/uid_map", b"%d %d 1" % (inner[0], outer[0]))
    write("/proc/self/gid_map", b"%d %d 1" % (inner[1], outer[1]))


def _open_entries(directory: str, names: list[str]) -> list[tuple[str, int]]:
    """Those of ``names`` that exist, held open to be mounted again once they are covered."""
    entries = []
    for name in names:
        try:
            fd = os.open(f"{directory}/{name}", os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, PermissionError):
            continue
        entries.append((name, fd))
    return entries


def replace(directory: str, entries: list[tuple[str, int]], mode: int, uid: int, gid: int) -> None:
    """Mount an empty file system over ``directory``, and ``entries`` (_open_entries) back in it."""
    linux.mount("none", directory, "tmpfs", _PLAIN, f"mode={mode:o},uid={uid},gid={gid}")
    OWN_DEVICES.append(os.stat(directory).st_dev)
    for name, fd in entries:
        path, source = f"{directory}/{name}", f"/proc/self/fd/{fd}"
        kind = os.fstat(fd).st_mode & 0o170000
        if kind == 0o120000:  # a symbolic link is made again
            os.symlink(os.readlink("", dir_fd=fd), path)
        else:
            if kind == 0o040000:
                os.mkdir(path)
            else:
                write(path, b"")
            linux.mount(source, path, "", linux.MS_BIND | linux.MS_REC)
        os.close(fd)


def _has_mounts(directory: str) -> bool:
    with open("/proc/self/mountinfo") as mounts:
        return any(line.split(" ", 5)[4].startswith(f"{directory}/") for line in mounts)


def write(path: str, content: bytes) -> None:
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        os.makedirs(directory)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
