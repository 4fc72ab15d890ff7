import sys
from pathlib import Path

import pytest
import weather


@pytest.mark.no_leaks
def test_a_forecast(torified):
    """As a function, in a process behind Tor."""
    assert torified.call(weather.forecast, "london").startswith("london: ")


@pytest.mark.no_leaks
def test_the_program(torified):
    """As a command."""
    done = torified.run([sys.executable, Path(weather.__file__)], timeout=30)
    assert done.stdout.startswith("london: ")
