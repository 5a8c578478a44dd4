"""What an operator wants to see: what runs, why it is not the latest, what to type next. Read only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import click

from bin_proxy.config.settings import Settings
from bin_proxy.errors import BinProxyError, HostError, clean
from bin_proxy.host.backups import Backups
from bin_proxy.host.installed import Slot, inspect
from bin_proxy.host.lock import is_locked
from bin_proxy.host.supervisor import DEAD, Process, Supervisor
from bin_proxy.output.report import Finding, when
from bin_proxy.policy.model import Answer, Binary, LastSync
from bin_proxy.store.state import State

_WORST = (*DEAD, "STOPPING", "STARTING", "RUNNING", "STOPPED")
_COLOURS = {"current": "green", "paused": "cyan", "updating": "cyan", "outdated": "yellow", "unknown": "yellow"}
_Answers = dict[Binary, Answer | BinProxyError]
_HEAD = ("NAME", "STATE", "INSTALLED", "LATEST", "SERVICE", "UPDATED")


class View(NamedTuple):
    """One binary: `row` is what `status --json` prints, `cells` stand in the table.

    `findings` tell why it is as it is and what to type next; all is well where each of them is."""

    row: dict[str, Any]
    cells: tuple[str, ...]
    findings: list[Finding]


def rfc3339(at: float | None) -> str | None:
    """Unix time in seconds as people and programs read it, with this host's offset."""
    return None if at is None else datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")


def restart_pending(pid: int | None, slot: Slot) -> bool | None:
    """Whether a process executes another file than the one installed, if one is; None where that cannot be seen.

    An interpreter or a wrapper is no finding: only the file's own path is compared (proc_pid_exe(5)).
    """
    if not pid or not slot.status:
        return False
    try:
        ours = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)") == slot.target
        return ours and os.stat(f"/proc/{pid}/exe").st_ino != slot.status.st_ino
    except OSError:
        return None


def survey(settings: Settings, binaries: tuple[Binary, ...], *, offline: bool) -> tuple[list[View], State]:
    """Look at everything, touch nothing.

    Args:
        settings: every setting.
        binaries: those to look at.
        offline: compare with bin-manager's last known answer instead of asking.

    Returns:
        what was found of each binary; and what is remembered of all.

    Raises:
        UsageError: bin-manager cannot be asked with these settings.
        HostError: STATE_DIR cannot be read.
    """
    asked = None if offline else _ask(settings, binaries)
    running = is_locked(settings.state_dir)
    state = State(settings.state_dir, ())
    supervisor = Supervisor(settings.supervisorctl, settings.restart_timeout, lambda line: None)
    return [_view(binary, state, supervisor, asked, running) for binary in binaries], state


def _ask(settings: Settings, binaries: tuple[Binary, ...]) -> _Answers:
    """What bin-manager answers for each, or what goes wrong."""
    from bin_proxy.server.client import BinManager  # imports requests, which an offline status does without
    from bin_proxy.update.workers import Workers

    workers = Workers(settings.jobs)
    api = BinManager(settings, lambda line: None, workers.until)

    def latest(binary: Binary) -> Answer:
        return Answer(binary.version, api.latest(binary).md5, time.time())

    for binary in binaries:
        workers.submit(binary, partial(latest, binary))
    found: _Answers = {}
    while workers.busy():
        found.update(workers.results(0.2))
    return found


def _service(binary: Binary, processes: list[Process], slot: Slot) -> tuple[dict[str, Any] | None, str, str]:
    """The binary's service as JSON has it, and as the table does; of several processes, the worst, and its name."""
    if not processes:
        return None, "-", ""
    worst = min(processes, key=lambda process: _WORST.index(process.state))
    name = " ".join(binary.services or (process.name for process in processes))
    seen = [restart_pending(process.pid, slot) for process in processes]
    pending = True if True in seen else None if None in seen else False
    uptime = worst.words.partition("uptime ")[2]
    words = f"{worst.state} {worst.pid or ''} {uptime} {'(restart pending)' if pending else ''}"
    row = {"name": name, "state": worst.state, "pid": worst.pid, "restartPending": pending}
    return row, " ".join(words.split()), worst.name


def _view(binary: Binary, state: State, supervisor: Supervisor, asked: _Answers | None, running: bool) -> View:
    name, memory = binary.name, state.memory(binary.name)
    errors: list[str] = []
    slot, service, service_words, worst, latest, age = None, None, "?", "", "", ""
    try:
        slot = inspect(binary.path, state.cache.digests.get(binary.path))
        service, service_words, worst = _service(binary, supervisor.of(binary), slot)
    except HostError as error:
        errors.append(str(error))
    answer = state.cache.answers.get(name) if asked is None else asked[binary]
    if isinstance(answer, BinProxyError):
        errors.append(f"{answer}; correct BIN_MANAGER_API or the manifest, or mend bin-manager")
    elif answer and answer.version == binary.version:  # not of the time before the manifest named another version
        latest, age = answer.md5, f" ({_ago(answer.at)} ago)" if asked is None else ""
    installed = slot.md5 if slot else None
    pause, way_out = state.pause_of(name)
    hold = memory.hold_on(latest) if latest != installed else None
    retry = memory.unwell or (memory.retries.get(latest) if latest != installed else None)
    due = retry.until if retry else memory.due.get(latest, 0.0) if latest != installed else 0.0
    splayed = not retry and due > time.time()
    begun, updating = name in state.records, name in state.records and running
    states: dict[str, object] = {"updating": updating, "interrupted": begun, "paused": pause}
    states |= {"unknown": not latest or not slot, "missing": not installed}
    states |= {"held": hold, "current": installed == latest}
    shown = next((name for name, applies in states.items() if applies), "outdated")
    if not (errors or updating or pause or hold):
        # What the last sync met, where it is not of the time before bin-manager answered, or of another release.
        troubles = state.cache.troubles.items()
        errors = [told.text for key, told in troubles if told.name == name and (begun or key.endswith(latest))][:1]
        errors = errors or ([memory.unwell.reason] if memory.unwell else [])
    row = {
        "name": name,
        "path": binary.path,
        "version": binary.version,
        "state": shown,
        "installedMd5": installed,
        "latestMd5": latest or None,
        "currentMd5": binary.reported,
        "service": service,
        "held": hold and {"md5": hold.md5, "reason": hold.reason, "since": rfc3339(hold.since)},
        "paused": pause and {"reason": pause.reason, "since": rfc3339(pause.since), "until": rfc3339(pause.until)},
        "retryAt": rfc3339(due) if retry or splayed else None,
        "updatedAt": rfc3339(memory.updated_at),
        "backups": Backups(state.folder).listed(name, memory.backups),
        "error": "; ".join(errors) or None,
    }
    by_operator = shown == "held" and hold is not None and hold.by == "operator"
    words = "held by operator" if by_operator else shown
    updated = when(memory.updated_at)[:16] if memory.updated_at else "-"
    cells = (name, words, (installed or "-")[:8], (latest or "?")[:8] + age, service_words, updated)
    findings = [(False, error) for error in errors]
    findings += _explain(row, way_out, supervisor.typed, worst, by_operator=by_operator, splayed=splayed)
    return View(row, tuple(map(clean, cells)), [Finding(well, name, text) for well, text in findings])


def _explain(
    row: dict[str, Any], way_out: str, supervisorctl: str, worst: str, *, by_operator: bool, splayed: bool
) -> Iterator[tuple[bool, str]]:
    """Why the binary is as it is and what to type next, each with whether that is as it should be."""
    again, state, service = f"bin-proxy sync --only {row['name']}", row["state"], row["service"]
    if state == "interrupted":
        yield False, f"an update was cut off: {again} finishes or undoes it"
    elif pause := row["paused"]:
        until = f" until {pause['until']}" if pause["until"] else ""
        yield True, f"paused since {pause['since']}{until} ({pause['reason'] or 'no reason given'}): {way_out}"
    elif (hold := row["held"]) and state != "updating":
        why = f"{hold['md5'][:8]} is held since {hold['since']}: {hold['reason']}"
        yield by_operator, f"{why}; to try it again: {again} --retry-held"
    elif state in ("unknown", "missing", "outdated") and not row["error"]:
        after = f" after {row['retryAt']}" if splayed else ""
        release = (row["latestMd5"] or "")[:8] or "what bin-manager names"
        yield splayed, f"the {'first' if splayed else 'next'} sync{after} installs {release}; now: {again}"
    if service and service["restartPending"] and state not in ("updating", "interrupted"):
        yield False, f"another file than the installed one runs: {supervisorctl} restart {service['name']}"
    if service and service["state"] in DEAD:
        yield False, f"its service is {service['state']}: {supervisorctl} tail {worst}"


def to_json(views: list[View], last_sync: LastSync | None) -> dict[str, Any]:
    """What `survey` found, as `status --json` prints it."""
    last = {"at": rfc3339(last_sync.at), "exitCode": last_sync.code} if last_sync else None
    return {"binaries": [view.row for view in views], "lastSync": last}


def table(views: list[View], width: int) -> list[str]:
    """Lay the binaries out, a row each, with colours; the last columns are left out where `width` is too small."""
    widths = [max(map(len, column)) for column in zip(_HEAD, *(view.cells for view in views), strict=True)]
    while len(widths) > 2 and sum(widths) + 2 * len(widths) > width + 2:
        widths.pop()
    lines = ["  ".join(map(str.ljust, _HEAD, widths))]
    for view in views:
        name, state, *rest = map(str.ljust, view.cells, widths)
        lines.append("  ".join([name, click.style(state, fg=_COLOURS.get(view.row["state"], "red"), bold=True), *rest]))
    return [line.rstrip() for line in lines]


def judge_last_sync(last_sync: LastSync | None) -> tuple[bool, str]:
    """Whether the last sync is as recent as it should be, and when it was and how it ended."""
    if not last_sync:
        return False, "last sync: none yet: does cron run bin-proxy sync?"
    recent = -60 < time.time() - last_sync.at < 300
    text = f"last sync: {_ago(last_sync.at)} ago ({when(last_sync.at)}), exit {last_sync.code}"
    return recent, text if recent else f"{text}: does cron run it?"


def _ago(at: float) -> str:
    return str(timedelta(seconds=max(0, int(time.time() - at))))
