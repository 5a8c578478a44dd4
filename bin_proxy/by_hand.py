"""An operator's decisions: go back to a kept release, pause, resume."""

from __future__ import annotations

import re
import time

from bin_proxy.atomic import make_folder
from bin_proxy.errors import HostError, UsageError, host_errors
from bin_proxy.guard import Signals, locked
from bin_proxy.manifest import Binary
from bin_proxy.memory import Pause
from bin_proxy.plan import short
from bin_proxy.report import Report, when
from bin_proxy.settings import Settings
from bin_proxy.slot import Backups, inspect, part_path
from bin_proxy.state import State
from bin_proxy.updater import Updater

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def roll_back(
    settings: Settings, binaries: tuple[Binary, ...], name: str, to: str | None, report: Report, signals: Signals
) -> str:
    """Go back to the previous release, or a kept one, with the care of an update; the one that is left is held.

    Args:
        settings: every setting.
        binaries: the whole manifest.
        name: of the binary.
        to: the MD5, or its beginning; None for the newest that is kept.
        report: who is told.
        signals: held back meanwhile.

    Returns:
        what was done, with the hold that it leaves and the way to lift it.

    Raises:
        UsageError: nothing is kept, or not that.
        Busy: another run is at work for more than 60 s.
        HostError: nothing was changed, it was undone, or not all of it could be done.
    """
    with locked(settings.state_dir, 60), signals.held():
        binary = next(binary for binary in binaries if binary.name == name)
        state = State(settings.state_dir, tuple(binary.name for binary in binaries))
        state.prepare()
        report.notes += state.set_aside()
        updater = Updater(settings, state, report)
        recovered = updater.recover(name, state.records[name], binary) if name in state.records else None
        if recovered and name in state.records:
            raise HostError(f"{name}: {recovered.error}")
        slot = inspect(binary.path)
        backups, memory = Backups(settings.state_dir), state.memory(name)
        kept = [md5 for md5 in backups.listed(name, memory.backups) if md5 != slot.md5]
        matching = kept[:1] if to is None else [md5 for md5 in kept if to and md5.startswith(to.lower())]
        if len(matching) != 1:
            raise UsageError(f"{name} cannot go back to {to or 'another release'}; kept: {', '.join(kept) or 'none'}")
        [md5] = matching
        try:
            updater.preflight(binary, slot)
            part = part_path(slot.target, name, md5)
            memory.parts.append(part)  # removed by the next sync if need be
            state.save()
            with host_errors(f"stage the backup of {name}"):
                backups.stage(name, md5, part)
            result = updater.activate(binary, slot, md5, "operator")
        except HostError as error:
            report.log(f"{name}: not rolled back to {md5}: {error}")
            raise
    if report.notes or not result.well:
        words = [result.error or f"it is back at {short(md5)}, but", *report.notes]
        raise HostError(f"{name}: {'; '.join(words)}")
    left = f"{short(result.from_md5)} is held until bin-proxy sync --only {name} --retry-held"
    return f"{name}: back at {short(md5)} in {result.seconds:.1f} s" + (f"; {left}" if result.from_md5 else "")


def _seconds(duration: str) -> float:
    seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]{1,6})([smhd])", duration))
    if not re.fullmatch(r"([0-9]{1,6}[smhd])+", duration) or not 0 < seconds <= 3650 * 86400:
        raise UsageError(f"{duration!r} is no duration of up to ten years: write 30m, 2h, 1d or 1h30m")
    return seconds


def _state(settings: Settings) -> State:
    state = State(settings.state_dir, ())
    if "pauses.json" in dict(state.unreadable):
        raise HostError(f"{state.folder}/pauses.json cannot be read: the next sync keeps it aside and pauses the host")
    return state


def pause(settings: Settings, names: tuple[str, ...], reason: str, duration: str | None) -> str:
    """Leave binaries as they are, or the whole host where no names are given.

    Args:
        settings: every setting.
        names: of binaries.
        reason: for whoever comes next.
        duration: how long, such as 90s, 30m, 2h, 1d or 1h30m; None for no end.

    Returns:
        what to tell.

    Raises:
        UsageError: that is no duration.
        HostError: it cannot be remembered, or what is paused cannot be read.
    """
    now = time.time()
    until = None if duration is None else now + _seconds(duration)
    with host_errors(f"make {settings.state_dir}"):
        make_folder(settings.state_dir, 0o755)
    state = _state(settings)
    state.pauses |= dict.fromkeys(names or ("*",), Pause(reason, now, until))
    state.save_pauses()
    end = f" until {when(until)}" if until else ""
    return f"{', '.join(names) or 'the whole host'}: paused{end}; {' '.join(['bin-proxy resume', *names])} ends it"


def resume(settings: Settings, names: tuple[str, ...]) -> str:
    """End the pause of binaries, or that of the whole host where no names are given.

    Returns:
        what to tell: what is paused now.

    Raises:
        HostError: it cannot be remembered, or what is paused cannot be read.
    """
    state = _state(settings)
    if [name for name in names or ("*",) if state.pauses.pop(name, None)]:
        state.save_pauses()
    return f"paused now: {', '.join(state.pauses).replace('*', 'the whole host') or 'nothing'}"
