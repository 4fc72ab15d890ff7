"""Start and stop of the whole host: one plan forwards, the same one back, whoever takes it back.

The record at RECORD says that there is a session, and all that its plan is made of. It is written
before the first effect and removed after the last, so every command finds out, under one lock, what
another one that was killed has left.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nsrun import paths
from nsrun.errors import NsrunError, UsageError, VerifyError
from nsrun.host import external, facts, log, machine, oracle, session, tor
from nsrun.host.plan import has_bypass, locked_rules, policy, start_steps, tor_text
from nsrun.host.session import HostSpec, Session
from nsrun.host.steps import CloseHost, CutHost, FreeUsers, HostStep, OpenHost, TorifyHost

PATIENCE = 5.0  # seconds for the watchdog to end a look, and what it mends
POLL = 0.05  # seconds; nothing tells when a lock is free, but by waiting without end
Tell = Callable[[str], None]


def nobody(_words: str) -> None:
    """Who does not listen."""


@dataclass(frozen=True)
class Ears:
    """Who is told how it goes on, and who every single effect."""

    words: Tell = nobody
    effects: Tell = nobody


@dataclass(frozen=True)
class Outcome:
    """``seen`` is how Tor's own service saw us; ``fresh`` that the session was not up before."""

    session: Session
    seen: oracle.Seen
    fresh: bool


def current() -> Session | None:
    """The session that there is, in whatever state; needs no privilege. Raises NsrunError."""
    try:
        return session.read(Path(session.RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        hint = f"the `ttp` that wrote {session.RECORD} can stop it"
        raise NsrunError("read the record of the session", error, hint) from error


def start(spec: HostSpec, ears: Ears) -> Outcome:
    """Put the host behind Tor, and look whether it is. Raises NsrunError: then it is as before.

    One that is up already, with the same options, is looked at and left alone.
    """
    need_root("start")
    with lock(), _log(ears) as told:
        found = current()
        if found is not None and found.state == "up":
            return _again(found, spec, told)
        if found is not None and found.state not in ("closed", "locked"):
            told.words("an earlier command was killed: what it left is taken back, closed")
        return _start(spec, found, told)


def close(ears: Ears) -> None:
    """Close the network before there is one, for a start that is to come; stop opens it.

    Nothing but loopback, answers and the machine's own address is let through. Raises NsrunError.
    Another command is waited for, however long: to fail would be an emergency (ttp-closed.service).
    """
    need_root("start")
    with lock(math.inf), _log(ears) as told:
        if current() is None:
            made = Session(HostSpec(), facts.probe(HostSpec()), os.getpid(), time.time(), "closed")
            _close(made, told)


def _close(made: Session, told: Ears) -> None:
    write_record(made)
    machine.HostMachine(told.effects).do(CloseHost(locked_rules(made)))


def restart(spec: HostSpec, ears: Ears) -> Outcome:
    """Another session in the place of the one that there is, if any, without a moment between."""
    need_root("restart")
    with lock(), _log(ears) as told:
        return _start(spec, current(), told)


def _start(spec: HostSpec, before: Session | None, told: Ears) -> Outcome:
    _examine(spec, before)
    made = before
    try:
        if before is not None:
            _take_back(before, told, stay_closed=True)
        facts.check_ports(spec)
        for name in facts.absent_interfaces(spec.gateway_for):
            told.words(f"{name} is not there yet: what arrives there is caught once it is")
        helpers = facts.helpers(spec.bridges)
        found = facts.probe(spec)
        facts.check_resolvers(spec, found)
        barred = {*found.only_uids, *(before.barred if before else ())}
        made = Session(spec, found, os.getpid(), time.time(), barred=tuple(sorted(barred)))
        log.write(logging.INFO, "a session begins", spec.log_format)
        for words in external.remarks(made) if spec.external else ():
            told.words(words)
        write_record(made)
        host = machine.HostMachine(told.effects)
        for step in start_steps(made, helpers):
            if isinstance(step, TorifyHost):
                # Tor 0.4.9.11 dies of a connection to a relay, another Tor's, that it gets sooner
                _await_bootstrap(spec, told)
                made = replace(made, redirected=True)
                write_record(made)
            host.do(step)
            if isinstance(step, TorifyHost):
                made = replace(made, rules=host.rules)
    except BaseException:
        if before is not None and made is not None:
            # behind Tor or closed, perhaps by an end that nobody saw: nobody has asked to open it
            told.words("it failed: the network stays closed, until `ttp start` or `ttp stop`")
            _take_back(made, told, stay_closed=True)
            _close(before.at("closed", barred=made.barred), told)
        elif made is not None:
            told.words("it failed: all is taken back")
            _take_back(made, told)
        raise
    return _verified(made, told, fresh=True)


def _examine(spec: HostSpec, before: Session | None) -> None:
    """What is wrong with the request is said while all is as it was. Raises NsrunError."""
    facts.check_gateway_for(spec.gateway_for)
    found = facts.probe(spec)
    if before is None or before.state == "closed":  # else our own resolv.conf is what is there
        facts.check_resolvers(spec, found)
    if before is None or before.state == "closed" or before.spec.external:
        facts.check_ports(spec)
    else:  # its own Tor gives these back
        facts.check_ports(spec, ours=(before.spec.trans_port, before.spec.dns_port))
    made = Session(spec, found, os.getpid(), time.time())
    policy(made)  # whose parts may contradict each other, as who is exempt and Tor's user
    if not spec.external:
        facts.check_torrc(found, tor_text(made, facts.helpers(spec.bridges)))


def _await_bootstrap(spec: HostSpec, told: Ears) -> None:
    if spec.external:
        told.words("waiting until Tor answers names")
        external.await_bootstrap(spec)
    else:
        tor.await_bootstrap(
            spec.bootstrap_timeout,
            lambda percent, words: told.words(f"Tor {percent} %: {words}"),
        )


def stop(ears: Ears, *, restore_only: bool = False) -> None:
    """Give the network back; nothing that went through Tor goes on in clear.

    With ``restore_only`` also where no record tells what there is. Raises NsrunError: then the host
    stays closed, and stop can be tried again.
    """
    need_root("stop")
    with lock(), _log(ears) as told:
        found = _recorded_or_lost() if restore_only else current()
        if found is None:
            raise UsageError("stop", "the host is not behind Tor", "ttp status")
        _take_back(found, told)


def _recorded_or_lost() -> Session:
    """The session; where nobody can tell which, one with all that any has, at its names."""
    with suppress(NsrunError):
        if found := current():
            return found
    trans_port, dns_port = facts.ports()
    spec = HostSpec(watchdog=True, gateway_for=("any",), trans_port=trans_port, dns_port=dns_port)
    helpers = "127.0.0.1", "::1"  # whoever the resolvers were, their files have one name
    there = replace(facts.probe(spec), made=facts.ours_alone(), tor_resolvers=helpers)
    return Session(spec, there, os.getpid(), time.time(), "stopping", redirected=True)


def refresh() -> None:
    """New circuits for new connections of the host. Raises NsrunError."""
    need_root("refresh")
    if _need_session("refresh").spec.external:
        hint = "SIGNAL NEWNYM by its own control port"
        raise UsageError("refresh the session", "its Tor is somebody else's", hint)
    tor.renew()


def watch(interval: float | None, ears: Ears) -> None:
    """Start the watchdog of the session, that looks every so many seconds, or stop it: None.

    One that looks at another interval is stopped first. Raises NsrunError.
    """
    doing = "watchdog stop" if interval is None else "watchdog start"
    need_root(doing)
    with lock(), _log(ears) as told:
        found = _looked_at(_need_session(doing))
        spec = replace(found.spec, watchdog=True, interval=interval or session.INTERVAL)
        *_, step = steps_of(found.at(found.state, spec=spec))  # it is the last
        inverse = step.undo()
        host = machine.HostMachine(told.effects)
        if interval != found.spec.interval and inverse is not None:
            host.do(inverse)
        write_record(found.at(found.state, spec=replace(spec, watchdog=interval is not None)))
        if interval is not None:
            host.do(step)


def check(ears: Ears) -> Outcome:
    """Look whether the host is behind Tor, from the rules to the exit. Raises NsrunError.

    Nobody is asked before the rules were read back, so that it is asked by Tor.
    """
    need_root("check")
    with lock(), _log(ears) as told:
        return _verified(_need_session("check"), told, fresh=False)


def verified_rules(doing: str) -> Session:
    """The session, if its rules are as they were loaded: somebody may be asked, by Tor."""
    need_root(doing)
    found = _need_session(doing)
    machine.verify(found.rules)
    return found


def need_bypass() -> None:
    """Raises UsageError unless a command can be let past Tor now, by us."""
    need_root("bypass")
    found = _need_session("bypass")
    if found.spec.own == "none":
        raise UsageError("bypass Tor", "what this machine itself sends is left alone anyway")
    if found.spec.own == "onion":
        raise UsageError("bypass Tor", "with --onion-only all but .onion does", "leave it out")
    if not has_bypass(found):
        raise UsageError(
            "bypass Tor",
            "this machine has control groups of version 1",
            "--bypass-user and --bypass-group need none",
        )


def need_root(doing: str) -> None:
    if os.geteuid() != 0:
        raise UsageError(f"{doing} for the whole host", "only root can", f"sudo ttp {doing}")


def _need_session(doing: str) -> Session:
    found = current()
    if found is None:
        raise UsageError(f"use ttp {doing}", "the host is not behind Tor", "ttp start")
    if found.state != "up":
        raise UsageError(f"use ttp {doing}", f"the host is {found.state}", "ttp restart")
    return found


def _again(found: Session, spec: HostSpec, told: Ears) -> Outcome:
    asked = replace(spec, bridges=(), torrc="")
    if found.spec.watchdog:  # started since, perhaps
        asked = replace(asked, watchdog=True, interval=found.spec.interval)
    if asked != found.spec or not _has_torrc(found, spec):
        raise UsageError(
            "start with these options", "it is up with others", "ttp restart, with the options"
        )
    return _verified(found, told, fresh=False)


def _has_torrc(found: Session, spec: HostSpec) -> bool:
    """Whether its torrc, if there is one of ours, is that of ``spec``, but for the lines' order."""
    if spec.external:
        return True
    text = tor_text(replace(found, spec=spec), facts.helpers(spec.bridges))
    try:
        there = Path(session.TORRC).read_text(errors="replace")
    except FileNotFoundError:
        return False
    return set(there.splitlines()) == set(text.splitlines())


def _looked_at(found: Session) -> Session:
    """With a Tor that is somebody else's as it is now: it may have been started again since."""
    if not found.spec.external:
        return found
    try:
        return found.at(found.state, facts=facts.with_theirs(found.facts, found.spec))
    except UsageError as error:
        raise VerifyError("rely on the Tor of the session", error.cause, error.hint) from error


def _verified(found: Session, told: Ears, *, fresh: bool) -> Outcome:
    machine.verify(found.rules)
    if not fresh:
        found = _looked_at(found)
    seen = oracle.ask(policy(found))
    why = seen.error or f"seen as {seen.address}, which is not Tor's"
    told.effects(f"verified: seen as {seen.address}" if seen.is_tor else f"not verified: {why}")
    found = found.at("up", exit=seen.address if seen.is_tor else "")
    write_record(found)
    return Outcome(found, seen, fresh)


def steps_of(found: Session) -> tuple[HostStep, ...]:
    """The plan of a session as its record has it: without bridges, and so not for Tor to read."""
    return start_steps(found, {})


def _take_back(found: Session, told: Ears, *, stay_closed: bool = False) -> None:
    """Every step's undo, from the last; the first that fails ends it, and the host stays closed.

    With ``stay_closed`` what keeps it closed is left as it is, and the record stays, for another
    start.
    """
    write_record(found.at("stopping"))
    host = machine.HostMachine(told.effects)
    for step in reversed(steps_of(found)):
        inverse = step.undo()
        if isinstance(inverse, CutHost) and not found.redirected:
            continue  # of connections that were there before, none went through Tor
        if isinstance(inverse, OpenHost | FreeUsers) and stay_closed:
            continue
        if inverse is not None:
            host.do(inverse)
    if stay_closed:
        return
    Path(session.RECORD).unlink(missing_ok=True)


def write_record(found: Session) -> None:
    """Whole or not at all: who is killed here leaves the one of before."""
    new = f"{session.RECORD}.new"
    Path(new).unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
        os.fchmod(file.fileno(), 0o644)  # `ttp status` needs no privilege
        file.write(found.as_text())
    Path(new).rename(session.RECORD)


@contextmanager
def lock(seconds: float = PATIENCE) -> Iterator[None]:
    """One command at a time changes the host; the lock goes with the process.

    Raises NsrunError if another one holds it for longer than ``seconds``.
    """
    paths.make_private(session.RUNTIME)
    directory = os.open(session.RUNTIME, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + seconds
    try:
        while not _is_ours(directory):
            if time.monotonic() >= deadline:
                hint = "wait until it has ended"
                raise NsrunError("change the host", "another `ttp` is at it", hint)
            time.sleep(POLL)  # the interval of the poll
        yield
    finally:
        os.close(directory)


def _is_ours(directory: int) -> bool:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _log(ears: Ears) -> Iterator[Ears]:
    """What is told goes into the log as well; of a step its first line is enough."""

    def kept(tell: Tell) -> Tell:
        def say(words: str) -> None:
            log.write(logging.INFO, words.partition("\n")[0].removesuffix(" <<'EOF'"))
            tell(words)

        return say

    try:
        yield Ears(kept(ears.words), kept(ears.effects))
    except NsrunError as error:
        log.write(logging.ERROR, str(error))
        raise


def note(words: str) -> None:
    """A line of the log, by who holds the lock."""
    log.write(logging.INFO, words)
