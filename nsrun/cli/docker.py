"""``ttp docker``: containers behind Tor."""

from __future__ import annotations

import typer

from nsrun.cli import driver

app = typer.Typer(help="Containers behind Tor.")
app.add_typer(driver.app, name="driver")
