"""One sync: what was interrupted first, then all binaries side by side; each becomes a result."""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import dataclass, replace

from bin_proxy import plan
from bin_proxy.atomic import temporary_of
from bin_proxy.bin_manager import BinManager, Release
from bin_proxy.errors import BinProxyError, CorruptDownload, HostError, ReleaseError, Unreachable
from bin_proxy.guard import Signals
from bin_proxy.manifest import Binary, record_md5s
from bin_proxy.part import Part, Space
from bin_proxy.plan import Result, short
from bin_proxy.report import Report, write_metrics
from bin_proxy.settings import Settings
from bin_proxy.slot import Slot, discard, inspect, part_path, remember
from bin_proxy.staging import stage
from bin_proxy.state import Memory, State
from bin_proxy.updater import Updater
from bin_proxy.workers import Job, Workers

_OTHER_RELEASES = 3


@dataclass(frozen=True)
class Options:
    """What the command line wants of a sync. `splay` is in seconds; `only` names binaries, none means all."""

    only: tuple[str, ...] = ()
    dry_run: bool = False
    retry_held: bool = False
    splay: float = 0.0


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
        self._selected = [binary for binary in binaries if not options.only or binary.name in options.only]
        self.state = State(settings.state_dir, tuple(self._binaries))
        self.results: dict[str, Result] = {}
        self.troubles: list[str] = []
        self._recovered: dict[str, Result] = {}
        self._updater = Updater(settings, self.state, report)
        self._api = BinManager(settings, report.detail)
        self._space = Space()
        self._workers = Workers(settings.jobs, self._late)
        self._parts: dict[str, Part] = {}
        self._ready: dict[str, tuple[Slot, str]] = {}
        self._asked: dict[str, int] = {}

    def _late(self, limit: float) -> BinProxyError:
        return Unreachable(f"bin-manager did not come to an end within {limit:g} s")

    def run(self) -> None:
        """Bring every selected binary to its outcome, into `results`; what belongs to none, into `troubles`.

        Raises:
            HostError: STATE_DIR is not to be had; nothing was touched.
            Interrupted: a signal came; what had begun is finished or undone.
        """
        if not self._options.dry_run:
            self.state.prepare()
            self.troubles += self.state.set_aside()
            self._tidy_manifest()
            self._recover()
        for binary in self._selected:
            self._begin(binary)
        while self._workers.busy() or self._ready:
            for (step, binary, *context), outcome in self._workers.results(0 if self._ready else 0.25):
                step(binary, *context, outcome)
            self._report.progress([part for name, part in self._parts.items() if name not in self.results])
            if self._ready:
                name = next(binary.name for binary in self._selected if binary.name in self._ready)
                self._activate(self._binaries[name], *self._ready.pop(name))
        self._conclude()

    def _recover(self) -> None:
        for name, record in list(self.state.records.items()):
            binary = self._binaries.get(name)
            if self._options.only and name not in self._options.only:
                continue
            with self._signals.held():
                result = self._updater.recover(name, record, binary)
            if result:
                self._recovered[name] = result
                if binary is None:
                    self.results[name] = result
        if not self._options.only:
            for name, memory in self.state.remembered().items():
                if name not in self._binaries and memory.parts:
                    self._drop_parts(memory, keep=None)

    def _tidy_manifest(self) -> None:
        left_behind = temporary_of(os.path.realpath(self._settings.manifest))
        try:
            if os.path.lexists(left_behind):
                discard(left_behind)
        except HostError as error:
            self.troubles.append(str(error))

    def _drop_parts(self, memory: Memory, keep: str | None) -> None:
        try:
            for part in [part for part in memory.parts if part != keep]:
                discard(part)
                memory.parts.remove(part)
        except HostError as error:
            self.troubles.append(str(error))

    def _begin(self, binary: Binary) -> None:
        if binary.name in self.state.records:
            why = "an update was interrupted: the next sync finishes or undoes it first"
            unfinished = Result(binary.name, "waiting", False, kind="recovery", error=why, note=why)
            self._end(unfinished if self._options.dry_run else self._recovered[binary.name])
        elif not self._is_paused(binary):
            self._workers.submit((self._looked, binary), math.inf, lambda job: self._look(job, binary))

    def _is_paused(self, binary: Binary) -> bool:
        pause, way_out = self.state.pause_of(binary.name, time.time())
        if pause:
            why = f"by an operator: {pause.reason or 'no reason given'}; {way_out}"
            self._end(Result(binary.name, "paused", True, note=why))
        return pause is not None

    def _look(self, job: Job, binary: Binary) -> tuple[Slot, Release]:
        slot = inspect(binary.path, self.state.cache.digests.get(binary.path))
        job.limit = job.seconds() + 3 * self._settings.http_timeout + 1
        return slot, self._api.latest(binary)

    def _looked(self, binary: Binary, outcome: tuple[Slot, Release] | BinProxyError) -> None:
        if isinstance(outcome, BinProxyError):
            self._fail(binary, None, None, outcome)
        else:
            self._consider(binary, *outcome)

    def _consider(self, binary: Binary, slot: Slot, release: Release) -> None:
        """Decide, and begin what was decided."""
        now, cache = time.time(), self.state.cache
        memory = self.state.memory(binary.name)
        cache.answers[binary.name] = [binary.version, release.md5, now]
        if found := remember(slot):
            cache.digests[binary.path] = found
        try:
            if memory.unwell and not self._options.dry_run:
                with self._signals.held():
                    self._updater.mend(binary, now, at_once=self._options.retry_held)
            longest = self._options.splay
            if memory.lost:  # only what was offered first may have been offered, and held, before
                memory.lost = "" if slot.md5 == release.md5 else memory.lost.replace("*", release.md5)
            if slot.md5 == release.md5:
                memory.seen = {}
            elif longest and not self._options.dry_run and release.md5 not in memory.seen:
                memory.seen = {release.md5: now}
                self._report.log(
                    f"{binary.name}: {short(release.md5)} is due in {plan.splay_delay(_host(), longest):.0f} s (splay)"
                )
            decision = plan.decide(
                release.md5,
                slot.md5,
                memory,
                now,
                retry_held=self._options.retry_held,
                splay=(plan.splay_delay(_host(), longest), longest) if longest else None,
            )
            wanted = part_path(slot.target, binary.name, release.md5) if decision.outcome == "update" else None
            if not self._options.dry_run:
                self._drop_parts(memory, keep=wanted if decision.outcome != "current" else None)
            if decision.outcome == "update":
                self._updater.preflight(binary, slot)
                if not self._options.dry_run:
                    return self._stage(binary, slot, release, memory)
        except BinProxyError as error:
            return self._fail(binary, slot, release, error)
        if memory.unwell and decision.outcome == "current":
            decision = replace(decision, well=False, kind="restart", why=memory.unwell.reason)
        outcome = "updated" if decision.outcome == "update" else decision.outcome
        why = decision.why + (
            f"; until {time.strftime('%H:%M:%S', time.localtime(decision.until))}" if decision.until else ""
        )
        words = f"release {short(release.md5)} {decision.outcome}: {why}{_tries(binary.name)}"
        told = None if decision.well else words
        self._end(Result(binary.name, outcome, decision.well, slot.md5, release.md5, 0.0, told, decision.kind, why))

    def _stage(self, binary: Binary, slot: Slot, release: Release, memory: Memory) -> None:
        path = part_path(slot.target, binary.name, release.md5)
        if path not in memory.parts:
            memory.parts.append(path)
        self.state.save()
        self._asked[binary.name] = self._asked.get(binary.name, 0) + 1

        def work(job: Job) -> Release:
            def whole() -> None:
                job.limit = math.inf

            def watch(part: Part) -> None:
                self._parts[binary.name] = part

            return stage(self._settings, self._space, self._api, binary, slot, release, watch, whole)

        limit = self._settings.download_timeout + 1
        self._workers.submit((self._staged, binary, slot, release), limit, work)

    def _staged(self, binary: Binary, slot: Slot, release: Release, outcome: Release | BinProxyError) -> None:
        self._parts.pop(binary.name, None)
        if isinstance(outcome, BinProxyError):
            self._fail(binary, slot, release, outcome)
        elif outcome == release:
            self._ready[binary.name] = (slot, release.md5)
        elif self._asked[binary.name] < _OTHER_RELEASES:
            self._consider(binary, slot, outcome)
        else:
            self._fail(binary, slot, outcome, HostError("bin-manager names another release each time it is asked"))

    def _activate(self, binary: Binary, slot: Slot, md5: str) -> None:
        self.state.load_pauses()
        if self._is_paused(binary):
            return
        try:
            with self._signals.held():
                result = self._updater.activate(binary, slot, md5, "sync")
                self._end(result)
        except BinProxyError as error:
            self._fail(binary, slot, Release(md5), error)

    def _fail(self, binary: Binary, slot: Slot | None, release: Release | None, error: BinProxyError) -> None:
        """Nothing was changed: remember what has to be, and make it a result."""
        memory, now = self.state.memory(binary.name), time.time()
        outcome, told = "failed", str(error)
        if release and isinstance(error, CorruptDownload):
            memory.retries[release.md5] = plan.after_failure(memory, release.md5, error.kind, told, now)
        elif release and isinstance(error, ReleaseError):
            memory.hold(release.md5, told, now, "failure")
            outcome = "held"
            told = f"release {short(release.md5)} is not installed and held: {told}{_tries(binary.name)}"
        old, new = slot.md5 if slot else None, release.md5 if release else None
        self._end(Result(binary.name, outcome, False, old, new, 0.0, told, error.kind))

    def _end(self, result: Result) -> None:
        recovered = self._recovered.get(result.name)
        if recovered and result.outcome != "updated" and not (recovered.well and not result.well):
            result = recovered
        self.results[result.name] = result
        by_operator = result.outcome == "held" and result.well
        self.state.cache.outcomes[result.name] = "held by operator" if by_operator else result.outcome
        if self._options.dry_run:
            return
        if result.outcome == "updated" and result.well:
            self._report.tell(f"{result.name}: updated to {short(result.to_md5)} in {result.seconds:.1f} s")
        elif result.well:
            self._report.tell(f"{result.name}: {result.outcome}" + (f" ({result.note})" if result.note else ""))

    def _conclude(self) -> None:
        """Keep what the next run wants to know, and let the manifest tell what is on the disk."""
        if self._options.dry_run:
            return
        stale = {}
        for binary in self._selected:
            result = self.results[binary.name]
            on_disk = result.from_md5 or ""
            if result.outcome in ("current", "held", "waiting") and binary.reported not in (None, on_disk):
                stale[binary.name] = on_disk
        try:
            try:
                if stale:
                    record_md5s(self._settings.manifest, stale)
            finally:
                self.state.save()
        except HostError as error:
            self._updater.troubles.append(str(error))
        self.troubles += dict.fromkeys(self._updater.troubles)
        for kept in (self.state.cache.answers, self.state.cache.outcomes):
            for name in kept.keys() - self._binaries.keys():
                kept.pop(name)
        paths = {binary.path for binary in self._binaries.values()}
        for path in self.state.cache.digests.keys() - paths:
            self.state.cache.digests.pop(path)

    def finish(self, results: list[Result]) -> int:
        """Tell what is new, and keep what the next run compares with.

        Args:
            results: of all binaries, in the order in which they are to be told.

        Returns:
            the exit code.
        """
        code, now, cache = exit_code(results, self.troubles), time.time(), self.state.cache
        cache.last_sync = [now, float(code)]
        self._report.troubles(results, self.troubles, cache, now)
        try:
            self.state.save_cache(durable=any(result.seconds for result in results))
            if self._settings.metrics_file:
                pauses = {name for name in self._binaries if self.state.pause_of(name, now)[0]}
                write_metrics(self._settings.metrics_file, cache, list(self._binaries), pauses)
        except HostError as error:
            self._report.troubles([], [str(error)], cache, now)
            return 1
        return code


def _tries(name: str) -> str:
    return f"; bin-proxy sync --only {name} --retry-held tries it again"


def _host() -> str:
    """What tells this host from others, the same at every start."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            return file.read().strip() + socket.gethostname()
    except (OSError, UnicodeDecodeError):
        return socket.gethostname()


def exit_code(results: list[Result], troubles: list[str]) -> int:
    """0 where every binary is where it should be, or where an operator put it; else 1."""
    return 0 if not troubles and all(result.well for result in results) else 1
