"""What a fleet does to one bin-manager, worked out without any traffic: `python -m tests.bench.fleet`.

Cron starts every host's sync at second 0. Prints two Markdown tables: a minute in which nothing changed, and the
minutes after a release was published, with and without --splay; each with a caching nginx in front, too.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass

from bin_proxy.policy.plan import splay_delay

# Of one question for an MD5 and its answer, headers included, as strace shows them with nginx as bin-manager.
_QUESTION, _ANSWER = 135, 330
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Rollout:
    """Of one release on all hosts; seconds since the first host began."""

    begun_at_once: int
    restarts_at_once: int
    slowest: float
    ended: float


def batches(hosts: int, splay: float) -> list[tuple[float, int]]:
    """When hosts begin, and how many: a run that is too early ends, so an update begins at the next full minute."""
    if not splay:
        return [(0.0, hosts)]
    minutes = Counter(math.ceil(splay_delay(f"host-{at:06}.example.com", splay) / 60) for at in range(hosts))
    return [(60.0 * minute, count) for minute, count in sorted(minutes.items())]


def roll_out(starts: list[tuple[float, int]], release: float, line: float, own: float) -> Rollout:
    """Share the line of bin-manager evenly between all downloads under way, until all are done.

    Args:
        starts: when how many hosts begin.
        release: bytes.
        line: bytes a second that bin-manager (or the cache) has for all.
        own: bytes a second that a host has at the most.
    """
    waiting, running = list(starts), []  # running: [begun, hosts, bytes each still lacks]
    now, slowest, restarts = 0.0, 0.0, 0
    while waiting or running:
        speed = min(own, line / sum(hosts for _, hosts, _ in running)) if running else 0.0
        ends = now + min(left for _, _, left in running) / speed if running else math.inf
        until = min(ends, waiting[0][0] if waiting else math.inf)
        running = [(begun, hosts, left - (until - now) * speed) for begun, hosts, left in running]
        now = until
        done = [each for each in running if each[2] <= 1]
        running = [each for each in running if each[2] > 1]
        for begun, _, _ in done:
            slowest = max(slowest, now - begun)
        restarts = max(restarts, sum(hosts for _, hosts, _ in done))
        while waiting and waiting[0][0] <= now:
            begun, hosts = waiting.pop(0)
            running.append((begun, hosts, release))
    return Rollout(max(hosts for _, hosts in starts), restarts, slowest, now)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def quiet_minute(fleet: list[int], binaries: int) -> str:
    """What comes in second 0 of a minute in which nothing changed."""
    rows = []
    for hosts in fleet:
        asked = hosts * binaries
        cells = [f"{hosts:,}", f"{asked:,}", _bytes(asked * _QUESTION), _bytes(asked * _ANSWER)]
        rows.append([*cells, f"{binaries}", _bytes(binaries * _ANSWER)])
    head = ["hosts", "requests in second 0", "bytes in", "bytes out", "requests behind a cache", "bytes out behind it"]
    return _table(head, rows)


def release(fleet: list[int], size: int, splay: float, gigabits: float) -> str:
    """What follows when one binary of `size` MiB has a new release."""
    rows, line = [], gigabits * 1e9 / 8
    for hosts in fleet:
        for seconds in (0.0, splay):
            found = roll_out(batches(hosts, seconds), size * _MIB, line, 1e9 / 8)
            cut = " (**cut by DOWNLOAD_TIMEOUT**)" if found.slowest > 600 else ""
            asked = found.begun_at_once
            cells = [f"{hosts:,}", f"{seconds:g} s" if seconds else "none", f"{asked:,}", _bytes(asked * size * _MIB)]
            cells += [
                f"{found.restarts_at_once:,}",
                _time(found.slowest) + cut,
                _time(found.ended),
                _bytes(size * _MIB),
            ]
            rows.append(cells)
    head = ["hosts", "splay", "downloads begun in one second", "bytes they ask for", "restarts in one second"]
    head += ["longest download", "last host done after", "bytes from bin-manager behind a cache"]
    return _table(head, rows)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--binaries", type=int, default=5, help="of each host")
    parser.add_argument("--mib", type=int, default=50, help="size of the release")
    parser.add_argument("--splay", type=float, default=900, help="seconds")
    parser.add_argument("--gigabits", type=float, default=10, help="a second, that bin-manager or its cache sends")
    chosen = parser.parse_args()
    print(f"A quiet minute, {chosen.binaries} binaries a host:\n")
    print(quiet_minute(chosen.hosts, chosen.binaries))
    print(f"\nA release of {chosen.mib} MiB over {chosen.gigabits:g} Gbit/s, at most 1 Gbit/s a host:\n")
    print(release(chosen.hosts, chosen.mib, chosen.splay, chosen.gigabits))
    print("\nA download that is cut is resumed by the next minute's run. Nothing sleeps, so a splay counts in full")
    print("minutes: the hosts whose moment lies within the same one begin together.")


if __name__ == "__main__":
    main()
