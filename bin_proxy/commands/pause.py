"""An operator's decision that a binary, or the host, stays as it is."""

from __future__ import annotations

import re
import time

from bin_proxy.config.settings import Settings
from bin_proxy.errors import HostError, UsageError, host_errors
from bin_proxy.host.files import make_folder
from bin_proxy.output.report import when
from bin_proxy.policy.model import Pause
from bin_proxy.store.state import State

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


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
