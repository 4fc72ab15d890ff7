import sys
from pathlib import Path

import mended
import pytest


@pytest.mark.no_leaks
def test_a_forecast(torified):
    """As a function, in a process behind Tor."""
    assert torified.call(mended.forecast, "london").startswith("london: ")


@pytest.mark.no_leaks
def test_the_program(torified):
    """As a command."""
    done = torified.run([sys.executable, Path(mended.__file__)], timeout=30)
    assert done.stdout.startswith("london: ")
