"""What supervisorctl says: whatever `restart` prints and exits with, `status` gives the verdict (supervisor 4.3.0)."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from bin_proxy.errors import HostError, ReleaseError, Stuck, SupervisorError
from bin_proxy.host.process import Finished, run
from bin_proxy.policy.model import Binary

_STATUS = re.compile(r"(\S+) +(STOPPED|STARTING|RUNNING|BACKOFF|STOPPING|EXITED|FATAL|UNKNOWN)\b *(pid (\d{1,9})|)(.*)")
_LEFT_STOPPED = 5.0
DEAD = ("FATAL", "UNKNOWN", "BACKOFF", "EXITED")  # the worst first
DOWN = ("STOPPED", "STOPPING")
TRYING = ("STARTING", "RUNNING", "BACKOFF")


class Process(NamedTuple):
    """One line of `supervisorctl status`: its full name (`group:name` or `name`), state, pid and the rest in words."""

    name: str
    state: str
    pid: int | None
    words: str


def parse_status(output: str) -> dict[str, Process]:
    """Read what `supervisorctl status` prints.

    Raises:
        SupervisorError: it says something else, such as that supervisord cannot be reached.
    """
    found = {}
    for line in filter(str.strip, output.splitlines()):
        match = _STATUS.fullmatch(line.strip())
        if not match:
            raise SupervisorError(f"supervisord cannot be asked: {line.strip()[:200]}")
        found[match[1]] = Process(match[1], match[2], int(match[4] or 0) or None, match[3] + match[5])
    return found


def choose(processes: Mapping[str, Process], services: tuple[str, ...] | None, binary: str) -> list[Process]:
    """The processes that belong to a binary.

    Args:
        processes: all that supervisord knows.
        services, binary: the manifest's `service`, None to find them by the binary's name; and that name.

    Raises:
        SupervisorError: supervisord does not know a service that is named.
    """
    # A group's program of the group's own name is listed bare; a program with numprocs > 1 is a group, too.
    full = {name if ":" in name else f"{name}:{name}": process for name, process in processes.items()}
    found: list[Process] = []
    for service in (binary,) if services is None else services:
        forms = [service] if ":" in service else [f"{service}:{service}", f"{service}:*"]
        if services is None:
            forms.append(f"*:{binary}")
        names = next(filter(None, (fnmatch.filter(full, form) for form in forms)), [])
        if not names and services is not None:
            raise SupervisorError(f"supervisord knows no {service!r}: correct the manifest, or supervisorctl update")
        found += [full[name] for name in names if full[name] not in found]
    return found


def executes(pid: int | None, file: os.stat_result) -> bool:
    """Whether a process executes this very file (proc_pid_exe(5)); of a script, its interpreter is what is executed."""
    with suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/{pid}/exe"), file)
    return False


class Supervisor:
    """supervisorctl as a subprocess.

    Args:
        command: supervisorctl and its arguments; empty where the host has none.
        restart_timeout: seconds for one `restart`.
        tell: called with one line about each call, for --verbose.
    """

    def __init__(self, command: tuple[str, ...], restart_timeout: float, tell: Callable[[str], None]) -> None:
        self._command, self._restart_timeout, self._tell = command, restart_timeout, tell
        self.typed = shlex.join(command)  # as a person calls it
        self._listing: dict[str, Process] | SupervisorError | None = None

    def of(self, binary: Binary, *, fresh: bool = False) -> list[Process]:
        """The processes of a binary; none where it has no service.

        Args:
            binary, fresh: the entry; whether to ask supervisord now, or what it said first in this run will do.

        Raises:
            SupervisorError: supervisord cannot be asked, or does not know a service that is named.
        """
        if binary.services == () or (binary.services is None and not self._command):
            return []
        if fresh or self._listing is None:
            try:
                self._listing = self.processes()
            except SupervisorError as error:
                way_out = '"service": false in the manifest if there is none'
                self._listing = SupervisorError(f"{error}; nothing is updated without it ({way_out})")
        if isinstance(self._listing, SupervisorError):
            raise self._listing
        return choose(self._listing, binary.services, binary.name)

    def processes(self, names: Collection[str] = ()) -> dict[str, Process]:
        """The processes called `names`, or all, in one call.

        Raises:
            SupervisorError: supervisorctl cannot be run, supervisord cannot be reached or does not know one of them.
        """
        done = self._run(["status"], min(30.0, self._restart_timeout))
        if not done.stdout.strip() and done.code != 0:
            raise SupervisorError(f"supervisorctl status {done.ending}")
        found = parse_status(done.stdout)
        if gone := [name for name in names if name not in found]:
            raise SupervisorError(f"supervisord no longer knows {gone[0]}")
        return {name: found[name] for name in names or found}

    def settled(self, binary: Binary) -> list[Process]:
        """The processes of a binary once nobody is stopping one, and whoever restarts one has begun to start it.

        Raises:
            SupervisorError: as for `of`; `Stuck` if one does not stop within RESTART_TIMEOUT.
        """
        self._await_stops(lambda: self.of(binary, fresh=True))
        return self.of(binary)

    def _await_stops(self, look: Callable[[], Collection[Process]]) -> None:
        deadline, waited = time.monotonic() + self._restart_timeout, False
        while stopping := [process.name for process in look() if process.state == "STOPPING"]:
            if time.monotonic() > deadline:
                raise Stuck(f"{stopping[0]} does not stop within {self._restart_timeout:g} s")
            waited = True
            time.sleep(0.3)
        if waited:  # `supervisorctl restart` is a stop and then a start
            time.sleep(1)
            look()

    def restart(self, names: Collection[str]) -> bool:
        """Restart processes, after waiting for those that are being stopped; what becomes of them, `watch` tells.

        Returns:
            whether supervisorctl says of each that it started.

        Raises:
            Stuck: not within RESTART_TIMEOUT.
            SupervisorError: supervisorctl cannot be run, or supervisord cannot be asked.
        """
        self._await_stops(lambda: self.processes(names).values())
        done = self._run(["restart", *names], self._restart_timeout, Stuck)
        return len(re.findall(r": started\s*$", done.stdout, re.MULTILINE)) == len(names)

    def stop(self, names: Collection[str]) -> None:
        """Stop processes that still try to start.

        Raises:
            SupervisorError: supervisorctl cannot be run or does not end.
        """
        self._run(["stop", *names], self._restart_timeout)

    def watch(
        self,
        before: Mapping[str, int],
        window: float,
        probe: Callable[[float], str | None] | None,
        probe_within: float,
        *,
        started: bool,
    ) -> dict[str, int]:
        """Wait until processes have run under one pid each for the whole window, and are healthy at its end.

        One that somebody else stops is waited for, as it may be about to be started; after a while it is left stopped.

        Args:
            before: by process, the pid it must no longer have (0 for none).
            window: seconds to stay RUNNING.
            probe: one health check, given the seconds it may take; returns what is wrong.
            probe_within: seconds within which it must pass for the first time.
            started: all were started, so one that is STOPPED was stopped by somebody else.

        Returns:
            the pids.

        Raises:
            ReleaseError: one does not come up, does not stay up or is not healthy.
            Stuck: one is neither up nor dead, or was not restarted.
            SupervisorError: supervisord cannot be asked.
        """
        start = since = time.monotonic()
        left: float | None = None  # since when those that came up are STOPPED
        seen: list[dict[str, int]] = []  # the pids under which all were RUNNING, one after another
        passed = probe is None
        while True:
            found = self.processes(before) if before else {}
            now = time.monotonic()
            if dead := [process for process in found.values() if process.state in DEAD]:
                raise ReleaseError(f"{dead[0].name} is {dead[0].state} ({dead[0].words})")
            running = [process for process in found.values() if process.state == "RUNNING"]
            stopped = [process.name for process in found.values() if process.state == "STOPPED"]
            pids = {process.name: process.pid or 0 for process in running if process.pid != before[process.name]}
            resting = (seen or started) and stopped and len(pids) + len(stopped) == len(before)
            left = (left or now) if resting else None
            if len(pids) == len(before):
                if pids not in seen[-1:]:
                    seen.append(pids)
                    since = now
                # One change may be somebody else's restart; a second is a service that does not stay up.
                if len(seen) > 2:
                    raise ReleaseError(f"{', '.join(before)} does not stay up: it died and was started again")
                over, remaining = now - since >= window, start + probe_within - now
                if probe and (over or not passed):
                    wrong = probe(max(0.1, min(10.0, remaining)))
                    if wrong and (passed or time.monotonic() >= start + probe_within):
                        raise ReleaseError(f"its health check fails: {wrong}")
                    passed = wrong is None
                if over and passed:
                    return pids
            elif left and now - left > _LEFT_STOPPED:
                before, seen = {name: pid for name, pid in before.items() if name not in stopped}, []
                if not before:
                    return {}
            elif now - start > max(self._restart_timeout, window):
                states = ", ".join(f"{process.name} is {process.state}" for process in found.values())
                raise Stuck(f"after {now - start:.0f} s {states}")
            time.sleep(min(1.0, max(0.1, window / 6)))

    def _run(self, arguments: list[str], timeout: float, late: type[SupervisorError] = SupervisorError) -> Finished:
        if not self._command:
            raise SupervisorError("there is no supervisorctl on this host: install it, or set SUPERVISORCTL")
        try:
            done = run([*self._command, *arguments], timeout)
            if done.code is not None and done.code < 0:
                # Killed in the middle, which leaves a program STOPPED: only another try can mend that.
                done = run([*self._command, *arguments], timeout)
        except HostError as error:
            raise SupervisorError(str(error)) from error
        words = f"supervisorctl {' '.join(arguments)}"
        self._tell(f"{words}: {done.ending}")
        if done.code is None:
            raise late(f"{words} {done.ending}")
        return done
