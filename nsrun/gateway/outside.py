"""Commands that hand their work to a process that runs already: it is not behind Tor.

A second ``firefox`` tells the first to open a window; ``docker`` asks a daemon. No namespace holds
what the other process then does, so the user is warned. Who means to get out is not held by this.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Handover:
    """``servers`` do the work, under these names. ``only_with``: arguments without which a command
    works by itself; ``unless``: arguments with which it does. A ``daemon`` serves every user.
    """

    servers: tuple[str, ...]
    advice: str
    only_with: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    daemon: bool = False


_CLOSE = "close that first, or "
_FIREFOX = f"{_CLOSE}use another profile: --no-remote --profile DIRECTORY"
_CHROME = f"{_CLOSE}use another profile: --user-data-dir=DIRECTORY"
_OTHER_USER = "run it as another user (--user), as whom nothing runs"
_DAEMON = "what a daemon starts has the host's network; ttp cannot put it behind Tor"

_NO_REMOTE = ("--no-remote", "-no-remote", "--new-instance", "-new-instance")
_SESSION = ("-L", "-S")


def _browser(*servers: str) -> Handover:
    return Handover(servers, _CHROME, unless=("--user-data-dir",))


# By the file name of the command. man pages: firefox(1), chromium(1), tmux(1), screen(1),
# emacsclient(1), vim(1) --remote, gnome-terminal(1), konsole(1), xfce4-terminal(1), systemd-run(1).
HANDOVERS = {
    **dict.fromkeys(
        ("firefox", "firefox-esr", "librewolf"),
        Handover(("firefox", "firefox-esr", "firefox-bin", "librewolf"), _FIREFOX, (), _NO_REMOTE),
    ),
    "thunderbird": Handover(("thunderbird", "thunderbird-bin"), _FIREFOX, (), _NO_REMOTE),
    **dict.fromkeys(("chromium", "chromium-browser"), _browser("chromium", "chromium-browser")),
    **dict.fromkeys(("google-chrome", "google-chrome-stable", "chrome"), _browser("chrome")),
    **dict.fromkeys(("brave", "brave-browser"), _browser("brave")),
    "code": Handover(("code",), _CHROME, unless=("--user-data-dir",)),
    "subl": Handover(("sublime_text",), _CLOSE + _OTHER_USER),
    "emacsclient": Handover(("emacs", "emacs-gtk", "emacs-nox", "emacs-lucid"), "use emacs itself"),
    **dict.fromkeys(
        ("vim", "gvim"),
        Handover(("vim", "gvim", "vim.gtk3"), "leave out --remote", only_with=("--remote",)),
    ),
    "gnome-terminal": Handover(("gnome-terminal-server",), "use another terminal, such as xterm"),
    "konsole": Handover(("konsole",), "leave out --new-tab", only_with=("--new-tab",)),
    "xfce4-terminal": Handover(
        ("xfce4-terminal",), "use --disable-server", (), ("--disable-server",)
    ),
    "tmux": Handover(("tmux",), "start a server of its own: tmux -L NAME", unless=_SESSION),
    "screen": Handover(
        ("screen",), "start a session of its own", ("-r", "-R", "-x", "-d", "-D", "-X")
    ),
    "systemd-run": Handover(("systemd",), _DAEMON, daemon=True),
    "flatpak": Handover(("flatpak-session-helper", "flatpak-portal"), _DAEMON, ("run",)),
    "snap": Handover(("snapd",), _DAEMON, ("run",), daemon=True),
    "docker": Handover(("dockerd",), _DAEMON, daemon=True),
    "podman": Handover(("podman",), _DAEMON, ("--remote", "-r", "--url")),
}


def warning(command: tuple[str, ...], uid: int, behind: Iterable[int]) -> tuple[str, str] | None:
    """What to tell who runs ``command`` as ``uid``: a line, and a hint; None if there is nothing.

    ``behind`` are processes in whose network namespaces it would be behind Tor all the same.
    """
    name = command[0].rpartition("/")[2]
    handover = HANDOVERS.get(name)
    if handover is None:
        return None
    words = [word.partition("=")[0] for word in command[1:]]
    if handover.only_with and not any(word.startswith(handover.only_with) for word in words):
        return None
    if any(word in handover.unless for word in words):
        return None
    spaces = {_network(pid) for pid in behind} - {None}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            server = _name_among(handover.servers, process)
            ours = handover.daemon or process.stat().st_uid == uid
            if server and ours and _network(int(process.name)) not in spaces:
                cause = f"{name} may leave the work to {server} (process {process.name})"
                return f"{cause}, which is not behind Tor", handover.advice
    return None


def _name_among(names: tuple[str, ...], process: Path) -> str:
    """The name that ``process`` has among these: of its file, or as it calls itself."""
    words = process.joinpath("cmdline").read_text("latin-1").split("\0")
    called = words[0].rpartition("/")[2]
    kernel = process.joinpath("comm").read_text("latin-1").rstrip("\n")
    return next((name for name in names if name == called or name[:15] == kernel), "")


def _network(pid: int) -> int | None:
    """The number of its network namespace; None if that is not for us to see, or it has ended."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None
