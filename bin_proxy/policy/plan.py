"""Every decision, as pure functions over values: what to do with a binary, whose fault a failure is, how to recover."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from bin_proxy.policy.model import Memory, Record, Retry, Unwell

STRIKES = 3
_HOUR = 3600.0


@dataclass(frozen=True)
class Result:
    """What is to become of one binary, and then what became of it.

    Args:
        name: of the binary.
        outcome: as in `sync --json`; "update" until it was done.
        well: the binary is where it should be, or where an operator put it.
        from_md5, to_md5: what is on the disk, or was; what is offered.
        seconds: how long its activation took.
        error: what is wrong and what to do, for people; None where all is well.
        kind: of the trouble, to tell one from another; empty where there is none.
        note: why, for a person who watches.
    """

    name: str
    outcome: str
    well: bool
    from_md5: str | None = None
    to_md5: str | None = None
    seconds: float = 0.0
    error: str | None = None
    kind: str = ""
    note: str = ""


def short(md5: str | None) -> str:
    """An MD5 as people read it."""
    return md5[:8] if md5 else "nothing"


def way_out(name: str) -> str:
    """How an operator has a release tried that is held or waits."""
    return f"bin-proxy sync --only {name} --retry-held tries it again"


def is_due(until: float, now: float, longest: float = _HOUR) -> bool:
    """Whether a pause is over; one that seems longer than the longest there is comes from a clock that jumped."""
    return until <= now or until - now > longest


def growing_pause(count: int) -> float:
    """Seconds to wait after the `count`-th failure: 1 minute, then twice as long each time, up to 1 hour."""
    return min(60.0 * 2.0 ** min(max(count, 1) - 1, 16), _HOUR)


def after_failure(memory: Memory, md5: str, kind: str, reason: str, now: float) -> Retry:
    """The pause that `md5` waits for after one more failure of `kind`."""
    count = memory.retries[md5].count + 1 if md5 in memory.retries else 1
    return Retry(count, now + growing_pause(count), kind, reason)


def after_restart(md5: str, count: int, reason: str, now: float) -> Unwell:
    """The pause before a restart is tried again, after the `count`-th failure since `md5` did not come up."""
    return Unwell(md5, count, now + growing_pause(count), reason)


def leave(memory: Memory, md5: str, now: float) -> None:
    """Remember in `memory` that `md5` was left for another release; from the second time within the hour it waits."""
    recent = {key: [at for at in times if abs(now - at) < _HOUR] for key, times in memory.left.items()}
    memory.left = {key: times for key, times in recent.items() if times}
    times = memory.left.setdefault(md5, [])
    times.append(now)
    if len(times) >= 2:
        reason = f"it was left {len(times)} times within the hour"
        memory.retries[md5] = Retry(len(times), now + growing_pause(len(times) - 1), "flapping", reason)


def splay_delay(host: str, longest: float) -> float:
    """Seconds from 0 to `longest` that depend on the host alone, spread evenly over many hosts."""
    fraction = int.from_bytes(hashlib.sha256(host.encode()).digest()[:8], "big") / 2**64
    return fraction * longest


def note_due(memory: Memory, offered: str, installed: str | None, now: float, splay: float, delay: float) -> bool:
    """Remember in `memory` that `offered` is due in `delay` of `splay` seconds, if it was not seen before.

    What is no longer offered is forgotten only later: bin-managers that disagree would put each other's off for ever.

    Returns:
        whether it was not seen before.
    """
    waits = {offered} - {installed}
    memory.due = {md5: at for md5, at in memory.due.items() if md5 in waits or abs(at - now) < 2 * splay}
    new = bool(splay and waits - memory.due.keys())
    if new:
        memory.due[offered] = now + delay
    return new


def decide(
    name: str,
    offered: str,
    installed: str | None,
    memory: Memory,
    now: float,
    *,
    retry_held: bool = False,
    splay: float = 0.0,
) -> Result:
    """Decide what a sync does with one binary.

    Args:
        name: of the binary.
        offered: the MD5 that bin-manager names.
        installed: the MD5 of the file on disk, None where there is none.
        memory: what is remembered of the binary.
        now: Unix time.
        retry_held: an operator wants holds and pauses overridden.
        splay: the longest delay of an update, in seconds.

    Returns:
        "current", "failed" (its service is down), "update", "held" or "waiting".
    """

    def result(outcome: str, why: str, kind: str = "", until: float | None = None) -> Result:
        why += time.strftime("; until %H:%M:%S", time.localtime(until)) if until else ""
        error = f"release {short(offered)} {outcome}: {why}; {way_out(name)}" if kind else None
        return Result(name, outcome, not kind, installed, offered, 0.0, error, kind, why)

    if offered == installed:
        if memory.unwell:
            return result("failed", memory.unwell.reason, "restart")
        return result("current", "it is the release that bin-manager names")
    if not retry_held:
        if held := memory.hold_on(offered):
            return result("held", held.reason, "" if held.by == "operator" and installed else "release")
        if memory.unwell and memory.unwell.md5 == offered:
            why = f"{memory.unwell.reason}; neither it nor the previous release runs"
            return result("waiting", why, "restart", memory.unwell.until)
        retry = memory.retries.get(offered)
        if retry and not is_due(retry.until, now):
            return result("waiting", retry.reason, retry.kind, retry.until)
    due = memory.due.get(offered, now)
    if not is_due(due, now, splay):
        return result("waiting", "its time within the splay has not come", until=due)
    return result("update", "bin-manager names another release" if installed else "it is not installed")


def judge(fault: str, *, had_previous: bool, healthy_before: bool, came_back: bool | None, strikes: int) -> str:
    """Whose fault a failure after the swap is.

    Args:
        fault: "release" where the new release failed to run well, "host" where it was never given a chance.
        had_previous: there was a file before.
        healthy_before: the service was well before.
        came_back: the previous release, restored, became healthy; None where that was not waited for.
        strikes: how often both releases failed before, for this MD5.

    Returns:
        "hold", "strike" (the host's fault, counted against the release) or "forgive" (the host's fault alone).
    """
    if fault != "release":
        return "forgive"
    if not had_previous or not healthy_before or came_back is not False:
        return "hold"
    return "hold" if strikes + 1 >= STRIKES else "strike"


def decide_recovery(record: Record, on_disk: str | None, *, untouched: bool) -> str:
    """How to resolve an update that was interrupted.

    Args:
        record: what was begun.
        on_disk: the MD5 of the file now, None where there is none.
        untouched: the file is still the old one itself, and its processes run under the pids they had before.

    Returns:
        "forget": nothing happened yet; "finish": restart the new release and watch it; "undo": bring the previous one
        back and restart it; "check": somebody else put another file there, so only see to it that the service runs.
    """
    if on_disk == record.old:
        return "forget" if record.phase == "activating" and untouched else "undo"
    if on_disk == record.new:
        return "finish" if record.phase == "activating" else "undo"
    return "undo" if on_disk is None else "check"
