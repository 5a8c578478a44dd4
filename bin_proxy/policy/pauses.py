"""An operator's pause: how long it holds, whatever the clock does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

HOST = "*"
"""The key under which the pause of the whole host is kept."""

_LIVED = 300 * 86400.0
"""A date that moved by more seconds than this was set, not lived: clocks that are wrong stand in 1970 or far ahead."""


@dataclass(frozen=True)
class Moment:
    """Now, on both clocks.

    Args:
        now: Unix time in seconds.
        uptime: seconds since boot, suspended time included (CLOCK_BOOTTIME).
        boot: what tells this boot from others (/proc/sys/kernel/random/boot_id); empty where unknown.
    """

    now: float
    uptime: float = 0.0
    boot: str = ""


@dataclass(frozen=True)
class Pause:
    """An operator's decision that a binary, or the host, stays as it is.

    Args:
        reason: for whoever comes next.
        since: Unix time.
        until: Unix time of its end; None for no end.
        uptime: seconds since boot when it was typed.
        boot: of that boot; empty where unknown.
    """

    reason: str
    since: float
    until: float | None
    uptime: float = 0.0
    boot: str = ""


@dataclass(frozen=True)
class Pauses:
    """What pauses.json holds: by binary, or `HOST`."""

    pauses: dict[str, Pause] = field(default_factory=dict)


def corrected(pause: Pause, moment: Moment) -> Pause:
    """The pause on the clock that runs now.

    A date that was wrong when the pause was typed says nothing of its end: within the same boot the time since boot
    tells how much of it is left; after another one, a pause that seems to end more than its length ahead ends its
    length after it was first seen so. (A clock that moved by days is believed: that is how time passes in a
    suspended machine.)
    """
    if pause.until is None:
        return pause
    length = pause.until - pause.since
    lived = moment.now - pause.since
    if pause.boot and pause.boot == moment.boot:
        lived_by_uptime = moment.uptime - pause.uptime
        if abs(lived - lived_by_uptime) > _LIVED:
            since = moment.now - lived_by_uptime
            return replace(pause, since=since, until=since + length)
    if pause.until - moment.now > length:
        return Pause(pause.reason, moment.now, moment.now + length, moment.uptime, moment.boot)
    return pause


def in_force(pauses: dict[str, Pause], moment: Moment) -> dict[str, Pause]:
    """The pauses that hold now, on the clock that runs now."""
    held = {}
    for name, pause in pauses.items():
        now_so = corrected(pause, moment)
        if now_so.until is None or moment.now < now_so.until:
            held[name] = now_so
    return held


def pause_of(pauses: dict[str, Pause], name: str) -> Pause | None:
    """The pause of a binary, or that of the whole host, if there is one."""
    return pauses.get(name) or pauses.get(HOST)


def resume_hint(pauses: dict[str, Pause], name: str) -> str:
    """What ends the pause of a binary."""
    return f"bin-proxy resume {name}" if name in pauses else "bin-proxy resume"
