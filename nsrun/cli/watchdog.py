"""``ttp watchdog``: a service that sees to it that the whole host stays behind Tor."""

from __future__ import annotations

import typer

from nsrun.cli.host import Verbose, ears
from nsrun.errors import ExitCode
from nsrun.host import session

app = typer.Typer(help="See to it that the host stays behind Tor.")


@app.command()
def start(verbose: Verbose = False) -> None:
    """Watch the session, as a service."""
    from nsrun.host import control

    control.watch(on=True, ears=ears(verbose))


@app.command()
def stop(verbose: Verbose = False) -> None:
    """Watch it no more."""
    from nsrun.host import control

    control.watch(on=False, ears=ears(verbose))


@app.command()
def status() -> None:
    """Show whether the session is watched, and by which process. Exit code 1 if not."""
    from nsrun.host import machine

    pid = machine.main_process(session.WATCHDOG)
    print(f"active, process {pid}" if pid else "inactive")
    if not pid:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def run() -> None:
    """Be the watchdog, until there is no session: what the service does."""
    from nsrun.host import control, watchdog

    control.need_root("watchdog run")
    watchdog.main()
