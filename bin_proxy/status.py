"""What an operator wants to see: what runs, why it is not the latest, what to type next. Read only."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click

from bin_proxy.errors import BinProxyError, HostError, clean
from bin_proxy.guard import is_locked
from bin_proxy.manifest import Binary
from bin_proxy.memory import Answer, LastSync
from bin_proxy.settings import Settings
from bin_proxy.slot import Backups, Slot, inspect
from bin_proxy.state import State
from bin_proxy.supervisor import Process, Supervisor

DEAD = ("FATAL", "UNKNOWN", "BACKOFF", "EXITED")
_WORST = (*DEAD, "STOPPING", "STARTING", "STOPPED", "RUNNING")
_COLOURS = {"current": "green", "paused": "cyan", "updating": "cyan", "outdated": "yellow", "unknown": "yellow"}
_HEAD = ("NAME", "STATE", "INSTALLED", "LATEST", "SERVICE", "UPDATED")
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_WELL = ("current", "paused", "updating")
_QUIET_FOR = 300.0


@dataclass(frozen=True)
class View:
    """One binary: `row` is what `status --json` prints, `cells` stand in the table.

    `findings` tell why it is as it is and what to type next, each with whether that is as it should be."""

    row: dict[str, Any]
    cells: tuple[str, ...]
    findings: list[tuple[bool, str]]
    well: bool


def rfc3339(at: float | None) -> str | None:
    """Unix time in seconds as people and programs read it, with this host's offset."""
    return None if at is None else datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")


def restart_pending(pid: int, slot: Slot) -> bool | None:
    """Whether a process executes another file than the one installed, if one is; None where that cannot be seen.

    An interpreter or a wrapper is no finding: only the file's own path is compared (proc_pid_exe(5)).
    """
    try:
        link = os.readlink(f"/proc/{pid}/exe")
        if link.removesuffix(" (deleted)") != slot.target:
            return False
        return slot.status is not None and os.stat(f"/proc/{pid}/exe").st_ino != slot.status.st_ino
    except OSError:
        return None


def survey(settings: Settings, binaries: tuple[Binary, ...], *, offline: bool) -> tuple[list[View], LastSync | None]:
    """Look at everything, touch nothing.

    Args:
        settings: every setting.
        binaries: those to look at.
        offline: compare with bin-manager's last known answer instead of asking.

    Returns:
        what was found of each binary; and the last sync.

    Raises:
        UsageError: bin-manager cannot be asked with these settings.
        HostError: STATE_DIR cannot be read.
    """
    asked = None if offline else _ask(settings, binaries)
    running = is_locked(settings.state_dir)
    state = State(settings.state_dir, ())
    running = running or is_locked(settings.state_dir)  # a sync that ended or began while its records were read
    supervisor = Supervisor(settings.supervisorctl, settings.restart_timeout, lambda line: None)
    views = [_view(binary, state, supervisor, asked, running) for binary in binaries]
    return views, state.cache.last_sync


def _ask(settings: Settings, binaries: tuple[Binary, ...]) -> dict[str, Answer | BinProxyError]:
    """By name, what bin-manager answered, or what went wrong."""
    from bin_proxy.bin_manager import BinManager  # imports requests, which an offline status does without
    from bin_proxy.workers import Workers

    api = BinManager(settings)
    limit = 3 * settings.http_timeout + 1
    workers = Workers(settings.jobs, lambda seconds: HostError(f"bin-manager did not answer within {seconds:g} s"))
    for binary in binaries:

        def latest(job: object, binary: Binary = binary) -> Answer:
            return Answer(binary.version, api.latest(binary).md5, time.time())

        workers.submit(binary.name, limit, latest)
    found: dict[str, Answer | BinProxyError] = {}
    while workers.busy():
        found.update(workers.results(0.2))
    return found


def _service(binary: Binary, processes: list[Process], slot: Slot | None) -> tuple[dict[str, Any] | None, str]:
    """The binary's service as JSON has it, and for how long it has run, in supervisor's words."""
    name = ", ".join(binary.services or (process.name for process in processes))
    if not name:
        return None, ""
    worst = min(processes, key=lambda process: _WORST.index(process.state), default=None)
    pending = [restart_pending(process.pid, slot) for process in processes if process.pid and slot]
    service = {
        "name": name,
        "state": worst and worst.state,
        "pid": processes[0].pid if len(processes) == 1 else None,
        "restartPending": True if True in pending else None if None in pending or not processes else False,
    }
    return service, worst.words.partition("uptime ")[2] if worst else ""


def _view(
    binary: Binary, state: State, supervisor: Supervisor, asked: dict[str, Answer | BinProxyError] | None, running: bool
) -> View:
    name, memory = binary.name, state.memory(binary.name)
    errors: list[str] = []
    processes: list[Process] = []
    slot, latest, age = None, "", ""
    try:
        slot = inspect(binary.path, state.cache.digests.get(binary.path))
        processes = supervisor.of(binary)
    except HostError as error:
        errors.append(str(error))
    answer = state.cache.answers.get(name) if asked is None else asked[name]
    if isinstance(answer, BinProxyError):
        errors.append(str(answer))
    elif answer and answer.version == binary.version:  # not of the time before the manifest named another version
        latest, age = answer.md5, f" ({_ago(answer.at)} ago)" if asked is None else ""
    installed = slot.md5 if slot else None
    service, uptime = _service(binary, processes, slot)
    pause, way_out = state.pause_of(name, time.time())
    hold = next((hold for hold in memory.holds if hold.md5 == latest != installed), None)
    retry = memory.unwell or (memory.retries.get(latest) if latest != installed else None)
    begun = name in state.records
    states: dict[str, object] = {"updating": begun and running, "interrupted": begun, "paused": pause}
    states |= {"unknown": not latest or not slot, "missing": not installed}
    states |= {"held": hold, "current": installed == latest}
    shown = next((name for name, applies in states.items() if applies), "outdated")
    by_operator = bool(shown == "held" and hold and hold.by == "operator")
    splay = shown == "outdated" and latest in memory.seen and not retry
    # What the last sync met counts where it is not of the time before bin-manager answered, or of another release.
    troubles = [
        trouble.text
        for key, trouble in state.cache.troubles.items()
        if trouble.name == name and (shown == "interrupted" or key.endswith(latest))
    ]
    told = troubles[0] if troubles and shown not in _WELL and not splay else None
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
        "retryAt": rfc3339(retry.until if retry else None),
        "updatedAt": rfc3339(memory.updated_at),
        "backups": Backups(state.folder).listed(name, memory.backups),
        "error": "; ".join(errors) or told,
    }
    findings = _findings(row, errors, way_out, by_operator)
    well = (by_operator or splay or shown in _WELL) and all(fine for fine, _ in findings)
    return View(row, _cells(row, uptime, age, by_operator), findings, well)


def _findings(row: dict[str, Any], errors: list[str], way_out: str, by_operator: bool) -> list[tuple[bool, str]]:
    held, paused, service = row["held"], row["paused"], row["service"]
    again = f"bin-proxy sync --only {row['name']}"
    found = [(False, error) for error in errors]
    if paused:
        until = f" until {_plain(paused['until'])}" if paused["until"] else ""
        why = paused["reason"] or "no reason given"
        found.append((True, f"paused since {_plain(paused['since'])}{until} ({why}): {way_out}"))
    elif held:
        why = f"{held['md5'][:8]} is held since {_plain(held['since'])}: {held['reason']}"
        found.append((by_operator, f"{why}; to try it again: {again} --retry-held"))
    elif row["error"]:
        found = found or [(False, row["error"])]
    elif row["state"] in ("missing", "outdated") and not row["retryAt"]:
        found.append((True, f"the next sync installs {row['latestMd5'][:8]}; now: {again}"))
    if row["retryAt"]:
        found.append((True, f"tried again at {_plain(row['retryAt'])}; now: {again} --retry-held"))
    if row["state"] == "interrupted":
        found.append((False, f"an update was cut off: {again} finishes or undoes it"))
    if service and service["restartPending"] and row["state"] not in ("updating", "interrupted"):
        again = f"supervisorctl restart {service['name']}"
        found.append((False, f"the service runs another file than the installed one: {again}"))
    if service and service["state"] in DEAD:
        found.append((False, f"service {service['name']} is {service['state']}: supervisorctl tail {service['name']}"))
    return found


def _cells(row: dict[str, Any], uptime: str, age: str, by_operator: bool) -> tuple[str, ...]:
    service, words = row["service"], ["-"]
    if service:
        pending = "(restart pending)" if service["restartPending"] else ""
        words = [service["state"] or "?", str(service["pid"] or ""), uptime, pending]
    latest = (row["latestMd5"] or "?")[:8] + age
    state = "held by operator" if by_operator else row["state"]
    updated = _plain(row["updatedAt"] or "-")[:16]
    cells = (row["name"], state, (row["installedMd5"] or "-")[:8], latest, " ".join(filter(None, words)), updated)
    return tuple(clean(cell) for cell in cells)


def to_json(views: list[View], last_sync: LastSync | None) -> dict[str, Any]:
    """What `survey` found, as `status --json` prints it."""
    last = {"at": rfc3339(last_sync.at), "exitCode": last_sync.code} if last_sync else None
    return {"binaries": [view.row for view in views], "lastSync": last}


def table(views: list[View], width: int) -> list[str]:
    """Lay the binaries out, with colours; a table of more than `width` columns becomes a block for each."""
    widths = [max(map(len, column)) for column in zip(_HEAD, *(view.cells for view in views), strict=True)]
    if sum(widths) + 2 * len(widths) > width:
        lines = []
        for view in views:
            lines.append(f"{view.cells[0]}: {_paint(view.cells[1], view)}")
            lines += [f"  {title.lower():9} {cell}" for title, cell in list(zip(_HEAD, view.cells, strict=True))[2:]]
        return lines
    lines = ["  ".join(map(str.ljust, _HEAD, widths))]
    for view in views:
        padded = list(map(str.ljust, view.cells, widths))
        lines.append("  ".join([padded[0], _paint(padded[1], view), *padded[2:]]))
    return [line.rstrip() for line in lines]


def _paint(text: str, view: View) -> str:
    return click.style(text, fg=_COLOURS.get(view.row["state"], "red"), bold=True)


def judge_last_sync(last_sync: LastSync | None) -> tuple[bool, str]:
    """Whether the last sync is as recent as it should be, and when it was and how it ended."""
    if not last_sync:
        return False, "none yet: does cron run bin-proxy sync?"
    at, code = last_sync
    recent = -60 < time.time() - at < _QUIET_FOR
    text = f"{_ago(at)} ago ({_plain(str(rfc3339(at)))}), exit {code}"
    return recent, text if recent else f"{text}: does cron run it?"


def _plain(at: str) -> str:
    """An RFC 3339 time as people read it."""
    return at[:19].replace("T", " ")


def _ago(at: float) -> str:
    seconds = max(0, int(time.time() - at))
    size, unit = next((pair for pair in _UNITS if seconds >= pair[0]), (1, "s"))
    return f"{seconds // size} {unit}"
