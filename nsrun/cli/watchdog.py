"""``ttp watchdog``: a service that sees to it that the whole host stays behind Tor."""

from __future__ import annotations

from typing import Annotated

import typer

from nsrun.cli.host import Verbose, ears
from nsrun.errors import ExitCode
from nsrun.host import session
from nsrun.host.session import INTERVAL, HostSpec

Interval = Annotated[
    float,
    typer.Option(
        "--interval", metavar="SECONDS", help="How often to look, told or not: 1 to 3600."
    ),
]

app = typer.Typer(help="See to it that the host stays behind Tor.")


@app.command()
def start(interval: Interval = INTERVAL, verbose: Verbose = False) -> None:
    """Watch the session, as a service; one that looks at another interval is started anew."""
    from nsrun.host import control

    control.watch(HostSpec(interval=interval).interval, ears(verbose))


@app.command()
def stop(verbose: Verbose = False) -> None:
    """Watch it no more."""
    from nsrun.host import control

    control.watch(None, ears(verbose))


@app.command()
def status() -> None:
    """Show whether the session is watched, and by which process. Exit code 1 if not."""
    from nsrun.host import machine

    pid = machine.main_process(session.WATCHDOG)
    print(f"active, process {pid}" if pid else "inactive")
    if not pid:
        raise typer.Exit(ExitCode.FAILED)


@app.command(hidden=True)
def run(interval: Interval = INTERVAL) -> None:
    """Be the watchdog, until there is no session: what the service does."""
    from nsrun.host import control, watchdog

    control.need_root("watchdog run")
    watchdog.main(HostSpec(interval=interval).interval)
