"""Runs another program: an argument list, never a shell; a bounded output; a timeout that ends all it started."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from bin_proxy.errors import host_errors

_KEPT = 1024 * 1024
# Until it executes, a child holds open what our other threads write, and nobody can run that (ETXTBSY): one at a time.
_starting = threading.Lock()
_running: set[int] = set()


@dataclass(frozen=True)
class Finished:
    """`code` as in subprocess (negative: killed by that signal), None where the time was over; `ending` says it."""

    code: int | None
    stdout: str
    ending: str


def _environment() -> dict[str, str]:
    """Ours, less our secrets and what steers a Python interpreter: supervisorctl is a program of another one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "BIN_MANAGER_"))}
    kept.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return kept


def run(arguments: Sequence[str], timeout: float) -> Finished:
    """Run a program to its end.

    Args:
        arguments, timeout: the program and its arguments; seconds after which its whole process group is killed.

    Raises:
        HostError: it cannot be started, or not be waited for.
    """
    from subprocess import DEVNULL, PIPE, Popen  # not needed in a minute in which nothing changed

    deadline, ended = time.monotonic() + timeout, False
    output = bytearray(), bytearray()
    with host_errors(f"run {arguments[0]}"), _starting:
        # A folder that holds no supervisord.conf, which supervisorctl would read; a session of its own, so that Ctrl-C
        # at the terminal does not kill a restart half-way and a timeout reaches its children.
        child = Popen(
            arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, cwd="/", env=_environment(), start_new_session=True
        )
    with host_errors(f"run {arguments[0]}"), child:
        _running.add(child.pid)
        try:
            while not ended and time.monotonic() < deadline:
                time.sleep(0.02)
                # Asked before reading, so that one more read gets its last words: a pipe holds less than that. Its end
                # is not waited for, as a grandchild may keep the pipe open.
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
                for pipe, kept in zip((child.stdout, child.stderr), output, strict=True):
                    assert pipe is not None
                    os.set_blocking(pipe.fileno(), False)
                    kept += (pipe.read(_KEPT) or b"")[: _KEPT - len(kept)]
        finally:
            _kill(child.pid)  # before it is reaped: afterwards its number could be somebody else's
            _running.discard(child.pid)
    stdout, stderr = (kept.decode(errors="replace") for kept in output)
    last = (stderr.strip() or stdout.strip() or "it printed nothing").splitlines()[-1].strip()[:300]
    ending = f"exited {child.returncode}: {last}" if ended else f"did not end within {timeout:g} s"
    return Finished(child.returncode if ended else None, stdout, ending)


def _kill(session: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)


def kill_all() -> None:
    """End whatever `run` is still waiting for in other threads."""
    for pid in list(_running):
        _kill(pid)
