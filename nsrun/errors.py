"""Errors and exit codes.

NsrunError              what we were doing, why it failed, what to do about it
├── UsageError          the request itself is wrong; nothing was changed
├── MissingError        a program or kernel feature that we need is not there
├── GatewayError        the gateway did not come up, or does not do what it should
│   └── AbsentError     it is not up, so that the request is wrong
└── VerifyError         the kernel does not hold what we told it to hold; we stay closed
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every ``ttp`` command; ``ttp run`` otherwise passes the command's own on.

    125 to 127 follow env(1), docker-run(1) and POSIX (XCU 2.8.2).
    """

    OK = 0
    FAILED = 1
    USAGE = 2
    UNVERIFIED = 3
    RUN_FAILED = 125
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127
    INTERRUPTED = 130


class NsrunError(Exception):
    """A failure that a person should read: ``ttp: cannot <doing>: <cause>`` and a hint."""

    code = ExitCode.FAILED

    def __init__(self, doing: str, cause: object, hint: str = "") -> None:
        super().__init__(doing, str(cause), hint)
        self.doing, self.cause, self.hint = doing, str(cause), hint

    def __str__(self) -> str:
        return f"cannot {self.doing}: {self.cause}"


class UsageError(NsrunError):
    code = ExitCode.USAGE


class MissingError(NsrunError):
    pass


class GatewayError(NsrunError):
    pass


class AbsentError(GatewayError):
    code = ExitCode.USAGE


class VerifyError(NsrunError):
    pass
