"""What can go wrong, grouped by who is at fault; `kind` tells one trouble of a binary from another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class BinProxyError(Exception):
    """Root of all that bin-proxy raises on purpose; str() is one line for the operator."""

    kind = "host"


class UsageError(BinProxyError):
    """The command line, the settings or the manifest are at fault (one line for each); nothing was touched."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class Busy(BinProxyError):
    """Another run holds the lock, `since` (Unix time)."""

    def __init__(self, since: float) -> None:
        super().__init__("another bin-proxy is at work")
        self.since = since


class BinManagerError(BinProxyError):
    """bin-manager answered, but not with a release; the host is untouched."""

    kind = "answer"


class Unreachable(BinManagerError):
    """bin-manager, or the way there, did not answer; the host is untouched."""

    kind = "unreachable"


class CorruptDownload(BinManagerError):
    """The bytes are not the release they should be; the host is untouched."""

    kind = "corrupt"


class HostError(BinProxyError):
    """The host is at fault: a system call, supervisorctl or supervisord. Never a reason to hold a release."""


class SupervisorError(HostError):
    """supervisorctl cannot be run, or supervisord cannot be reached or does not know the service."""

    kind = "supervisor"


class Stuck(SupervisorError):
    """A service neither stops nor comes up in time, though supervisord answers."""


class BackupLost(HostError):
    """A release to go back to is kept no more, or damaged: no other try will bring it back."""


class ReleaseError(BinProxyError):
    """The release is at fault: it fails its verification, does not come up or does not stay up."""

    kind = "release"


class Interrupted(BaseException):
    """A signal asks to end. Not an Exception, so that no handler of errors takes it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def host_error(doing: str, error: Exception) -> HostError:
    """Say what failed, above all a system call, in one line: what was being done, to which file, why it failed."""
    file = getattr(error, "filename", None)
    where = f" ({file})" if file and str(file) not in doing else ""
    return HostError(f"cannot {doing}: {getattr(error, 'strerror', None) or error}{where}")


@contextmanager
def host_errors(doing: str) -> Iterator[None]:
    """Turn the OSError of a system call within it into a HostError; see `host_error`."""
    try:
        yield
    except OSError as error:
        raise host_error(doing, error) from error


def cause(error: BaseException) -> str:
    """The words of the innermost cause: requests and urllib3 wrap what tells something in several that do not."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    words = re.sub(r"//[^/@\s]*@", "//***@", getattr(error, "strerror", None) or str(error))  # a proxy's password
    return re.sub(r"^\[[^]]*\] ", "", words)[:200] or type(error).__name__


def clean(text: str) -> str:
    """One event is one line, and no terminal obeys it: whatever is not printable is escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
