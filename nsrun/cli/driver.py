"""``ttp docker driver``: networks of Docker's own that lead to Tor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nsrun.cli import output
from nsrun.errors import UsageError
from nsrun.spec import check_seconds

app = typer.Typer(help="Docker's network driver: docker network create --driver ttp --internal.")

Root = Annotated[
    Path,
    typer.Option(
        "--root",
        help="Directory of another system, as for systemctl.",
        file_okay=False,
        exists=True,
    ),
]
HERE = Path("/")


@app.command()
def install(root: Root = HERE) -> None:
    """Let systemd listen for Docker, and start the driver when Docker asks."""
    from nsrun.cli.leak import program
    from nsrun.containers import driver_service

    driver_service.install(program(), root)


@app.command()
def uninstall(root: Root = HERE) -> None:
    """Take back what install did. There must be no network of the driver."""
    from nsrun.containers import driver_server, driver_service

    file = driver_server.state_file()
    if root == HERE and (networks := driver_server.read_state(file).networks):
        hint = f"docker network rm {' '.join(key[:12] for key in networks)}"
        raise UsageError("uninstall the driver", "it has networks", hint)
    driver_service.uninstall(root)
    if root == HERE:
        file.unlink(missing_ok=True)
        file.with_suffix(".lock").unlink(missing_ok=True)


@app.command()
def serve(
    bootstrap_timeout: Annotated[
        float,
        typer.Option(
            "--bootstrap-timeout", min=0, help="Seconds that a container may wait for Tor."
        ),
    ] = 60.0,
) -> None:
    """Be the driver: answer Docker until SIGTERM."""
    import logging

    from nsrun.containers import driver_server

    check_seconds("--bootstrap-timeout", bootstrap_timeout)
    if os.geteuid() != 0:
        raise UsageError("start the driver", "only root can", "use sudo")
    logging.basicConfig(level=logging.INFO, format="ttp: %(message)s")
    signal.signal(signal.SIGTERM, _end)
    driver_server.serve(driver_server.SOCKET, bootstrap_timeout)


def _end(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the driver's networks and containers. Exit code 1 if one is not behind Tor alone."""
    from nsrun.containers import driver_client

    found = driver_client.status()
    containers, networks = found["containers"], found["networks"]
    if as_json:
        output.as_json(found)
    else:
        counts = [sum(one["network"] == key for one in containers) for key in networks]
        rows = [
            (key[:12], one["gateway"], one["isolate"], str(count))
            for (key, one), count in zip(networks.items(), counts, strict=True)
        ]
        output.table(("NETWORK", "GATEWAY", "ISOLATE", "CONTAINERS"), rows)
        keys = ("name", "network", "address", "state")
        if containers:
            print()
            rows = [tuple(one[key] for key in keys) for one in containers]
            output.table(
                ("CONTAINER", "NETWORK", "ADDRESS", "STATE"),
                [(name, network[:12], address, state) for name, network, address, state in rows],
            )
    if any(one["state"].startswith("LEAKS") for one in containers):
        raise typer.Exit(1)
