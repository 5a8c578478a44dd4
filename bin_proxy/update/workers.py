"""Runs jobs side by side and waits for none beyond its time, whatever it hangs in."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bin_proxy.errors import BinProxyError, Unreachable


@dataclass(eq=False)
class _Job:
    key: Any
    action: Callable[[], Any]
    deadline: float = math.inf


class Workers:
    """A pool of daemon threads: one that hangs beyond its deadline is left behind, and ends with the process.

    Args:
        count: jobs at once.
    """

    def __init__(self, count: int) -> None:
        self._count, self._threads, self._unfinished = count, 0, 0
        self._waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._running: list[_Job] = []
        self._done: queue.SimpleQueue[tuple[_Job, Any]] = queue.SimpleQueue()
        self._own = threading.local()

    def submit(self, key: Any, action: Callable[[], Any]) -> None:
        """Queue `action`; `results` hands out (`key`, what it returned or the BinProxyError it raised)."""
        self._unfinished += 1
        self._waiting.put(_Job(key, action))
        if self._threads < self._count:
            self._start()

    def until(self, deadline: float) -> None:
        """Give up the job from within which this is called at that time of the monotonic clock."""
        self._own.job.deadline = deadline

    def busy(self) -> bool:
        """Whether a job is queued or under way."""
        return self._unfinished > 0

    def results(self, wait: float) -> Iterator[tuple[Any, Any]]:
        """What has ended by now; waits up to `wait` seconds for the first.

        Raises:
            BaseException: whatever a job raised that is no BinProxyError: a bug, which nobody should hide.
        """
        ended: list[tuple[_Job, Any]] = []
        with suppress(queue.Empty):
            while True:
                ended.append(self._done.get(timeout=0 if ended else wait))
        for job in list(self._running):
            if time.monotonic() > job.deadline:
                ended.append((job, Unreachable("bin-manager did not come to an end in time")))
                self._start()  # in the place of the thread that hangs
        for job, outcome in ended:
            job.deadline = math.inf  # nobody waits for it in vain any more
            if job not in self._running:  # it was given up before
                continue
            self._running.remove(job)
            self._unfinished -= 1
            if isinstance(outcome, BaseException) and not isinstance(outcome, BinProxyError):
                raise outcome
            yield job.key, outcome

    def _start(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self._own.job = self._waiting.get()
            self._running.append(job)
            try:
                outcome = job.action()
            except BaseException as error:  # noqa: BLE001 - the main thread raises what is no BinProxyError
                outcome = error
            if job not in self._running:  # it was given up, and another thread took this one's place
                return
            self._done.put((job, outcome))
