"""Runs jobs side by side and never waits longer for one than its limit, whatever it hangs in."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bin_proxy.errors import BinProxyError


@dataclass(eq=False)
class Job:
    """One call in a thread; `limit` is how many seconds it may take, which the action itself may change."""

    key: Any
    action: Callable[[Job], Any]
    limit: float
    begun: float = 0.0

    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.begun


class Workers:
    """A pool of daemon threads: one that hangs beyond its limit is left behind, and ends with the process.

    Args:
        count: jobs at once.
        late: makes the error that a job which outlasts its limit ends with, given the limit in seconds.
    """

    def __init__(self, count: int, late: Callable[[float], BinProxyError]) -> None:
        self._count, self._late = count, late
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._done: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._idle = 0

    def submit(self, key: Any, limit: float, action: Callable[[Job], Any]) -> None:
        """Queue `action`; `results` hands out (key, what it returned or the BinProxyError it raised).

        Args:
            key: tells the result from others.
            limit: seconds it may run, from its start.
            action: called in a thread.
        """
        self._waiting.append(Job(key, action, limit))
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._count:
            job = self._waiting.popleft()
            job.begun = time.monotonic()
            self._running.append(job)
            if self._idle:  # starting a thread for each job would be felt with a hundred of them
                self._idle -= 1
            else:
                threading.Thread(target=self._work, daemon=True).start()
            self._free.put(job)

    def _work(self) -> None:
        while True:
            job = self._free.get()
            try:
                outcome = job.action(job)
            except BaseException as error:  # noqa: BLE001 - the main thread raises what is no BinProxyError
                outcome = error
            self._done.put((job, outcome))

    def busy(self) -> bool:
        """Whether a job is queued or under way."""
        return bool(self._waiting or self._running)

    def results(self, wait: float) -> Iterator[tuple[Any, Any]]:
        """What has ended by now; waits up to `wait` seconds for the first.

        Raises:
            BaseException: whatever a job raised that is no BinProxyError: a bug, which nobody should hide.
        """
        ended: list[tuple[Job, Any]] = []
        with suppress(queue.Empty):
            ended.append(self._done.get(timeout=wait))
            while True:
                ended.append(self._done.get_nowait())
        for job, outcome in ended:
            if job in self._running:  # else it was given up
                self._idle += 1
                yield job.key, self._taken(job, outcome)
        for job in [job for job in self._running if job.seconds() > job.limit]:
            yield job.key, self._taken(job, self._late(job.limit))

    def _taken(self, job: Job, outcome: Any) -> Any:
        self._running.remove(job)
        self._fill()
        if isinstance(outcome, BaseException) and not isinstance(outcome, BinProxyError):
            raise outcome
        return outcome
