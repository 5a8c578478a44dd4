"""What supervisorctl says: `restart` gives the message, `status` the verdict (measured with supervisor 4.3.0)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bin_proxy.errors import HostError, ReleaseError, Stuck
from bin_proxy.manifest import Binary
from bin_proxy.process import Finished, run

_STATUS = re.compile(r"(\S+)\s+(STOPPED|STARTING|RUNNING|BACKOFF|STOPPING|EXITED|FATAL|UNKNOWN)\b *(.*)")
_SAID = re.compile(r"(\S+): (stopped|started|ERROR \((.*)\))")
_STATUS_TIMEOUT = 30.0
_ELSEWHERE = "abnormal termination"
_DEAD = ("BACKOFF", "EXITED", "FATAL", "UNKNOWN")
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
        match = _STATUS.fullmatch(line.strip())
        if match:
            pid = re.match(r"pid (\d{1,9})", match[3])
            found[match[1]] = Process(match[1], match[2], int(pid[1]) if pid else None, match[3])
        elif line.strip():
            raise HostError(f"supervisord cannot be asked: {line.strip()[:200]}")
    return found


def choose(processes: Mapping[str, Process], services: tuple[str, ...] | None, binary: str) -> list[Process]:
    """The processes that belong to a binary.

    Args:
        processes: all that supervisord knows.
        services: the manifest's `service`; None to find them by the binary's name.
        binary: the binary's name.

    Raises:
        HostError: supervisord does not know a service that is named.
    """
    found: dict[str, Process] = {}
    for service in (binary,) if services is None else services:
        group, _, name = service.partition(":")
        matching = [p for p in processes.values() if p.name == service]
        if not matching and name in ("", "*"):
            # A program with numprocs > 1 is a group, too; a group of one program of its own name is listed bare.
            matching = [p for p in processes.values() if p.name.startswith(f"{group}:") or (name and p.name == group)]
        if not matching and name == group:
            matching = [p for p in processes.values() if p.name == group]
        if not matching and services is None:
            matching = [p for p in processes.values() if p.name.endswith(f":{binary}")]
        if not matching and services is not None:
            raise HostError(
                f'supervisord knows no {service!r}: correct "service" in the manifest, or supervisorctl update'
            )
        found.update({process.name: process for process in matching})
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
            binary: the manifest's entry.
            fresh: ask supervisord now; otherwise what it said first in this run will do.

        Raises:
            HostError: supervisord cannot be asked, or does not know a service that is named.
        """
        if not self.command and binary.services:
            services = ", ".join(binary.services)
            raise HostError(f"there is no supervisorctl to restart {services}: install it, or set SUPERVISORCTL")
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

    def processes(self) -> dict[str, Process]:
        """All processes, in one call.

        Raises:
            HostError: supervisorctl cannot be run, or supervisord cannot be reached.
        """
        if not self.command:
            raise HostError("there is no supervisorctl on this host any more")
        limit = min(_STATUS_TIMEOUT, self._restart_timeout)
        done = self._run(["status"], limit)
        if done.code is None:
            raise HostError(f"supervisorctl status did not end within {limit:g} s")
        if not done.stdout.strip() and done.code != 0:
            raise HostError(f"supervisorctl status exited {done.code}: {done.last_words}")
        return parse_status(done.stdout)

    def restart(self, names: Iterable[str]) -> dict[str, str]:
        """Restart processes, after waiting for those that are being stopped.

        Returns:
            by process, what supervisorctl called an error; a verdict on the service it is not.

        Raises:
            Stuck: not within RESTART_TIMEOUT.
            HostError: supervisorctl or supervisord did not do its part.
        """
        names = list(names)
        deadline = time.monotonic() + self._restart_timeout
        while stopping := [name for name, process in self._of(names).items() if process.state == "STOPPING"]:
            if time.monotonic() > deadline:
                raise Stuck(f"{stopping[0]} does not stop within {self._restart_timeout:g} s")
            time.sleep(0.3)
        done = self._run(["restart", *names], self._restart_timeout)
        if done.code is None:
            raise Stuck(f"supervisorctl restart {' '.join(names)} did not end within {self._restart_timeout:g} s")
        last = {}
        for line in done.stdout.splitlines():
            match = _SAID.fullmatch(line.strip())
            if match and match[1] in names:
                last[match[1]] = match[3] or match[2]
        for name in names:
            if last.get(name, "stopped") in ("stopped", "not running", "no such process"):
                raise HostError(f"supervisorctl restart {name} exited {done.code}: {done.last_words}")
        return {name: word for name, word in last.items() if word != "started"}

    def stop(self, names: Iterable[str]) -> None:
        """Stop processes that still try to start.

        Raises:
            HostError: supervisorctl cannot be run or does not end.
        """
        if self._run(["stop", *names], self._restart_timeout).code is None:
            raise HostError(f"supervisorctl stop did not end within {self._restart_timeout:g} s")

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
        give_up = time.monotonic() + max(self._restart_timeout, window)
        pids: dict[str, int] = {}
        since = first = time.monotonic()
        changes, passed = 0, False
        while True:
            found = self._of(before)
            for process in found.values():
                if process.state in _DEAD:
                    raise ReleaseError(f"{process.name} is {process.state} ({said.get(process.name) or process.words})")
                # "abnormal termination" and STOPPED: somebody else stopped it, and may be about to start it.
                if process.state == "STOPPED" and said.get(process.name, _ELSEWHERE) != _ELSEWHERE:
                    raise ReleaseError(f"{process.name} did not start: {said[process.name]}")
            now = time.monotonic()
            if all(process.state == "RUNNING" for process in found.values()):
                running = {name: process.pid or 0 for name, process in found.items()}
                if stale := [name for name, pid in running.items() if pid and pid == before[name]]:
                    raise Stuck(f"supervisorctl restart left {stale[0]} running as it was")
                if running != pids:
                    # One change may be somebody else's restart; a second is a service that does not stay up.
                    changes += bool(pids)
                    first = first if pids else now
                    if changes > 1:
                        raise ReleaseError(f"{', '.join(before)} does not stay up: it died and was started again")
                    pids, since = running, now
                over = now - since >= window
                if probe and (over or not passed):
                    wrong = probe(max(0.1, min(10.0, first + probe_within - now)))
                    if wrong and (passed or time.monotonic() - first >= probe_within):
                        raise ReleaseError(f"its health check fails: {wrong}")
                    passed = wrong is None
                if over and (passed or not probe):
                    return pids
            elif now > give_up:
                states = ", ".join(f"{process.name} is {process.state}" for process in found.values())
                raise Stuck(f"after {now - first:.0f} s {states}")
            time.sleep(min(1.0, max(0.1, window / 6)))

    def _of(self, names: Iterable[str]) -> dict[str, Process]:
        names = list(names)
        processes = self.processes() if names else {}
        for name in names:
            if name not in processes:
                raise HostError(f"supervisord no longer knows {name}")
        return {name: processes[name] for name in names}

    def _run(self, arguments: list[str], timeout: float) -> Finished:
        done = run([*self.command, *arguments], timeout)
        if done.code is not None and done.code < 0:
            # Killed in the middle, which leaves a program STOPPED: only another try can mend that.
            done = run([*self.command, *arguments], timeout)
        self._tell(f"supervisorctl {' '.join(arguments)}: exit {done.code}")
        return done
