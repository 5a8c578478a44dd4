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
from typing import TYPE_CHECKING

from bin_proxy.errors import host_error, host_errors

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

    patience = time.monotonic() + 2
    while True:
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
            if error.errno != errno.ETXTBSY or time.monotonic() > patience:
                raise host_error(f"run {arguments[0]}", error) from error
            time.sleep(0.02)


def run(arguments: Sequence[str], timeout: float) -> Finished:
    """Run a program to its end.

    Args:
        arguments, timeout: the program and its arguments; seconds after which its whole process group is killed.

    Raises:
        HostError: it cannot be started.
    """
    deadline, ended = time.monotonic() + timeout, False
    output = bytearray(), bytearray()
    with host_errors(f"run {arguments[0]}"), selectors.DefaultSelector() as selector, _start(arguments) as child:
        try:
            _running.add(child.pid)
            for pipe, kept in zip((child.stdout, child.stderr), output, strict=True):
                assert pipe is not None
                selector.register(pipe, selectors.EVENT_READ, kept)
            while not ended and time.monotonic() < deadline:
                # Asked before reading, so that one more read gets its last words: a pipe holds less than that. Its end
                # is not waited for, as a grandchild may keep the pipe open.
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
                for key, _ in selector.select(0.02):
                    if chunk := os.read(key.fd, _KEPT):
                        key.data.extend(chunk[: _KEPT - len(key.data)])
                    else:
                        selector.unregister(key.fileobj)
        finally:
            _kill(child.pid)  # before it is reaped: afterwards its number could be somebody else's
            _running.discard(child.pid)
    stdout, stderr = (kept.decode(errors="replace") for kept in output)
    return Finished(child.returncode if ended else None, stdout, stderr)


def _kill(session: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)


def kill_all() -> None:
    """End whatever `run` is still waiting for in other threads."""
    for pid in list(_running):
        _kill(pid)
