"""What Tor tells of its bootstrap."""

from __future__ import annotations

from nsrun.gateway.tor import Progress


def test_progress_never_goes_back() -> None:
    """An answer can be older than an event that came first: the gateway would wait for ever."""
    done = Progress().after({"PROGRESS": "100", "TAG": "done", "SUMMARY": "Done"})
    assert done.after({"PROGRESS": "95", "TAG": "circuit_create"}) is done


def test_what_is_not_told_is_as_it_was() -> None:
    """A warning of the clock has no percentage of its own."""
    assert Progress(30, "conn", "Connecting").after({}) == Progress(30, "conn", "Connecting")
