"""Defaults of options: where they may come from, which one counts, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lab_helpers import TTP
from nsrun.cli.run import parse
from nsrun.spec import RunSpec

FILE = """
[run]
gateway = "office"
bootstrap-timeout = 20

[gateway]
idle = 60
uplink = ["slirp4netns", "pasta"]

[gateway.office]
torrc = "bridges"
"""


def ask(prefix: list[str], *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    changes = [f"{name}={value}" for name, value in variables.items()]
    command = [*prefix, "env", *changes, TTP, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def shown(prefix: list[str], **variables: str) -> dict[tuple[str, str], tuple[object, str]]:
    """``ttp config show``: value and source by section and key."""
    done = ask(prefix, "config", "show", "--json", **variables)
    assert done.returncode == 0, done.stderr
    return {(s["section"], s["key"]): (s["value"], s["source"]) for s in json.loads(done.stdout)}


@pytest.fixture
def file(user_home: Path) -> Path:
    """The user's configuration file, with a fragment of a torrc beside it."""
    directory = user_home / ".config" / "ttp"
    directory.mkdir(parents=True)
    (directory / "bridges").write_text("UseBridges 0\n")
    path = directory / "config.toml"
    path.write_text(FILE)
    return path


def test_every_setting_says_where_it_comes_from(as_user: list[str], file: Path) -> None:
    """Variable before file, file before default, a gateway's own part before that of all."""
    found = shown(as_user, TTP_IDLE="30", TTP_NO_IPV6="yes", TTP_LAB="x", TTP_STATE_DIR="/s")
    assert found["run", "gateway"] == ("office", str(file))
    assert found["run", "bootstrap-timeout"] == (20, str(file))
    assert found["run", "no-ipv6"] == (True, "TTP_NO_IPV6")
    assert found["run", "user"] == (None, "default")
    assert found["gateway", "torrc"] == (None, "default")
    assert found["gateway", "uplink"] == (["slirp4netns", "pasta"], str(file))
    assert found["gateway.office", "torrc"] == (str(file.with_name("bridges")), str(file))
    assert found["gateway.office", "idle"] == (30, "TTP_IDLE")
    assert found["lab", "lab"] == ("x", "TTP_LAB")
    assert found["directories", "state"] == ("/s", "TTP_STATE_DIR")
    table = ask(as_user, "config", "show").stdout
    assert any(line.split() == ["idle", "=", "60.0", "#", str(file)] for line in table.splitlines())


def test_the_command_line_comes_first(as_user: list[str], file: Path) -> None:
    """Then a variable, then the file: seen in the uplinks that `ttp plan` would try."""

    def planned(*options: str, **variables: str) -> str:
        done = ask(as_user, "plan", *options, "--", "true", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "slirp4netns --configure" in planned()
    assert "slirp4netns --configure" not in planned(TTP_UPLINK="pasta")
    assert "address add fd74" in planned()
    assert "/office/tor" in planned(TTP_IDLE="3")
    assert "/else/tor" in planned(TTP_GATEWAY="default", TTP_STATE_DIR="/else").replace(
        "/gateways/default", ""
    )
    file.write_text(FILE + "[gateway.other]\n")
    assert "/other/tor" in planned("--gateway", "other", TTP_GATEWAY="office")


def test_the_system_has_a_file_and_its_user_another(as_user: list[str], file: Path) -> None:
    """The user's comes later and wins, key by key; root reads no home directory."""
    system = '[run]\ngateway = "system"\nno-ipv6 = true\n'
    namespace = (
        "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w && "
        "mount -t overlay none -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /etc && "
        'mkdir -p /etc/ttp && printf "$0" >/etc/ttp/config.toml && exec "$@"'
    )
    prefix = [*as_user, "unshare", "--map-root-user", "--mount", "sh", "-c", namespace, system]
    alone = shown(prefix)
    assert alone["run", "gateway"] == ("system", "/etc/ttp/config.toml")
    both = shown(prefix, TTP_CONFIG=str(file))
    assert both["run", "gateway"] == ("office", str(file))
    assert both["run", "no-ipv6"] == (True, "/etc/ttp/config.toml")
    paths = ask(prefix, "config", "path", TTP_CONFIG=str(file)).stdout.splitlines()
    assert paths == ["/etc/ttp/config.toml", str(file)]
    assert ask(prefix, "config", "path").stdout.splitlines() == ["/etc/ttp/config.toml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nidel = 3\n", "[run] idel: no such setting"),
        ("[run]\nname = 'x'\n", "[run] name: no such setting"),
        ("[runs]\n", "[runs] is no section"),
        ("run = 3\n", "[run] is no section"),
        ("[run\n", "at line 1"),
        ("[run]\nno-ipv6 = 1\n", "[run] no-ipv6: 1 is not true or false"),
        ("[run]\ngateway = '../x'\n", "[run] gateway: a name is 1 to 32"),
        ("[run]\nbootstrap-timeout = nan\n", "[run] bootstrap-timeout: it is no number of seconds"),
        ("[gateway]\nidle = 'x'\n", "[gateway] idle: 'x' is not a number"),
        ("[gateway]\nidle = -1\n", "[gateway] idle: -1.0 is not in the range"),
        ("[gateway]\nuplink = 'pasta'\n", "[gateway] uplink: 'pasta' is not a list of strings"),
        ("[gateway]\nuplink = ['pigeon']\n", "[gateway] uplink: 'pigeon' is none of pasta"),
        ("[gateway.a]\ntorrc = '/no'\n", "[gateway.a] torrc: No such file"),
        ("[gateway.a]\nx = 1\n", "[gateway.a] x: no such setting"),
        ("[gateway.'a b']\n", "[gateway.a b]: a name is 1 to 32"),
        ("[lab]\nin = 'mars'\n", "[lab] in: 'mars' is none of host"),
        ("[run]\nuser = '\xff'\n", "it is not UTF-8"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_and_starts_nothing(
    as_user: list[str], file: Path, text: str, words: str
) -> None:
    """It names file and key. Of `ttp run` the exit code is 125, as of all that we refuse."""
    file.write_text(text, encoding="latin-1")
    for command, code in (("plan", 2), ("run", 125)):
        done = ask(as_user, command, "--", "true")
        complaint, *_hint = done.stderr.splitlines()
        assert complaint.startswith(f"ttp: cannot use {file}: ")
        assert words in complaint
        assert (done.returncode, done.stdout) == (code, "")
    assert not (file.parents[2] / "run" / "ttp").exists()


def test_a_mistake_in_a_variable_names_it(as_user: list[str]) -> None:
    """Exit code 2, and nothing is started."""
    done = ask(as_user, "plan", "--", "true", TTP_BOOTSTRAP_TIMEOUT="soon")
    assert done.returncode == 2
    assert "TTP_BOOTSTRAP_TIMEOUT" in done.stderr
    done = ask(as_user, "plan", "--", "true", TTP_IDLE="soon")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot use TTP_IDLE" in done.stderr


def test_help_and_what_takes_no_settings_work_with_a_broken_file(
    as_user: list[str], file: Path
) -> None:
    """Else it could not be repaired, nor a gateway be stopped."""
    file.write_text("[broken")
    for argv in (["run", "--help"], ["config", "path"], ["gateway", "ls"]):
        assert ask(as_user, *argv).returncode == 0
    assert ask(as_user, "config", "show").returncode == 2


def test_a_file_that_cannot_be_read_is_named(as_user: list[str], file: Path) -> None:
    """It is not as if it were not there: who wrote it meant it to count."""
    done = ask(as_user, "plan", "--", "true", TTP_CONFIG=str(file.parent))
    assert done.returncode == 2
    assert done.stderr == f"ttp: cannot read {file.parent}: Is a directory\n"


def test_a_supervisor_opens_no_file_of_a_client() -> None:
    """It parses the text that it is sent, whatever is at the path now."""
    text = "[run]\nno-ipv6 = true\ngateway = 'work'\n"

    def parsed(text: str) -> RunSpec | None:
        defaults = {"files": [["/no/such/file", text]], "environment": {"TTP_GATEWAY": "mine"}}
        return parse({"do": "run", "arguments": ["--", "true"], "defaults": defaults})

    assert parsed(text) == RunSpec(("true",), gateway="mine", ipv6=False)
    assert parsed("[broken") is None
