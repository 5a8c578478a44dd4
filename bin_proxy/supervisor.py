"""What supervisorctl says: `restart` gives the message, `status` the verdict (measured with supervisor 4.3.0)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from bin_proxy.errors import HostError, ReleaseError, Stuck
from bin_proxy.manifest import Binary
from bin_proxy.process import Finished, run

_STATUS = re.compile(r"(\S+) +(STOPPED|STARTING|RUNNING|BACKOFF|STOPPING|EXITED|FATAL|UNKNOWN)\b *(pid (\d{1,9})|)(.*)")
_SAID = re.compile(r"^(\S+): (stopped|started|ERROR \(.*\))\s*$", re.MULTILINE)
_ELSEWHERE = "abnormal termination"
_DEAD = ("BACKOFF", "EXITED", "FATAL", "UNKNOWN", "STOPPED")
TRYING = ("STARTING", "RUNNING", "BACKOFF")


@dataclass(frozen=True)
class Process:
    """One line of `supervisorctl status`: its full name (`group:name` or `name`), state, pid and the rest in words."""

    name: str
    state: str
    pid: int | None
    words: str


def parse_status(output: str) -> dict[str, Process]:
    """Read what `supervisorctl status` prints.

    Raises:
        HostError: it says something else, such as that supervisord cannot be reached.
    """
    found = {}
    for line in output.splitlines():
        if match := _STATUS.fullmatch(line.strip()):
            found[match[1]] = Process(match[1], match[2], int(match[4] or 0) or None, match[3] + match[5])
        elif line.strip():
            raise HostError(f"supervisord cannot be asked: {line.strip()[:200]}")
    return found


def choose(processes: Mapping[str, Process], services: tuple[str, ...] | None, binary: str) -> list[Process]:
    """The processes that belong to a binary.

    Args:
        processes: all that supervisord knows.
        services, binary: the manifest's `service`, None to find them by the binary's name; and that name.

    Raises:
        HostError: supervisord does not know a service that is named.
    """
    # A group's program of the group's own name is listed bare; a program with numprocs > 1 is a group, too.
    full = {name if ":" in name else f"{name}:{name}": name for name in processes}
    found: dict[str, Process] = {}
    for service in (binary,) if services is None else services:
        group, _, name = service.partition(":")
        matching = [full[key] for key in full if key == f"{group}:{name or group}"]
        if not matching and name in ("", "*"):
            matching = [full[key] for key in full if key.startswith(f"{group}:")]
        if not matching and services is None:
            matching = [full[key] for key in full if key.endswith(f":{binary}")]
        if not matching and services is not None:
            way_out = 'correct "service" in the manifest, or supervisorctl update'
            raise HostError(f"supervisord knows no {service!r}: {way_out}")
        found |= {name: processes[name] for name in matching}
    return list(found.values())


class Supervisor:
    """supervisorctl as a subprocess.

    Args:
        command: supervisorctl and its arguments; empty where the host has none.
        restart_timeout: seconds for one `restart`.
        tell: called with one line about each call, for --verbose.
    """

    def __init__(self, command: tuple[str, ...], restart_timeout: float, tell: Callable[[str], None]) -> None:
        self.command = command
        self._restart_timeout = restart_timeout
        self._tell = tell
        self._listing: dict[str, Process] | HostError | None = None

    def of(self, binary: Binary, *, fresh: bool = False) -> list[Process]:
        """The processes of a binary; none where it has no service.

        Args:
            binary, fresh: the entry; whether to ask supervisord now, or what it said first in this run will do.

        Raises:
            HostError: supervisord cannot be asked, or does not know a service that is named.
        """
        if binary.services and not self.command:
            named = ", ".join(binary.services)
            raise HostError(f"there is no supervisorctl to restart {named}: install it, or set SUPERVISORCTL")
        if not self.command or binary.services == ():
            return []
        if fresh or self._listing is None:
            try:
                self._listing = self.processes()
            except HostError as error:
                way_out = '"service": false in the manifest if there is none'
                self._listing = HostError(f"{error}; nothing is updated without it ({way_out})")
        if isinstance(self._listing, HostError):
            raise self._listing
        return choose(self._listing, binary.services, binary.name)

    def processes(self, names: Collection[str] = ()) -> dict[str, Process]:
        """The processes called `names`, or all, in one call.

        Raises:
            HostError: supervisorctl cannot be run, supervisord cannot be reached or does not know one of them.
        """
        if not self.command:
            raise HostError("there is no supervisorctl on this host any more")
        done = self._run(["status"], min(30.0, self._restart_timeout))
        if not done.stdout.strip() and done.code != 0:
            raise HostError(f"supervisorctl status {done.ending}")
        found = parse_status(done.stdout)
        if gone := [name for name in names if name not in found]:
            raise HostError(f"supervisord no longer knows {gone[0]}")
        return {name: found[name] for name in names or found}

    def restart(self, names: Collection[str]) -> dict[str, str]:
        """Restart processes, after waiting for those that are being stopped.

        Returns:
            by process, what supervisorctl called an error; a verdict on the service it is not.

        Raises:
            Stuck: not within RESTART_TIMEOUT.
            HostError: supervisorctl or supervisord did not do its part.
        """
        deadline = time.monotonic() + self._restart_timeout
        while stopping := [name for name, process in self.processes(names).items() if process.state == "STOPPING"]:
            if time.monotonic() > deadline:
                raise Stuck(f"{stopping[0]} does not stop within {self._restart_timeout:g} s")
            time.sleep(0.3)
        done = self._run(["restart", *names], self._restart_timeout, Stuck)
        last = dict(_SAID.findall(done.stdout))
        for name in names:
            if last.get(name, "stopped") in ("stopped", "ERROR (not running)", "ERROR (no such process)"):
                raise HostError(f"supervisorctl restart {name} {done.ending}")
        return {name: last[name][len("ERROR (") : -1] for name in names if last[name] != "started"}

    def stop(self, names: Collection[str]) -> None:
        """Stop processes that still try to start.

        Raises:
            HostError: supervisorctl cannot be run or does not end.
        """
        self._run(["stop", *names], self._restart_timeout)

    def watch(
        self,
        before: Mapping[str, int],
        said: Mapping[str, str],
        window: float,
        probe: Callable[[float], str | None] | None,
        probe_within: float,
    ) -> dict[str, int]:
        """Wait until processes have run under one pid each for the whole window, and are healthy at its end.

        Args:
            before: by process, the pid it must no longer have (0 for none).
            said: by process, the error that `restart` gave.
            window: seconds to stay RUNNING.
            probe: one health check, given the seconds it may take; returns what is wrong.
            probe_within: seconds within which it must pass for the first time.

        Returns:
            the pids.

        Raises:
            ReleaseError: one does not come up, does not stay up or is not healthy.
            Stuck: one is neither up nor dead, or was not restarted.
            HostError: supervisord cannot be asked.
        """
        start = time.monotonic()
        seen: list[tuple[float, dict[str, int]]] = []  # when all were first seen RUNNING under which pids
        passed = probe is None
        while True:
            found = self.processes(before) if before else {}
            for process in found.values():
                # Stopped by somebody else, who may be about to start it.
                elsewhere = process.state == "STOPPED" and said.get(process.name, _ELSEWHERE) == _ELSEWHERE
                if process.state in _DEAD and not elsewhere:
                    raise ReleaseError(f"{process.name} is {process.state} ({said.get(process.name) or process.words})")
            if stale := [p.name for p in found.values() if p.state == "RUNNING" and p.pid and p.pid == before[p.name]]:
                raise Stuck(f"supervisorctl restart left {stale[0]} running as it was")
            now = time.monotonic()
            if all(process.state == "RUNNING" for process in found.values()):
                pids = {name: process.pid or 0 for name, process in found.items()}
                if not seen or pids != seen[-1][1]:
                    seen.append((now, pids))
                # One change may be somebody else's restart; a second is a service that does not stay up.
                if len(seen) > 2:
                    raise ReleaseError(f"{', '.join(before)} does not stay up: it died and was started again")
                over = now - seen[-1][0] >= window
                if probe and (over or not passed):
                    probe_until = seen[0][0] + probe_within
                    wrong = probe(max(0.1, min(10.0, probe_until - now)))
                    if wrong and (passed or time.monotonic() >= probe_until):
                        raise ReleaseError(f"its health check fails: {wrong}")
                    passed = wrong is None
                if over and passed:
                    return pids
            elif now - start > max(self._restart_timeout, window):
                states = ", ".join(f"{process.name} is {process.state}" for process in found.values())
                raise Stuck(f"after {now - start:.0f} s {states}")
            time.sleep(min(1.0, max(0.1, window / 6)))

    def _run(self, arguments: list[str], timeout: float, late: type[HostError] = HostError) -> Finished:
        done = run([*self.command, *arguments], timeout)
        if done.code is not None and done.code < 0:
            # Killed in the middle, which leaves a program STOPPED: only another try can mend that.
            done = run([*self.command, *arguments], timeout)
        words = f"supervisorctl {' '.join(arguments)}"
        self._tell(f"{words}: exit {done.code}")
        if done.code is None:
            raise late(f"{words} did not end within {timeout:g} s")
        return done
