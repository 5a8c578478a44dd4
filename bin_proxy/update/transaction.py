"""One binary, from its staged file to its outcome: activate, watch, commit or roll back; and recovery."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial

from bin_proxy.config.settings import Settings
from bin_proxy.errors import BackupLost, BinProxyError, HostError, ReleaseError, Stuck, host_error, host_errors
from bin_proxy.host.backups import Backups
from bin_proxy.host.files import fsync_folder
from bin_proxy.host.health import probe
from bin_proxy.host.installed import Slot, check_writable, inspect, part_path, swap
from bin_proxy.host.supervisor import DOWN, TRYING, Process, Supervisor, executes
from bin_proxy.output.report import Report
from bin_proxy.policy import plan
from bin_proxy.policy.model import Binary, Record
from bin_proxy.policy.plan import Result, short
from bin_proxy.store.manifest_file import record_md5s
from bin_proxy.store.state import State

_PROBE_BEFORE = 10.0


class Updater:
    """Works through single binaries. Only the holder of the lock may use it, and only its main thread.

    Args:
        settings: every setting.
        state: the durable memory.
        report: who is told.
    """

    def __init__(self, settings: Settings, state: State, report: Report) -> None:
        self._settings, self._state = settings, state
        self._tell, self._log, self._noting = report.tell, report.log, report.noting
        self._supervisor = Supervisor(settings.supervisorctl, settings.restart_timeout, report.detail)
        self._backups = Backups(settings.state_dir)

    def preflight(self, binary: Binary, slot: Slot) -> None:
        """All that can be known of the host before a download.

        Raises:
            HostError: it would not do to update this binary now.
        """
        check_writable(slot.folder)
        self._supervisor.of(binary)

    def activate(self, binary: Binary, slot: Slot, md5: str, by: str) -> Result:
        """Swap the staged release in, restart, watch, and commit or roll back.

        Args:
            binary: the manifest's entry.
            slot: the file that was compared; if it is another release now, nothing is done.
            md5: the staged release.
            by: "sync" or "operator".

        Raises:
            HostError: nothing was changed.
        """
        service = self._look_at_service(binary, self._supervisor.settled(binary))
        before, slot = slot, inspect(binary.path, slot.fingerprint)
        if (slot.target, slot.md5) != (before.target, before.md5):
            raise HostError(f"{before.target} was changed by somebody else; the next run looks again")
        target, inode = slot.target, slot.status.st_ino if slot.status else 0
        record = Record(binary.name, target, slot.md5, md5, inode, *service, by, time.time())
        self._state.write_record(record)
        self._tell(f"{binary.name}: {short(slot.md5)} -> {short(md5)}")
        part, staged = part_path(target, binary.name, md5), None
        try:
            staged = os.stat(part).st_ino
            if slot.md5:
                self._backups.add(binary.name, slot)
            swap(part, target)
        except OSError as error:
            cause = host_error(f"replace {target}", error)
            with suppress(OSError):
                if os.lstat(target).st_ino == staged:
                    return self._roll_back(record, binary, cause)
            # It did not happen; what cannot be tidied up is found by the next run, by the record.
            with suppress(OSError, HostError):
                with suppress(FileNotFoundError):
                    os.chmod(part, 0o600)
                self._prune(record, slot.md5)
                self._state.close_record(record.name)
            raise cause from error
        return self._settle(record, binary)

    def _look_at_service(self, binary: Binary, chosen: list[Process]) -> tuple[dict[str, int], bool, bool]:
        """What a record says of the service: `processes` that are to run, `healthy` and `probed`."""
        down = self._state.memory(binary.name).down
        running = [process for process in chosen if process.state != "STOPPED" or process.name in down]
        probed = binary.health is not None and (bool(running) or not chosen)
        healthy = all(process.state == "RUNNING" for process in running)
        if healthy and probed and binary.health:
            healthy = probe(binary.health, min(_PROBE_BEFORE, binary.health_timeout)) is None
        return {process.name: process.pid or 0 for process in running}, healthy, probed

    def _settle(self, record: Record, binary: Binary, *, restart: bool = True) -> Result:
        try:
            before = record.processes if restart else dict.fromkeys(record.processes, 0)
            pids = self._bring_up(binary, before, probed=record.probed, restart=restart)
        except (ReleaseError, HostError) as cause:
            return self._roll_back(record, binary, cause)
        return self._commit(record, pids)

    def _bring_up(
        self, binary: Binary, before: dict[str, int], *, probed: bool, restart: bool = True
    ) -> dict[str, int]:
        started = bool(before and restart) and self._supervisor.restart(before)
        check = partial(probe, binary.health) if probed and binary.health else None
        if not before and not check:
            return {}
        return self._supervisor.watch(before, binary.min_healthy, check, binary.health_timeout, started=started)

    def _runs(self, record: Record) -> bool:
        """Whether every process executes the very file that is installed, so that a restart would only harm."""
        with host_errors(f"look at {record.target}"):
            installed = os.stat(record.target)
        found = self._supervisor.processes(record.processes) if record.processes else {}
        return all(process.state == "RUNNING" and executes(process.pid, installed) for process in found.values())

    def _commit(self, record: Record, pids: dict[str, int]) -> Result:
        memory, now = self._state.memory(record.name), time.time()
        if pids or not record.processes:  # else an operator stopped it before it was seen to be well
            memory.release(record.new)
        memory.unwell, memory.down, memory.updated_at = None, [], now
        if record.old and record.old != record.new:
            plan.leave(memory, record.old, now)
            if record.by == "operator":
                memory.hold(record.old, "an operator went back from it with rollback", now, "operator")
        seconds = now - record.since
        how = "rolled back by hand" if record.by == "operator" else "updated"
        what = f"{how} {record.old or '-'} -> {record.new}, pid {_pids(record.processes)} -> {_pids(pids)}"
        self._log(f"{record.name}: {what}, {seconds:.1f} s")
        return self._close(record, record.new, Result(record.name, "updated", True, record.old, record.new, seconds))

    def _close(self, record: Record, installed: str | None, result: Result) -> Result:
        """Make what was decided durable, and only then forget the record; trouble here undoes nothing."""
        memory = self._state.memory(record.name)
        memory.parts = list(filter(os.path.lexists, memory.parts))
        with self._noting():
            record_md5s(self._settings.manifest, {record.name: installed or ""})
        try:
            self._prune(record, installed)
            try:
                self._state.save()
            except HostError:
                if result.well and record.by == "sync":  # no hold is lost, and the next run would restart all again
                    self._state.close_record(record.name)
                raise
            self._state.close_record(record.name)
        except HostError as error:
            told = f"{result.error or f'release {short(record.new)} is installed'}, but: {error}"
            return replace(result, well=False, error=told, kind=result.kind or "host")
        return result

    def _prune(self, record: Record, installed: str | None) -> None:
        memory = self._state.memory(record.name)
        order = [md5 for md5 in dict.fromkeys([record.old, *memory.backups]) if md5]
        with host_errors("prune the backups"):
            memory.backups = self._backups.prune(record.name, order, self._settings.backups_keep, installed)

    def _roll_back(self, record: Record, binary: Binary, cause: BinProxyError) -> Result:
        self._tell(f"{record.name}: {cause}; going back to {short(record.old)}")
        record.phase, record.reason = "rolling-back", str(cause)
        record.fault = "release" if isinstance(cause, ReleaseError) else "host"
        with suppress(HostError):  # a full disk must not bar the way back
            self._state.write_record(record)
        return self._undo(record, binary)

    def _undo(self, record: Record, binary: Binary) -> Result:
        so_far = "the previous release cannot be restored"
        try:
            try:
                self._restore(record)
                so_far = "the previous release is restored, but its service is not"
                came_back, words, pids = self._resume(record, binary)
            except BackupLost as error:  # what is there stays, its restart is tried again, and the way forward is free
                record.old = record.new = inspect(record.target).md5 or ""
                record.fault, came_back, words, pids = "host", False, f"{error}, so {short(record.new)} stays", {}
            # What is down now was left so by us; what is later, by an operator.
            down = [] if came_back else self._in_state(record.processes, DOWN)
        except (OSError, HostError) as error:
            words = f"{record.reason}; {so_far}: {error}; the next run goes on with it"
            return Result(record.name, "failed", False, record.old, record.new, error=words, kind="roll-back")
        self._state.memory(record.name).down = down
        return self._conclude(record, came_back, words, pids)

    def _in_state(self, names: Collection[str], states: tuple[str, ...]) -> list[str]:
        """Those of `names` that are in one of `states` now; none is one that supervisord has lost."""
        found = self._supervisor.processes() if names else {}
        return [name for name in names if name in found and found[name].state in states]

    def _restore(self, record: Record) -> None:
        if record.old is not None and inspect(record.target).md5 != record.old:
            part = part_path(record.target, record.name, record.old)
            self._backups.stage(record.name, record.old, part)
            return swap(part, record.target)
        if record.old is None:
            with suppress(FileNotFoundError):
                os.unlink(record.target)
        fsync_folder(os.path.dirname(record.target))  # a run that was killed may not have come to it

    def _resume(self, record: Record, binary: Binary) -> tuple[bool | None, str, dict[str, int]]:
        """Give the previous release its service back.

        Returns:
            whether it came up healthy (None where that is not waited for), what is to be said of it, the pids if so.
        """
        if record.old is None:
            if trying := self._in_state(record.processes, TRYING):
                self._supervisor.stop(trying)
            return None, "the file is removed again", {}
        if not record.healthy:
            if record.processes:
                with suppress(Stuck):
                    self._supervisor.restart(record.processes)
            return None, f"{short(record.old)} is back; its service was not well before either", {}
        try:
            before, restart = dict.fromkeys(record.processes, 0), not self._runs(record)
            pids = self._bring_up(binary, before, probed=record.probed, restart=restart)
        except (ReleaseError, Stuck) as error:
            return False, f"{short(record.old)} is back, but does not come up either ({error}): look at the host", {}
        return True, f"{short(record.old)} is back" + (" and runs" if record.processes else ""), pids

    def _conclude(self, record: Record, came_back: bool | None, words: str, pids: dict[str, int]) -> Result:
        memory, now = self._state.memory(record.name), time.time()
        strikes = memory.strikes.get(record.new, 0)
        had = {"had_previous": record.old is not None, "healthy_before": record.healthy}
        verdict = plan.judge(record.fault, **had, came_back=came_back, strikes=strikes)
        tries, kind = "", "host"
        if verdict == "hold":
            memory.hold(record.new, record.reason, now)
            again = f"bin-proxy rollback {record.name} --to {short(record.new)} tries it again"
            tries = f"; held: {again if record.by == 'operator' else plan.way_out(record.name)}"
            kind = "release"
        elif verdict == "strike":
            memory.strikes[record.new] = strikes + 1
        if came_back is False:
            memory.unwell = plan.after_restart(record.new, 1, record.reason, now)
            kind = "restart"
        outcome, what, failed = "failed", f"kept {record.new}", ""
        if record.new != record.old:
            plan.leave(memory, record.new, now)
            outcome, what = "rolled-back", f"rolled back {record.new} -> {record.old or '-'}"
            failed = f"release {short(record.new)} failed: "
        seconds = now - record.since
        pid = f"pid {_pids(record.processes)} -> {_pids(pids)}"
        self._log(f"{record.name}: {what}, {pid}, {seconds:.1f} s: {record.reason}; {words}")
        error = f"{failed}{record.reason}; {words}{tries}"
        result = Result(record.name, outcome, False, record.old, record.new, seconds, error, kind)
        return self._close(record, record.old, result)

    def recover(self, name: str, record: Record | None, binary: Binary | None) -> Result | None:
        """Resolve an update that was interrupted.

        Args:
            name: of the binary.
            record: what was begun; None where it cannot be read.
            binary: the manifest's entry; None where it has left the manifest.

        Returns:
            what became of it; None where nothing had happened yet.
        """
        try:
            if record is None:
                if binary is None:
                    self._state.close_record(name)
                    return None
                record = self._unknown_record(binary)
            times = self._settings.min_healthy, self._settings.health_timeout
            return self._recover(record, binary or Binary(name, record.target, *times, services=()))
        except BinProxyError as error:
            words = f"an interrupted update cannot be resolved yet: {error}"
            return Result(name, "failed", False, error=words, kind="recovery")

    def _unknown_record(self, binary: Binary) -> Record:
        """What an unreadable record may have begun: at the worst a restart that stopped the service."""
        slot = inspect(binary.path)
        processes = {process.name: 0 for process in self._supervisor.of(binary, fresh=True)}
        reason = "the record of an interrupted update could not be read"
        since = (True, False, "sync", time.time(), "rolling-back", "host", reason)
        record = Record(binary.name, slot.target, slot.md5, slot.md5 or "", 0, processes, *since)
        self._state.write_record(record)
        return record

    def _recover(self, record: Record, binary: Binary) -> Result | None:
        found = self._supervisor.processes() if record.processes else {}
        # A program that supervisord has lost meanwhile must not keep this open for ever.
        record.processes = {name: pid for name, pid in record.processes.items() if name in found}
        slot = inspect(record.target)
        untouched = (slot.status.st_ino if slot.status else 0) == record.inode
        untouched &= all((found[name].pid or 0) == pid for name, pid in record.processes.items())
        step = plan.decide_recovery(record, slot.md5, untouched=untouched)
        self._tell(f"{record.name}: an update to {short(record.new)} was interrupted: {step}")
        if step == "forget":
            self._log(f"{record.name}: an update to {record.new} was interrupted before it changed anything")
            self._prune(record, slot.md5)
            self._state.close_record(record.name)
            return None
        if step == "finish":
            return self._settle(record, binary, restart=not self._runs(record))
        if step == "check":
            record.old = record.new = str(slot.md5)
        if record.phase == "activating":
            record.phase, record.fault = "rolling-back", "host"
            record.reason = "it was interrupted" + (", and another file was put there" if step == "check" else "")
            self._state.write_record(record)
        return self._undo(record, binary)

    def mend(self, binary: Binary, now: float, *, at_once: bool) -> None:
        """Try again to start the previous release, after it and another one both failed.

        Args:
            binary: one whose memory says that it is unwell.
            now: Unix time.
            at_once: without waiting for the end of its pause.

        Raises:
            HostError: supervisord cannot be asked.
        """
        memory = self._state.memory(binary.name)
        assert memory.unwell
        processes, healthy, probed = self._look_at_service(binary, self._supervisor.settled(binary))
        if not healthy and not at_once and not plan.is_due(memory.unwell.until, now):
            return
        before = dict.fromkeys(processes, 0) if healthy else processes
        memory.down = [] if healthy else list(processes)  # in case that we are killed between a stop and a start
        self._state.save()
        try:
            pids = self._bring_up(binary, before, probed=probed, restart=not healthy)
        except (ReleaseError, Stuck) as error:
            last = memory.unwell
            memory.unwell = plan.after_restart(last.md5, last.count + 1, str(error), time.time())
            memory.down = self._in_state(processes, DOWN)
        else:
            how = "runs again" if pids or not processes else "was stopped by an operator"
            self._log(f"{binary.name}: {how}, pid {_pids(pids)}, after {memory.unwell.count} failed restarts")
            memory.unwell, memory.down = None, []
        self._state.save()


def _pids(processes: dict[str, int]) -> str:
    return ",".join(map(str, processes.values())) or "-"
