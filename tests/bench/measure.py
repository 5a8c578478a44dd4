"""Runs commands in turns, and makes medians and Markdown of what they cost."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
MIB = 1024 * 1024


@dataclass(frozen=True)
class Cost:
    """Of one command and all that it started: seconds of wall and of CPU, peak memory of the largest in bytes."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Variant:
    """A command to be compared; `before` prepares each of its runs and `after` checks it, both outside the time."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where there is nothing to keep to."""

    case: str
    what: str
    ours: str
    other: str
    ratio: str
    limit: str
    met: bool | None


def run(variant: Variant) -> Cost:
    """Run once. The kernel counts the memory of the process that starts a program as that program's, so this one must
    stay smaller than anything whose memory is of interest."""
    variant.before()
    begun = time.perf_counter()
    child = subprocess.Popen(
        list(variant.command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env=dict(variant.environment),
    )
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{variant.name} exited {child.returncode}: {' '.join(variant.command)}")
    variant.after()
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def side_by_side(rounds: int, *variants: Variant) -> list[Cost]:
    """Run all in turns, another one first in each round; returns the medians, in the order of `variants`."""
    costs: dict[str, list[Cost]] = {variant.name: [] for variant in variants}
    for at in range(rounds):
        first = at % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            costs[variant.name].append(run(variant))
    return [
        Cost(
            statistics.median(cost.wall for cost in runs),
            statistics.median(cost.cpu for cost in runs),
            int(statistics.median(cost.memory for cost in runs)),
        )
        for runs in costs.values()
    ]


def seconds(value: float) -> str:
    """A time as people read it."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def mib(value: float) -> str:
    """A size as people read it."""
    return f"{value / MIB:.1f} MiB"


def at_most(case: str, what: str, ours: float, other: float, limit: float) -> Row:
    """A row for times of which ours may be at the most `limit` times the other."""
    ratio = ours / other
    return Row(case, what, seconds(ours), seconds(other), f"{ratio:.2f}", f"<= {limit:g}", ratio <= limit)


def fact(case: str, what: str, found: object, wanted: str, met: bool | None) -> Row:
    """A row for what is counted, not compared."""
    return Row(case, what, str(found), "", "", wanted, met)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| case | what | bin-proxy | compared with | ratio | limit | |", "|---|---|---:|---:|---:|---:|---|"]
    words = {True: "met", False: "**not met**", None: ""}
    for row in rows:
        cells = (row.case, row.what, row.ours, row.other, row.ratio, row.limit, words[row.met])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
    """Where this is measured."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    python = f"Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, {python}; load at the beginning {load}"
