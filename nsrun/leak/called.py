"""Call a function that was pickled, and send back what it returns or raises.

    python -m nsrun.leak.called      in a workload, started by torified.call()

Request on standard input: sys.path, then function and arguments. Answer on standard output: what
was returned, or None, and what was raised, or None, with its traceback. What the function prints
goes to standard error.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback


def main() -> None:
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        sys.path[:] = pickle.load(sys.stdin.buffer)  # noqa: S301  from our own parent
        returned: object = None
        raised: BaseException | None = None
        trace = ""
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)  # noqa: S301  as above
            returned = function(*args, **kwargs)
        except BaseException as error:  # SystemExit, too: the parent raises it again
            raised, trace = error, traceback.format_exc()
        answer.write(_pickled(returned, raised, trace))


def _pickled(returned: object, raised: BaseException | None, trace: str) -> bytes:
    try:
        found = pickle.dumps((returned, raised, trace))
        pickle.loads(found)  # noqa: S301  our own; exceptions may pickle and not come back
    except Exception as error:  # a __reduce__ may raise anything
        refused: Exception = TypeError(f"what it returned cannot be sent back: {error}")
        if raised is not None:  # an HTTPError, for instance, holds an open file
            refused = RuntimeError(f"{type(raised).__name__}: {raised}")
        return pickle.dumps((None, refused, trace))
    return found


if __name__ == "__main__":
    main()
