"""``python -m nsrun.doctor``: the trials, in a process that takes all that they made with it.

One line of JSON on standard output for each finding.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from nsrun import linux
from nsrun.doctor import Finding
from nsrun.doctor.trials import run
from nsrun.facts import search_path


def tell(finding: Finding) -> None:
    sys.stdout.write(json.dumps(asdict(finding)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    os.environ["PATH"] = search_path()
    run(tell)
