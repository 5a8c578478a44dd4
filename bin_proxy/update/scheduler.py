"""One sync: what was interrupted first, then all binaries side by side; each becomes a result."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from bin_proxy.config.settings import Settings
from bin_proxy.errors import BinProxyError, CorruptDownload, HostError, ReleaseError
from bin_proxy.host.files import temporary_of
from bin_proxy.host.installed import Slot, discard, inspect, part_path
from bin_proxy.host.lock import is_locked
from bin_proxy.host.part import Part
from bin_proxy.host.signals import Signals
from bin_proxy.output.report import Report, echo, write_metrics
from bin_proxy.policy import plan
from bin_proxy.policy.model import Answer, Binary, LastSync, Memory, Release
from bin_proxy.policy.plan import Result, short
from bin_proxy.server.client import BinManager
from bin_proxy.store.manifest_file import record_md5s
from bin_proxy.store.state import State
from bin_proxy.update.staging import Staging
from bin_proxy.update.transaction import Updater
from bin_proxy.update.workers import Workers

_OTHER_RELEASES = 3


@dataclass(frozen=True)
class Options:
    """What the command line wants of a sync. `splay` is in seconds; `only` names binaries, none means all."""

    only: tuple[str, ...] = ()
    dry_run: bool = False
    retry_held: bool = False
    splay: float = 0.0


@dataclass(eq=False)
class _Task:
    """A binary on its way through the run: what was found, what is offered, the file under way."""

    binary: Binary
    slot: Slot | None = None
    release: Release | None = None
    part: Part | None = None
    downloads: int = 0


class Sync:
    """One run over the selected binaries.

    Args:
        settings: every setting.
        binaries: the whole manifest.
        options: what is wanted of this run.
        report: who is told.
        signals: held back while a binary is being swapped.
    """

    def __init__(
        self, settings: Settings, binaries: tuple[Binary, ...], options: Options, report: Report, signals: Signals
    ) -> None:
        self._settings, self._options, self._report, self._signals = settings, options, report, signals
        self._binaries = {binary.name: binary for binary in binaries}
        self._tasks = [_Task(binary) for binary in binaries if not options.only or binary.name in options.only]
        self.state = State(settings.state_dir, tuple(self._binaries))
        self.results: dict[str, Result] = {}
        self._downloading: set[_Task] = set()
        self._ready: list[_Task] = []
        self._updater = Updater(settings, self.state, report)
        self._workers = Workers(settings.jobs)
        self._api = BinManager(settings, report.detail, self._workers.until)
        self._staging = Staging(settings, self._api)

    def run(self) -> None:
        """Bring every selected binary to its outcome, into `results`; what belongs to none, into the report's notes.

        Raises:
            HostError: STATE_DIR is not to be had; nothing was touched.
            Interrupted: a signal came; what had begun is finished or undone.
        """
        if not self._options.dry_run:
            self.state.prepare()
            self._report.notes += self.state.set_aside()
            with self._report.noting():
                discard(temporary_of(os.path.realpath(self._settings.manifest)))
            self._recover()
        for task in self._tasks:
            self._begin(task)
        for task in self._tasks:
            self._mend(task.binary)
        while self._workers.busy() or self._ready:
            for (step, task), outcome in self._workers.results(0 if self._ready else 0.25):
                self._take(step, task, outcome)
            parts = [task.part for task in self._tasks if task.part and self._downloading]
            self._report.progress(sum(part.offset for part in parts), sum(part.total or 0 for part in parts))
            if self._ready:
                first = min(self._ready, key=self._tasks.index)
                self._ready.remove(first)
                self._take(self._activate, first, None)
        if not self._options.dry_run:
            self._conclude()

    def _take(self, step: Callable[[_Task, Any], None], task: _Task, outcome: Any) -> None:
        """Go on with what a job brought; its failure, or that of the step, is that of the binary."""
        self._downloading.discard(task)
        try:
            if isinstance(outcome, BinProxyError):
                raise outcome
            step(task, outcome)
        except BinProxyError as error:
            self._fail(task, error)

    def _recover(self) -> None:
        for name, record in list(self.state.records.items()):
            if self._options.only and name not in self._options.only:
                continue
            with self._signals.held():
                result = self._updater.recover(name, record, self._binaries.get(name))
            if result:
                self.results[name] = result
        if not self._options.only:
            for name, memory in self.state.memories.items():
                if name not in self._binaries:
                    self._drop_parts(memory, keep=None)

    def _drop_parts(self, memory: Memory, keep: str | None) -> None:
        with self._report.noting():
            for part in [part for part in memory.parts if part != keep]:
                discard(part)
                memory.parts.remove(part)

    def _begin(self, task: _Task) -> None:
        name = task.binary.name
        if name in self.state.records:
            busy = is_locked(self._settings.state_dir)
            why = "a sync is at work on it" if busy else "an update was interrupted: the next sync resolves it first"
            unfinished = Result(name, "waiting", busy, kind="recovery", error=None if busy else why, note=why)
            self._end(unfinished if self._options.dry_run else self.results[name])
        elif not self._is_paused(name):
            self._workers.submit((self._consider, task), lambda: self._look(task))

    def _mend(self, binary: Binary) -> None:
        """A service that is down for the host's fault is tried again whatever bin-manager answers meanwhile."""
        begun = binary.name not in self.results and not self._options.dry_run
        if begun and self.state.memory(binary.name).unwell:
            with self._signals.held(), suppress(HostError):  # it stays unwell, which is told
                self._updater.mend(binary, time.time(), at_once=self._options.retry_held)

    def _is_paused(self, name: str) -> bool:
        pause, way_out = self.state.pause_of(name)
        if pause:
            why = f"by an operator: {pause.reason or 'no reason given'}; {way_out}"
            self._end(Result(name, "paused", True, note=why))
        return pause is not None

    def _look(self, task: _Task) -> Release:
        task.slot = inspect(task.binary.path, self.state.cache.digests.get(task.binary.path))
        return self._api.latest(task.binary)

    def _consider(self, task: _Task, release: Release) -> None:
        """Decide, and begin what was decided."""
        binary, slot, now, cache = task.binary, task.slot, time.time(), self.state.cache
        assert slot
        task.release = release
        memory, dry_run = self.state.memory(binary.name), self._options.dry_run
        if binary.name in self.state.blind:
            self.state.hold_blindly(binary.name, release.md5)
        cache.answers[binary.name] = Answer(binary.version, release.md5, now)
        if slot.fingerprint:
            cache.digests[binary.path] = slot.fingerprint
        if slot.md5 == release.md5:
            memory.release(release.md5)
            if not memory.unwell:
                memory.down = []
        retry, splay = self._options.retry_held, self._options.splay
        delay = plan.splay_delay(_host(), splay) if splay else 0.0
        new = plan.note_due(memory, release.md5, slot.md5, now, splay, delay)
        result = plan.decide(binary.name, release.md5, slot.md5, memory, now, retry_held=retry, splay=splay)
        if new and result.outcome == "waiting" and result.well and not dry_run:
            self._report.log(f"{binary.name}: {short(release.md5)} is due in {delay:.0f} s (splay)")
        update = result.outcome == "update"
        path = part_path(slot.target, binary.name, release.md5)
        if not dry_run:
            self._drop_parts(memory, keep=path if update else None)
        if update:
            self._updater.preflight(binary, slot)
            if not dry_run:
                return self._stage(task, slot, release, memory, path)
            result = replace(result, outcome="updated")
        self._end(result)

    def _stage(self, task: _Task, slot: Slot, release: Release, memory: Memory, path: str) -> None:
        if path not in memory.parts:
            memory.parts.append(path)
        self.state.save()
        task.downloads += 1
        task.part = None
        self._downloading.add(task)

        def watch(part: Part) -> None:
            task.part = part

        def work() -> Release:
            return self._staging.stage(task.binary, slot, release, watch)

        self._workers.submit((self._staged, task), work)

    def _staged(self, task: _Task, newest: Release) -> None:
        if newest == task.release:
            self._ready.append(task)
        elif task.downloads < _OTHER_RELEASES:
            self._consider(task, newest)
        else:
            task.release = newest
            raise HostError("bin-manager names another release each time it is asked")

    def _activate(self, task: _Task, _: None) -> None:
        assert task.slot and task.release
        self.state.load_pauses()
        if not self._is_paused(task.binary.name):
            with self._signals.held():
                self._end(self._updater.activate(task.binary, task.slot, task.release.md5, "sync"))

    def _fail(self, task: _Task, error: BinProxyError) -> None:
        """Nothing was changed: remember what has to be, and make it a result."""
        name, release, told, outcome = task.binary.name, task.release, str(error), "failed"
        memory, now = self.state.memory(name), time.time()
        if release and isinstance(error, CorruptDownload):
            memory.retries[release.md5] = plan.after_failure(memory, release.md5, error.kind, told, now)
        elif release and isinstance(error, ReleaseError):
            memory.hold(release.md5, told, now)
            outcome = "held"
            told = f"release {short(release.md5)} is not installed and held: {told}; {plan.way_out(name)}"
        old, new = task.slot.md5 if task.slot else None, release.md5 if release else None
        self._end(Result(name, outcome, False, old, new, 0.0, told, error.kind))

    def _end(self, result: Result) -> None:
        recovered = self.results.get(result.name)
        if recovered and result.outcome != "updated" and (result.well or not recovered.well):
            result = recovered
        self.results[result.name] = result
        held = result.outcome in ("held", "rolled-back") and self.state.memory(result.name).hold_on(result.to_md5)
        self.state.cache.outcomes[result.name] = result.outcome if result.well else "held" if held else "failed"
        if self._options.dry_run:
            return
        if result.outcome == "updated" and result.well:
            self._report.tell(f"{result.name}: updated to {short(result.to_md5)} in {result.seconds:.1f} s")
        elif result.well:
            self._report.tell(f"{result.name}: {result.outcome}" + (f" ({result.note})" if result.note else ""))

    def _conclude(self) -> None:
        """Keep what the next run wants to know, and let the manifest tell what is on the disk."""
        stale = {}
        for name, reported in ((task.binary.name, task.binary.reported) for task in self._tasks):
            on_disk = self.results[name].from_md5 or ""
            if self.results[name].outcome in ("current", "held", "waiting") and reported not in (None, on_disk):
                stale[name] = on_disk
        with self._report.noting():
            try:
                if stale:
                    record_md5s(self._settings.manifest, stale)
            finally:
                self.state.save()
        cache, paths = self.state.cache, {binary.path for binary in self._binaries.values()}
        for kept, wanted in ((cache.answers, self._binaries), (cache.outcomes, self._binaries), (cache.digests, paths)):
            for key in kept.keys() - wanted:
                del kept[key]
        known = self._binaries.keys() | {""}
        cache.troubles = {key: trouble for key, trouble in cache.troubles.items() if trouble.name in known}

    def finish(self, results: list[Result]) -> int:
        """Tell what is new, and keep what the next run compares with.

        Args:
            results: of all binaries, in the order in which they are to be told.

        Returns:
            the exit code.
        """
        now, cache = time.time(), self.state.cache
        cache.last_sync = LastSync(now, exit_code(results, self._report.notes))
        with self._report.noting():
            if self._settings.metrics_file:
                write_metrics(self._settings.metrics_file, cache, {name: self._gauges(name) for name in self._binaries})
        self._report.troubles(results, cache, now)
        try:
            self.state.save_cache(durable=any(result.seconds for result in results))
        except HostError as error:  # told every minute, as nothing can be remembered of it
            self._report.log(str(error))
            echo(f"bin-proxy: {error}", err=True)
            return 1
        return exit_code(results, self._report.notes)

    def _gauges(self, name: str) -> set[str]:
        """The metrics of a binary that are 1; a hold is one also while bin-manager is down or the binary paused."""
        outcome, answer = self.state.cache.outcomes.get(name, ""), self.state.cache.answers.get(name)
        hold = self.state.memory(name).hold_on(answer.md5 if answer else None)
        if hold and outcome == "held":
            outcome = ""
        held = ("held_by_operator" if hold.by == "operator" else "held") if hold else ""
        return {"current" if outcome == "updated" else outcome, held}


def _host() -> str:
    """What tells this host from others, the same at every start."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            return file.read().strip() + socket.gethostname()
    except (OSError, UnicodeDecodeError):
        return socket.gethostname()


def exit_code(results: list[Result], notes: list[str]) -> int:
    """0 where every binary is where it should be, or where an operator put it; else 1."""
    return 0 if not notes and all(result.well for result in results) else 1
