"""What an operator wants to see: what runs, why it is not the latest, what to type next. Read only."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from typing import Any

import click

from bin_proxy.errors import BinProxyError, HostError, clean
from bin_proxy.guard import is_locked
from bin_proxy.manifest import Binary
from bin_proxy.settings import Settings
from bin_proxy.slot import Backups, Slot, inspect
from bin_proxy.state import State
from bin_proxy.supervisor import Process, Supervisor, choose

_WORST = ("FATAL", "UNKNOWN", "BACKOFF", "EXITED", "STOPPING", "STARTING", "STOPPED", "RUNNING")
_COLOURS = {"current": "green", "paused": "cyan", "updating": "cyan", "outdated": "yellow", "unknown": "yellow"}


def rfc3339(at: float | None) -> str | None:
    """Unix time in seconds as people and programs read it, with this host's offset."""
    try:
        return None if at is None else datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None  # beyond the calendar: a state file of another hand


def restart_pending(pid: int, slot: Slot) -> bool | None:
    """Whether a process executes another file than the one installed; None where that cannot be seen.

    An interpreter or a wrapper is no finding: only the file's own path is compared (proc_pid_exe(5)).
    """
    try:
        link = os.readlink(f"/proc/{pid}/exe")
        if link.removesuffix(" (deleted)") != slot.target:
            return False
        return slot.status is None or os.stat(f"/proc/{pid}/exe").st_ino != slot.status.st_ino
    except OSError:
        return None


def survey(settings: Settings, binaries: tuple[Binary, ...], *, offline: bool) -> dict[str, Any]:
    """Look at everything, touch nothing.

    Args:
        settings: every setting.
        binaries: those to look at.
        offline: compare with bin-manager's last known answer instead of asking.

    Returns:
        what `status --json` prints; `well` and `answeredAt` (Unix time) of each binary besides.

    Raises:
        HostError: STATE_DIR cannot be read.
    """
    running = is_locked(settings.state_dir)
    state = State(settings.state_dir, ())
    answers: dict[str, Any] = {name: answer for name, answer in state.cache.answers.items() if offline}
    if not offline:
        answers = _ask(settings, binaries)
    listing: dict[str, Process] | HostError | None = None
    if settings.supervisorctl and any(binary.services != () for binary in binaries):
        try:
            listing = Supervisor(settings.supervisorctl, settings.restart_timeout, lambda line: None).processes()
        except HostError as error:
            listing = error
    running = running or is_locked(settings.state_dir)
    rows = [_row(binary, state, answers.get(binary.name), listing, running, settings) for binary in binaries]
    last = state.cache.last_sync
    last_sync = {"at": rfc3339(last[0]), "exitCode": int(last[1])} if len(last) == 2 else None
    return {"binaries": rows, "lastSync": last_sync}


def _ask(settings: Settings, binaries: tuple[Binary, ...]) -> dict[str, Any]:
    from bin_proxy.bin_manager import BinManager, Release  # imports requests, which an offline status does without
    from bin_proxy.workers import Workers

    api = BinManager(settings)
    limit = 3 * settings.http_timeout + 1
    workers = Workers(settings.jobs, lambda seconds: HostError(f"bin-manager did not answer within {seconds:g} s"))
    for binary in binaries:
        workers.submit(binary, limit, partial(_latest, api, binary))
    found: dict[str, Any] = {}
    while workers.busy():
        for binary, outcome in workers.results(0.2):
            release = isinstance(outcome, Release)
            found[binary.name] = [binary.version, outcome.md5, time.time()] if release else outcome
    return found


def _latest(api: Any, binary: Binary, job: object) -> Any:
    return api.latest(binary)


def _service(
    binary: Binary, listing: dict[str, Process] | HostError | None, slot: Slot | None
) -> tuple[dict[str, Any] | None, str]:
    """The binary's service as JSON has it, and supervisor's words about it."""
    name = ", ".join(binary.services or ())
    if not isinstance(listing, Mapping) or binary.services == ():
        return ({"name": name, "state": None, "pid": None, "restartPending": None} if name else None), ""
    processes = choose(listing, binary.services, binary.name)
    if not processes:
        return None, ""
    worst = min(processes, key=lambda process: _WORST.index(process.state))
    pending = [restart_pending(process.pid, slot) for process in processes if process.pid and slot]
    service = {
        "name": name or ", ".join(process.name for process in processes),
        "state": worst.state,
        "pid": processes[0].pid if len(processes) == 1 else None,
        "restartPending": True if True in pending else None if None in pending else False,
    }
    return service, worst.words


def _row(
    binary: Binary,
    state: State,
    answer: Any,
    listing: dict[str, Process] | HostError | None,
    running: bool,
    settings: Settings,
) -> dict[str, Any]:
    now, memory, errors = time.time(), state.remembered().get(binary.name), []
    slot, service, words = None, None, ""
    try:
        slot = inspect(binary.path, state.cache.digests.get(binary.path))
        service, words = _service(binary, listing, slot)
    except HostError as error:
        errors.append(str(error))
    if not settings.supervisorctl and binary.services:
        errors.append(f"there is no supervisorctl for {', '.join(binary.services)}: install it, or set SUPERVISORCTL")
    if isinstance(listing, HostError) and binary.services != ():
        errors.append(str(listing))
    if isinstance(answer, BinProxyError):
        errors.append(str(answer))
        answer = None
    if answer and answer[0] != binary.version:
        answer = None  # of the time before the manifest named another version
    installed, latest = slot.md5 if slot else None, answer[1] if answer else None
    pause, way_out = state.pause_of(binary.name, now)
    hold = next((hold for hold in memory.holds if hold.md5 == latest), None) if memory and latest != installed else None
    retry = memory.retries.get(latest) if memory and latest else None
    until = memory.unwell.until if memory and memory.unwell else retry.until if retry and latest != installed else None
    if binary.name in state.records:
        shown = "updating" if running else "interrupted"
    else:
        checks = (("paused", pause), ("unknown", not latest), ("missing", not installed), ("held", hold))
        shown = next((name for name, applies in checks if applies), "current" if installed == latest else "outdated")
    told = next((str(t[2]) for key, t in state.cache.troubles.items() if key.split(" ")[0] == binary.name), None)
    dead = service is not None and service["state"] in _WORST[:4]
    splay = bool(memory and latest in memory.seen and not retry)
    fine = (
        shown in ("current", "paused", "updating")
        or (hold and hold.by == "operator")
        or (splay and shown == "outdated")
    )
    backups = Backups(settings.state_dir).listed(binary.name, memory.backups if memory else [])
    return {
        "name": binary.name,
        "path": binary.path,
        "version": binary.version,
        "state": shown,
        "installedMd5": installed,
        "latestMd5": latest,
        "currentMd5": binary.reported,
        "service": service,
        "held": hold and {"md5": hold.md5, "reason": hold.reason, "since": rfc3339(hold.since)},
        "paused": pause and {"reason": pause.reason, "since": rfc3339(pause.since), "until": rfc3339(pause.until)},
        "retryAt": rfc3339(until),
        "updatedAt": rfc3339(memory.updated_at) if memory else None,
        "backups": backups,
        "error": "; ".join(errors) or (told if shown not in ("current", "paused") else None),
        "well": bool(fine and not errors and not dead and not (service and service["restartPending"])),
        "answeredAt": answer[2] if answer else None,
        "words": words,
        "wayOut": way_out,
        "byOperator": bool(hold and hold.by == "operator"),
    }


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """What `survey` found, less what is for the table alone."""
    extra = ("well", "answeredAt", "words", "byOperator", "wayOut")
    rows = [{key: value for key, value in row.items() if key not in extra} for row in found["binaries"]]
    return {**found, "binaries": rows}


def render(found: dict[str, Any], *, offline: bool, width: int) -> list[str]:
    """Lay out what `survey` found for people.

    Args:
        found: see `survey`.
        offline: the age of bin-manager's answers is told.
        width: columns; a table that does not fit becomes a block for each binary.

    Returns:
        the lines, with colours.
    """
    head = ("NAME", "STATE", "INSTALLED", "LATEST", "SERVICE", "UPDATED")
    table = [(head, "")] + [(_cells(row, offline), row["state"]) for row in found["binaries"]]
    widths = [max(len(cells[at]) for cells, _ in table) for at in range(len(head))]
    lines = []
    if sum(widths) + 2 * len(widths) <= width:
        for cells, state in table:
            padded = [cell.ljust(size) for cell, size in zip(cells, widths, strict=True)]
            padded[1] = _paint(padded[1], state)
            lines.append("  ".join(padded).rstrip())
    else:
        for cells, state in table[1:]:
            lines.append(f"{cells[0]}: {_paint(cells[1], state)}")
            lines += [f"  {title.lower():9} {cell}" for title, cell in list(zip(head, cells, strict=True))[2:]]
    for row in found["binaries"]:
        lines += [f"{row['name']}: {line}" for line in _advice(row)]
    last = found["lastSync"]
    ago = f"{_ago(datetime.fromisoformat(last['at']).timestamp())} ago ({_plain(last['at'])})" if last else ""
    lines.append(
        f"last sync: {ago}, exit {last['exitCode']}" if last else "last sync: none yet: does cron run bin-proxy sync?"
    )
    return [part for line in lines for part in _wrap(line, width)]


def _wrap(line: str, width: int) -> list[str]:
    if len(click.unstyle(line)) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _plain(at: str) -> str:
    """An RFC 3339 time as people read it."""
    return at[:19].replace("T", " ")


def _paint(text: str, state: str) -> str:
    return click.style(text, fg=_COLOURS.get(state, "red"), bold=True) if state else text


def _ago(at: float) -> str:
    seconds = max(0, int(time.time() - at))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _cells(row: dict[str, Any], offline: bool) -> tuple[str, ...]:
    latest = (row["latestMd5"] or "?")[:8]
    if offline and row["answeredAt"]:
        latest += f" ({_ago(row['answeredAt'])} ago)"
    service, words = row["service"], row["words"]
    shown = "-"
    if service:
        since = words.partition("uptime ")[2]
        shown = (
            f"{service['state'] or '?'}"
            + (f" {service['pid']}" if service["pid"] else "")
            + (f" {since}" if since else "")
        )
        shown += " (restart pending)" if service["restartPending"] else ""
    state = "held by operator" if row["byOperator"] else row["state"]
    updated = (row["updatedAt"] or "-")[:16].replace("T", " ")
    return tuple(clean(cell) for cell in (row["name"], state, (row["installedMd5"] or "-")[:8], latest, shown, updated))


def _advice(row: dict[str, Any]) -> list[str]:
    """Why a binary is as it is, and what to type next."""
    name, lines = row["name"], []
    if row["paused"]:
        until = f" until {_plain(row['paused']['until'])}" if row["paused"]["until"] else ""
        why = row["paused"]["reason"] or "no reason given"
        lines.append(f"paused since {_plain(row['paused']['since'])}{until} ({why}): {row['wayOut']}")
    elif row["held"]:
        lines.append(f"{row['held']['md5'][:8]} is held since {_plain(row['held']['since'])}: {row['held']['reason']}")
        lines.append(f"to try it again: bin-proxy sync --only {name} --retry-held")
    elif row["error"]:
        lines.append(str(row["error"]))
    elif row["state"] in ("missing", "outdated") and not row["retryAt"]:
        lines.append(f"the next sync installs {row['latestMd5'][:8]}; now: bin-proxy sync --only {name}")
    if row["retryAt"]:
        lines.append(f"tried again at {_plain(row['retryAt'])}; now: bin-proxy sync --only {name} --retry-held")
    if row["state"] == "interrupted":
        lines.append(f"an update was cut off: bin-proxy sync --only {name} finishes or undoes it")
    if row["service"] and row["service"]["restartPending"]:
        lines.append(
            f"the service runs another file than the installed one: supervisorctl restart {row['service']['name']}"
        )
    return [clean(line) for line in lines]
