"""Every command of ttp, in the order of its help."""

from __future__ import annotations

from nsrun.cli import (
    CHECK_LEAK,
    check,
    completion,
    config,
    docker,
    doctor,
    gateway,
    host,
    lab,
    leak,
    root,
    rules,
    run,
    watchdog,
    workload,
)

app = root()
app.add_typer(gateway.app, name="gateway")
app.add_typer(lab.app, name="lab")
app.add_typer(docker.app, name="docker")
app.add_typer(config.app, name="config")
app.add_typer(watchdog.app, name="watchdog")
run.register(app)
app.command("plan", cls=run.CLASS, context_settings=run.CONTEXT)(run.takes_request(run.plan))
workload.register(app)
host.register(app)
app.command()(doctor.doctor)
app.command()(rules.rules)
app.command()(completion.completion)
app.command()(leak.leaktest)
app.command(CHECK_LEAK)(check.check_leak)
