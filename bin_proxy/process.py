"""Runs another program: an argument list, never a shell; a bounded output; a timeout that ends all it started."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from bin_proxy.errors import host_error

if TYPE_CHECKING:
    import subprocess

_KEPT = 1024 * 1024
_running: set[int] = set()


@dataclass(frozen=True)
class Finished:
    """`code` as in subprocess (negative: killed by that signal), None where the time was over."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def last_words(self) -> str:
        """The last line it printed, for an error message."""
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1].strip()[:300] if lines else "it printed nothing"


def _environment() -> dict[str, str]:
    """Ours, less our secrets and what steers a Python interpreter: supervisorctl is a program of another one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "BIN_MANAGER_"))}
    kept.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return kept


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    import subprocess  # not needed in a minute in which nothing changed

    for patience in range(100):
        try:
            # A folder that holds no supervisord.conf, which supervisorctl would read; a session of its own, so that
            # Ctrl-C at the terminal does not kill a restart half-way and a timeout reaches its children.
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            # Another thread's child may hold the file open for writing between its fork and its exec.
            if error.errno != errno.ETXTBSY or patience == 99:
                raise host_error(f"run {arguments[0]}", error) from error
            time.sleep(0.02)
    raise AssertionError("the loop returns or raises")


def run(arguments: Sequence[str], timeout: float) -> Finished:
    """Run a program to its end.

    Args:
        arguments: the program and its arguments.
        timeout: seconds after which it, and all it started in its session, is killed.

    Raises:
        HostError: it cannot be started.
    """
    deadline = time.monotonic() + timeout
    child = _start(arguments)
    _running.add(child.pid)
    output: dict[IO[bytes] | None, bytearray] = {child.stdout: bytearray(), child.stderr: bytearray()}
    try:
        with selectors.DefaultSelector() as selector:
            for pipe in (child.stdout, child.stderr):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, output[pipe])
            while not (ended := _has_ended(child.pid)) and time.monotonic() < deadline:
                if selector.get_map():
                    _drain(selector, min(0.2, deadline - time.monotonic()))
                else:
                    time.sleep(0.02)
            _drain(selector, 0)
    finally:
        # Before it is reaped: afterwards its number could be somebody else's.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        _running.discard(child.pid)
        for pipe in output:
            if pipe is not None:
                pipe.close()
    stdout, stderr = (bytes(kept).decode(errors="replace") for kept in output.values())
    return Finished(code if ended else None, stdout, stderr)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _drain(selector: selectors.BaseSelector, wait: float) -> None:
    """Read what the pipes hold, up to a bound a call; what goes beyond `_KEPT` is dropped."""
    for _ in range(64):
        ready = selector.select(max(0.0, wait))
        wait = 0
        for key, _ in ready:
            chunk = os.read(key.fd, 65536)
            if chunk:
                key.data.extend(chunk[: _KEPT - len(key.data)])
            else:
                selector.unregister(key.fileobj)
        if not ready:
            return


def kill_all() -> None:
    """End whatever `run` is still waiting for in other threads."""
    for pid in list(_running):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
