"""Defaults of options: their own, from configuration files, from the environment.

    command line  >  TTP_OPTION  >  the user's file  >  the system's file  >  the option's default

A section of a file has the options of the commands that belong to it, under their own names; which
these are is asked of the commands, so that no option is listed twice. ``[gateway.NAME]`` is
for one gateway, and comes before ``[gateway]`` of any file. Values are given as TOML's strings,
numbers, booleans and lists; a file for ttp itself to read is relative to the one that names it.

client.defaults() gathers files and variables. It is the caller who reads his files, never a
supervisor: that of root must not open what a user names.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from nsrun import client
from nsrun.errors import UsageError
from nsrun.spec import check_name

SECTIONS = {"run": "TTP_", "gateway": "TTP_", "lab": "TTP_LAB_"}  # and what variables begin with
GATEWAY = "gateway"  # the section that may have a part for each name

# They say which one is meant, and cannot be meant for all.
ONCE = {"name", "pcap", "json_status_fd", "foreground", "help"}

DIRECTORIES = {"TTP_RUNTIME_DIR", "TTP_STATE_DIR", "TTP_CONFIG"}  # see nsrun/paths.py

DEFAULT = "default"


class Settable(TyperCommand):
    """A command whose options can have other defaults. Made by ``settable``."""

    section: str
    check: Callable[..., object] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.settable():
            option.envvar = option.envvar or _variable(self.section, option)

    def settable(self) -> list[Any]:
        return [p for p in self.params if p.param_type_name == "option" and p.name not in ONCE]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Complaints about files wait: --help is always answered."""
        complaint = None
        if not ctx.resilient_parsing:
            name = ""
            if self.section == GATEWAY:
                given = self.make_parser(ctx).parse_args(args=list(args))[0]
                name = str(given.get("name") or DEFAULT)
            try:  # what a client sent is the object of its request's context
                found = Settings(sections(ctx.find_root().command), ctx.obj or gathered())
                values = found.given(self.section, name)
                own = {option.name for option in self.settable()}
                ctx.default_map = {key: values[key] for key in own & values.keys()}
            except UsageError as error:
                complaint = error
        rest = super().parse_args(ctx, args)
        if complaint is not None:
            raise complaint
        return rest


def settable(section: str, check: Callable[..., object] | None = None) -> type[Settable]:
    """The class of a command of ``section``. ``check`` takes any one option of it, by keyword, and
    raises UsageError if its value will not do.
    """
    held = staticmethod(check) if check is not None else None
    return type("Settable", (Settable,), {"section": section, "check": held})


@dataclass(frozen=True)
class Setting:
    """The value of an option, as the command takes it, and where it comes from."""

    value: Any
    source: str


Sections = Mapping[str, list[Settable]]


def sections(root: Any) -> Sections:
    """The commands of each section, of all that the program has."""
    found: dict[str, list[Settable]] = {}

    def walk(command: Any) -> None:
        if isinstance(command, Settable):
            found.setdefault(command.section, []).append(command)
        for child in getattr(command, "commands", {}).values():
            walk(child)

    walk(root)
    return found


def gathered() -> dict[str, Any]:
    """client.defaults(). Raises UsageError when a file is there and cannot be read."""
    try:
        return client.defaults()
    except client.RefusedError as error:
        raise UsageError(error.doing, error.cause, error.hint) from error


class Settings:
    """What files and variables say, checked against the options of ``commands``.

    Raises UsageError, which names file and key, when they say what cannot be.
    """

    def __init__(self, commands: Sections, gathered: Mapping[str, Any]) -> None:
        self._commands = commands
        self._environment: dict[str, str] = gathered["environment"]
        self._given: dict[tuple[str, str], list[dict[str, Setting]]] = {}
        for path, text in gathered["files"]:
            self._read(path, text)

    @property
    def gateways(self) -> list[str]:
        """Names of the gateways that the files describe."""
        return sorted(name for section, name in self._given if section == GATEWAY and name)

    def given(self, section: str, name: str = "") -> dict[str, Any]:
        """The values that are not the options' own defaults, by the name of the parameter."""
        found = self.all(section, name)
        return {key: one.value for key, one in found.items() if one.source != DEFAULT}

    def all(self, section: str, name: str = "") -> dict[str, Setting]:
        """Every option of a section with its value and source, by the name of the parameter."""
        found = {}
        for key, option in self._options(section).items():
            found[key] = Setting(option.default, DEFAULT)
            for part in ("", name) if name else ("",):
                for layer in self._given.get((section, part), ()):
                    found[key] = layer.get(key, found[key])
            if text := self._environment.get(str(option.envvar)):
                raw = option.type.split_envvar_value(text) if option.multiple else text
                value = self._value(section, option, raw, option.envvar, "")
                found[key] = Setting(value, str(option.envvar))
        return found

    def unknown_variables(self) -> list[str]:
        """Variables that begin as ours do and that nothing looks at: a typing error, perhaps."""
        known = {option.envvar for one in self._commands for option in self._options(one).values()}
        return sorted(self._environment.keys() - known - DIRECTORIES)

    def key(self, section: str, parameter: str) -> str:
        """What a parameter of a section is called in files."""
        return _key(self._options(section)[parameter])

    def _options(self, section: str) -> dict[str, Any]:
        commands = self._commands.get(section, ())
        return {str(option.name): option for one in commands for option in one.settable()}

    def _read(self, path: str, text: str) -> None:
        doing = f"use {path}"
        try:
            text.encode()  # a byte that is not UTF-8 has become a lone surrogate
            tables = tomllib.loads(text)
        except UnicodeEncodeError:
            raise UsageError(doing, "it is not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise UsageError(doing, error, "the format is TOML: https://toml.io") from error
        for section, table in tables.items():
            if section not in SECTIONS or not isinstance(table, dict):
                known = ", ".join(f"[{name}]" for name in SECTIONS)
                raise UsageError(doing, f"[{section}] is no section", f"there are {known}")
            if section not in self._commands:
                continue
            parts = {"": table}
            if section == GATEWAY:
                named = {key: part for key, part in table.items() if isinstance(part, dict)}
                parts |= {_name(doing, key): part for key, part in named.items()}
                parts[""] = {key: value for key, value in table.items() if key not in named}
            for name, part in parts.items():
                given = dict(self._table(path, section, name, part))
                self._given.setdefault((section, name), []).append(given)

    def _table(
        self, path: str, section: str, name: str, table: Mapping[str, Any]
    ) -> Iterator[tuple[str, Setting]]:
        options = {_key(option): option for option in self._options(section).values()}
        heading = f"[{section}.{name}]" if name else f"[{section}]"
        for key, raw in table.items():
            if key not in options:
                hint = f"[{section}] may have {', '.join(sorted(options))}"
                raise UsageError(f"use {path}", f"{heading} {key}: no such setting", hint)
            value = self._value(section, options[key], raw, path, f"{heading} {key}: ")
            yield str(options[key].name), Setting(value, path)

    def _value(self, section: str, option: Any, raw: object, source: str, where: str) -> Any:
        """``raw`` as the command takes it."""
        doing = f"use {source}"
        if where and (wanted := _mismatch(option, raw)):  # a variable is always a string
            raise UsageError(doing, f"{where}{raw!r} is not {wanted}")
        try:
            value: object
            if option.multiple:
                value = [option.type(one, option, None) for one in _strings(raw)]
            else:
                value = option.type(raw, option, None)
            if where and option.type.name in ("path", "file"):
                value = str(Path(source).parent / str(value))
            for command in self._commands[section]:
                if command.check is not None:
                    command.check(**{option.name: value})
        except TyperException as error:
            cause = error.format_message().rpartition(": ")[2].rstrip(".")
            raise UsageError(doing, f"{where}{cause}") from error
        except UsageError as error:
            raise UsageError(doing, f"{where}{error.cause}", error.hint) from error
        return value


def _name(doing: str, name: str) -> str:
    try:
        return check_name(GATEWAY, name)
    except UsageError as error:
        raise UsageError(doing, f"[{GATEWAY}.{name}]: {error.cause}") from error


def _key(option: Any) -> str:
    """The long name of an option, without dashes."""
    return str(max(option.opts, key=len)).lstrip("-")


def _variable(section: str, option: Any) -> str:
    return SECTIONS[section] + _key(option).replace("-", "_").upper()


def _mismatch(option: Any, raw: object) -> str:
    """What TOML's type should have been; empty if it is right."""
    if option.multiple:
        right = isinstance(raw, list) and all(isinstance(one, str) for one in raw)
        return "" if right else "a list of strings"
    if option.is_flag:
        return "" if isinstance(raw, bool) else "true or false"
    if option.type.name.startswith(("float", "int")):
        kinds = (int,) if option.type.name.startswith("int") else (int, float)
        right = isinstance(raw, kinds) and not isinstance(raw, bool)
        return "" if right else "a number"
    return "" if isinstance(raw, str) else "a string"


def _strings(raw: object) -> list[str]:
    return list(raw) if isinstance(raw, list) else []


def here() -> Settings:
    """What files and variables say to this process. Raises UsageError."""
    from nsrun.cli.commands import app

    return Settings(sections(typer.main.get_command(app)), gathered())
