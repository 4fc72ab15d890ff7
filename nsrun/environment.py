"""``--env`` and ``--env-file``: what they change in a command's environment.

Not on the hot path: the client loads this when one of the options was given. Files are the
caller's own to read, never a supervisor's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nsrun.client import RUN_FAILED, RefusedError

Change = tuple[str, str | None]  # a variable and its value; None: it shall not be there


def asked(files: Sequence[str], settings: Sequence[str], ours: Mapping[str, str]) -> list[Change]:
    """The same as ``changes``, all read by now. Raises RefusedError."""
    try:
        return list(changes(files, settings, ours))
    except OSError as error:
        raise RefusedError(f"read {error.filename}", str(error.strerror), "", RUN_FAILED) from None
    except ValueError as error:
        hint = "a line is NAME=VALUE, NAME or a # comment"
        raise RefusedError("take variables from a file", str(error), hint, RUN_FAILED) from None


def changes(
    files: Sequence[str], settings: Sequence[str], ours: Mapping[str, str]
) -> Iterator[Change]:
    """All changes in order: of the files, line by line, then of the settings; the last one wins.

    ``NAME=VALUE`` sets a variable; ``NAME`` gives it the value it has in ``ours``, or none.
    Raises OSError or ValueError, which names file and line.
    """
    for path in files:
        with open(path, "rb") as file:  # noqa: PTH123  pathlib costs 4 ms
            content = file.read()
        for line in lines(content, path):
            yield change(line, ours)
    for setting in settings:
        yield change(setting, ours)


def change(setting: str, ours: Mapping[str, str]) -> Change:
    name, given, value = setting.partition("=")
    return name, value if given else ours.get(name)


def lines(content: bytes, path: str) -> Iterator[str]:
    """The settings in a file of the format that ``docker run --env-file`` takes.

    A line is a setting; blank ones and those that begin with ``#`` are none. A value is taken as
    it is: no quotes, no escapes, no expansion. Raises ValueError.
    """
    if b"\0" in content:
        raise ValueError(f"{path}: it is not a text")
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r").lstrip()
        if not line or line.startswith("#"):
            continue
        name = line.partition("=")[0]
        if not name or name.split() != [name]:
            raise ValueError(f"{path}:{number}: {name!r} is not the name of a variable")
        yield line
