"""An operator's decisions: go back to a kept release, pause, resume."""

from __future__ import annotations

import re
import time
from dataclasses import replace

from bin_proxy.atomic import make_folder
from bin_proxy.errors import HostError, UsageError, host_error
from bin_proxy.guard import Signals, locked
from bin_proxy.manifest import Binary
from bin_proxy.plan import Result, short
from bin_proxy.report import Report
from bin_proxy.settings import Settings
from bin_proxy.slot import discard, inspect, part_path
from bin_proxy.state import Pause, State
from bin_proxy.updater import Updater

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def roll_back(
    settings: Settings, binaries: tuple[Binary, ...], name: str, to: str | None, report: Report, signals: Signals
) -> Result:
    """Go back to the previous release, or a kept one, with the care of an update; the one that is left is held.

    Args:
        settings: every setting.
        binaries: the whole manifest.
        name: of the binary.
        to: the MD5, or its beginning; None for the newest that is kept.
        report: who is told.
        signals: held back meanwhile.

    Raises:
        UsageError: nothing is kept, or not that.
        Busy: another run is at work for more than 60 s.
        HostError: nothing was changed.
    """
    with locked(settings.state_dir, 60):
        binary = next(binary for binary in binaries if binary.name == name)
        state = State(settings.state_dir, tuple(binary.name for binary in binaries))
        state.prepare()
        for line in state.set_aside():
            report.tell(line)
        updater = Updater(settings, state, report)
        with signals.held():
            if binary.name in state.records:
                recovered = updater.recover(binary.name, state.records[binary.name], binary)
                if recovered and binary.name in state.records:
                    return recovered
        slot = inspect(binary.path, None)
        kept = [md5 for md5 in updater.backups_of(binary.name) if md5 != slot.md5]
        there = f"kept are: {', '.join(kept)}" if kept else "no other release is kept"
        matching = [md5 for md5 in kept if md5.startswith(to.lower())] if to else [] if to == "" else kept[:1]
        if len(matching) != 1:
            raise UsageError(f"{binary.name} cannot go back{f' to {to}' if to else ''}: {there}")
        updater.preflight(binary, slot)
        part = part_path(slot.target, binary.name, matching[0])
        state.memory(binary.name).parts.append(part)
        state.save()
        with signals.held():
            try:
                updater.stage_backup(binary, slot, matching[0])
                result = updater.activate(binary, slot, matching[0], "operator")
                words = "; ".join([result.error or f"it is back at {short(matching[0])}, but", *updater.troubles])
                return replace(result, well=False, error=words) if updater.troubles else result
            except HostError:
                discard(part)
                raise


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 30m, 2h, 1d or 1h30m.

    Raises:
        UsageError: it is none.
    """
    if not re.fullmatch(r"([0-9]{1,6}[smhd])+", text):
        raise UsageError(f"{text!r} is no duration: write 30m, 2h, 1d or 1h30m")
    seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]+)([smhd])", text))
    if seconds > 3650 * 86400:
        raise UsageError(f"{text!r} is longer than ten years: leave --for out")
    return seconds


def pause(settings: Settings, names: tuple[str, ...], reason: str, seconds: float | None) -> list[str]:
    """Leave binaries as they are, or the whole host where no names are given.

    Args:
        settings: every setting.
        names: of binaries.
        reason: for whoever comes next.
        seconds: how long; None for no end.

    Returns:
        what to tell.

    Raises:
        HostError: it cannot be remembered.
    """
    try:
        make_folder(settings.state_dir, 0o755)
    except OSError as error:
        raise host_error(f"make {settings.state_dir}", error) from error
    state, now = State(settings.state_dir, ()), time.time()
    until = None if seconds is None else now + seconds
    for name in names or ("*",):
        state.pauses[name] = Pause(reason, now, until)
    state.save_pauses()
    end = "" if until is None else time.strftime(" until %Y-%m-%d %H:%M:%S", time.localtime(until))
    what = ", ".join(names) or "all binaries of this host"
    return [f"{what}: paused{end}; bin-proxy resume{''.join(f' {name}' for name in names)} ends it"]


def resume(settings: Settings, names: tuple[str, ...]) -> list[str]:
    """End the pause of binaries, or that of the whole host where no names are given.

    Returns:
        what to tell.

    Raises:
        HostError: it cannot be remembered.
    """
    state = State(settings.state_dir, ())
    lines = []
    for name in names or ("*",):
        what = "this host" if name == "*" else name
        lines.append(f"{what}: {'resumed' if state.pauses.pop(name, None) else 'was not paused'}")
    if any(line.endswith("resumed") for line in lines):
        state.save_pauses()
    if state.pauses:
        still = ", ".join("the whole host" if name == "*" else name for name in state.pauses)
        lines.append(f"still paused: {still}")
    return lines


def describe(result: Result) -> str:
    """A finished rollback in one line, with the hold that it leaves and the way to lift it."""
    done = f"{result.name}: back at {short(result.to_md5)} in {result.seconds:.1f} s"
    if not result.from_md5:
        return done
    lift = f"bin-proxy sync --only {result.name} --retry-held, or bin-proxy rollback {result.name} --to"
    return f"{done}; {short(result.from_md5)} is held until {lift} {short(result.from_md5)}"
