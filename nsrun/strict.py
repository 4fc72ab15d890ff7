"""What a strict workload sees of the machine: nothing of its own, of others, or in between.

Operations like those of enter.py, for ``ttp run --strict`` only, so that no other run loads them.
Most need the namespaces that init.stay_outside made.
"""

from __future__ import annotations

import _socket
import os

from nsrun import enter, linux

# One name and one identity for all: a name of its own would tell workloads of one machine from
# those of another. "localhost" is answered by /etc/hosts (RFC 6761), never by an exit.
HOSTNAME = "localhost"
BOOT_ID = "/proc/sys/kernel/random/boot_id"

# Variables that name a door, tell who is at the other end of it, or tell this machine's addresses.
DOORS = (
    *("DISPLAY", "WAYLAND_DISPLAY", "WAYLAND_SOCKET", "XAUTHORITY", "ICEAUTHORITY"),
    *("SESSION_MANAGER", "DESKTOP_STARTUP_ID", "XDG_ACTIVATION_TOKEN", "AT_SPI_BUS_ADDRESS"),
    *("SSH_AUTH_SOCK", "SSH_AGENT_PID", "GPG_AGENT_INFO", "GNOME_KEYRING_CONTROL"),
    *("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "HOSTNAME", "REMOTEHOST"),
    *("TMUX", "TMUX_PANE", "STY", "EMACS_SOCKET_NAME", "EMACS_SERVER_FILE"),
    *("NVIM", "NVIM_LISTEN_ADDRESS", "VSCODE_IPC_HOOK", "VSCODE_IPC_HOOK_CLI"),
    *("VSCODE_GIT_IPC_HANDLE", "KITTY_LISTEN_ON", "WEZTERM_UNIX_SOCKET", "ALACRITTY_SOCKET"),
    *("PULSE_SERVER", "PIPEWIRE_REMOTE", "PIPEWIRE_RUNTIME_DIR", "DOCKER_HOST", "CONTAINER_HOST"),
    *("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "JOURNAL_STREAM"),
    *("INVOCATION_ID", "XDG_SESSION_ID", "XDG_SEAT", "XDG_VTNR", "WSL_INTEROP"),
)


def without_doors(environment: dict[str, str], allowed: list[str]) -> dict[str, str]:
    """``environment`` without the variables of DOORS, but for those of an ``allowed`` socket."""
    displays = {path.rpartition("/X")[2] for path in allowed if "/.X11-unix/X" in path}

    def stays(name: str, value: str) -> bool:
        if name in ("DISPLAY", "XAUTHORITY", "ICEAUTHORITY"):
            display = environment.get("DISPLAY", "").partition(":")[2].partition(".")[0]
            return display in displays
        if name == "WAYLAND_DISPLAY" and "/" not in value:
            value = f"{environment.get('XDG_RUNTIME_DIR', '')}/{value}"
        door = name in DOORS or name.startswith("DBUS_")
        return not door or any(path and path in value for path in allowed)

    return {name: value for name, value in environment.items() if stays(name, value)}


def close_all_doors(descriptors: dict[str, int]) -> None:
    """Close every inherited descriptor but pipes, files and terminals; ``descriptors`` are ours.

    Raises OSError when a standard stream is a socket that need not be connected to send, or that
    is in the host's network: nothing would confine it.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            kind = os.fstat(fd).st_mode & 0o170000
        except OSError:
            continue  # the directory that was listed
        if fd > 2:
            if kind not in (0o010000, 0o020000, 0o100000) and fd not in descriptors.values():
                os.close(fd)
        elif kind == 0o140000:
            stream = _socket.socket(fileno=fd)
            family, form = stream.family, stream.type
            stream.detach()
            if family != _socket.AF_UNIX or form == _socket.SOCK_DGRAM:
                raise OSError(f"standard stream {fd} is a socket that leads outside")


def hold_sockets(paths: list[str], descriptors: dict[str, int]) -> None:
    """Keep the allowed sockets at hand, before anything is hidden."""
    for path in paths:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if os.fstat(fd).st_mode & 0o170000 != 0o140000:
            raise OSError(88, "it is no socket", path)  # ENOTSOCK
        descriptors[f"socket {os.path.abspath(path)}"] = fd


def own_directories(paths: list[str], session: str, uid: int, gid: int) -> None:
    """Empty file systems of the workload's own at ``paths``, for all, and at ``session``, for one.

    What is bound in them was bound by the workload: see connects.py.
    """
    for path in paths:
        if os.path.isdir(path):
            enter.replace(os.path.realpath(path), [], 0o1777, 0, 0)
    if session and not os.path.isdir(session):
        above = session
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        if os.stat(above).st_dev in enter.OWN_DEVICES:  # it was hidden just now
            os.makedirs(session)
    if session and os.path.isdir(session):
        enter.replace(os.path.realpath(session), [], 0o700, uid, gid)


def new_proc() -> None:
    """A /proc with the processes of the workload, and with neither boot id nor kernel arguments."""
    linux.mount("proc", "/proc", "proc", _PLAIN | linux.MS_NOEXEC)
    with open("/proc/sys/kernel/random/uuid") as fresh:
        put_file(BOOT_ID, fresh.read())
    enter.hide("/proc/cmdline")


def new_sys_only() -> None:
    """A /sys with the workload's interfaces, without firmware's tables and the host's cgroups.

    Raises OSError where the kernel allows no new one: the old one tells the host's addresses.
    """
    linux.mount("sysfs", "/sys", "sysfs", _PLAIN | linux.MS_NOEXEC)
    for path in ("/sys/firmware", "/sys/devices/virtual/dmi"):
        enter.hide(path)


def new_terminals() -> None:
    """Terminals of its own; of the others only the one it is started on, as /dev/console.

    Where ttyname(3) finds it. By name, a program could read what is typed on any of its user's.
    """
    names = [name for name in map(_terminal, (0, 1, 2)) if name]
    if names and os.path.exists("/dev/console"):
        linux.mount(names[0], "/dev/console", "", linux.MS_BIND)
    flags = linux.MS_NOSUID | linux.MS_NOEXEC
    linux.mount("devpts", "/dev/pts", "devpts", flags, "newinstance,ptmxmode=0666,mode=0600")


def _terminal(fd: int) -> str:
    try:
        return os.ttyname(fd)
    except OSError:  # none, or one without a name here
        return ""


def new_queues() -> None:
    if os.path.isdir("/dev/mqueue"):
        linux.mount("mqueue", "/dev/mqueue", "mqueue", _PLAIN | linux.MS_NOEXEC)


def put_file(path: str, text: str) -> None:
    """Put ``text`` in the place of a file of the host's; one that is absent stays so."""
    if os.path.exists(path):
        stage = f"/run/ttp/files{path}"
        enter.write(stage, text.encode())
        linux.mount(stage, os.path.realpath(path), "", linux.MS_BIND)


def be_anonymous() -> None:
    _socket.sethostname(HOSTNAME)
    linux.setdomainname("(none)")


def show_sockets(descriptors: dict[str, int]) -> None:
    """Put the allowed sockets back where they were hidden."""
    for name, fd in descriptors.items():
        kind, _, path = name.partition(" ")
        if kind == "socket" and not os.path.exists(path):
            enter.write(path, b"")
            linux.mount(f"/proc/self/fd/{fd}", path, "", linux.MS_BIND)


_PLAIN = linux.MS_NOSUID | linux.MS_NODEV
VERBS = {
    function.__name__: function
    for function in (
        *(close_all_doors, hold_sockets, own_directories, new_proc, new_sys_only),
        *(new_terminals, new_queues, put_file, be_anonymous, show_sockets),
    )
}
