"""A minute in which nothing changed: what bin-proxy costs beyond an interpreter that does nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.bench.measure import MIB, REPOSITORY, Row, Variant, at_most, fact, mib, seconds, side_by_side
from tests.bench.rig import Rig, free_port, rig

_LOOP = str(Path(__file__).parent / "old_loop.sh")


def one(quick: bool) -> Iterator[Row]:
    """One binary: the floor, and what the floor does not need is not done."""
    case = "1 binary"
    with rig() as host:
        host.fill(1, MIB)
        host.start_nginx()
        host.settle()
        ours, floor = side_by_side(7 if quick else 41, host.sync, host.floor)
        yield at_most(case, "wall, to the floor", ours.wall, floor.wall, 1.2)
        yield at_most(case, "CPU, to the floor", ours.cpu, floor.cpu, 1.2)
        more = ours.memory - floor.memory
        yield Row(case, "peak memory", mib(ours.memory), mib(floor.memory), "", "floor + 6 MiB", more <= 6 * MIB)
        yield from _calls(case, host)
        yield from _imports(case, host)


def _calls(case: str, host: Rig) -> Iterator[Row]:
    lines = host.trace("execve,read,pread64,mmap,fsync,fdatasync,sync,syncfs,sync_file_range", "sync")
    started = [line for line in lines if "execve(" in line and line.endswith("= 0")]
    yield fact(case, "programs started (supervisorctl)", len(started) - 1, "0", len(started) == 1)
    of_binaries = [line for line in lines if re.search(r"(read|pread64|mmap)\(", line) and f"<{host.bin}/" in line]
    yield fact(case, "reads of unchanged binaries", len(of_binaries), "0", not of_binaries)
    syncs = [line for line in lines if re.search(r"sync\w*\(", line)]
    yield fact(case, "fsync and the like", len(syncs), "0", not syncs)


def imported(host: Rig, *arguments: str) -> dict[str, int]:
    """The modules that bin-proxy imports, and the microseconds that each took by itself."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=REPOSITORY,
        env=host.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", done.stderr, re.M)
    return {name: int(own) for own, name in found}


def _imports(case: str, host: Rig) -> Iterator[Row]:
    floor = imported(host, *host.floor.command[1:])
    ours = imported(host, "-m", "bin_proxy", "sync")
    beyond = {name: own for name, own in ours.items() if name not in floor and not name.startswith("bin_proxy")}
    listed = ", ".join(sorted(beyond, key=lambda name: -beyond[name])) or "none"
    yield fact(
        case, f"modules beyond the floor: {listed}", f"{len(beyond)}, {sum(beyond.values()) / 1000:.1f} ms", "", None
    )
    own = [took for name, took in ours.items() if name.startswith("bin_proxy")]
    yield fact(case, "modules of its own", f"{len(own)}, {sum(own) / 1000:.1f} ms", "", None)
    for words in (["--help"], ["status", "--offline"]):
        heavy = [name for name in imported(host, "-m", "bin_proxy", *words) if name in ("requests", "urllib3", "ssl")]
        yield fact(case, f"`{' '.join(words)}` imports requests", ", ".join(heavy) or "no", "no", not heavy)


def hundred(quick: bool) -> Iterator[Row]:
    """100 binaries of 1 MiB, against the loop of curl, jq and md5sum."""
    case = "100 binaries of 1 MiB"
    with rig() as host:
        host.fill(100, MIB)
        host.start_nginx()
        host.settle()
        loop = Variant("loop", ["bash", _LOOP], host.environment)
        ours, old, floor = side_by_side(3 if quick else 15, host.sync, loop, host.floor)
        ratio = old.wall / ours.wall
        what = "wall, the shell loop to bin-proxy"
        yield Row(case, what, seconds(ours.wall), seconds(old.wall), f"{ratio:.1f}", ">= 8", ratio >= 8)
        yield at_most(case, "CPU, to the floor", ours.cpu, floor.cpu, 2)
        yield at_most(case, "wall, to the floor", ours.wall, floor.wall, 2)


def far(quick: bool) -> Iterator[Row]:
    """200 binaries, bin-manager 50 ms away."""
    case = "200 binaries at 50 ms"
    with rig() as host:
        host.fill(200, 1000)
        port = free_port()
        host.environment["BIN_MANAGER_API"] = f"http://127.0.0.1:{port}/api/v1"
        host.start([sys.executable, "-m", "tests.bench.slow_server", str(port), "50", str(host.root / "www")], port)
        host.settle()
        before = _counts(port)
        host.run("sync")
        after = _counts(port)
        opened = after["connections"] - before["connections"] - 1  # one asks for the counts
        asked = after["requests"] - before["requests"]
        yield fact(case, f"connections for {asked} requests", opened, "<= 8 (JOBS)", opened <= 8 and asked == 200)
        ours, floor = side_by_side(3 if quick else 11, host.sync, host.floor)
        over = ours.wall - floor.wall
        limit = "floor + 2.5 s"
        yield Row(case, "wall", seconds(ours.wall), seconds(floor.wall), f"+ {seconds(over)}", limit, over <= 2.5)
        yield at_most(case, "CPU, to the floor", ours.cpu, floor.cpu, 3)


def _counts(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts", timeout=10) as answer:
        return dict(json.load(answer))


def big(quick: bool) -> Iterator[Row]:
    """4 binaries of 96 MiB that did not change, against 1 small one."""
    case = "4 unchanged binaries of 96 MiB"
    with rig() as host, rig() as small:
        host.fill(4, 96 * MIB)
        small.fill(1, 1000)
        for each in (host, small):
            each.start_nginx()
            each.settle()
        little = replace(small.sync, name="small")
        ours, other = side_by_side(7 if quick else 31, host.sync, little)
        yield at_most(case, "wall, to 1 small one", ours.wall, other.wall, 1.1)
        yield at_most(case, "CPU, to 1 small one", ours.cpu, other.cpu, 1.1)
        lines = host.trace("read,pread64,mmap", "sync")
        reads = [line for line in lines if f"<{host.bin}/" in line]
        yield fact(case, "reads of unchanged binaries", len(reads), "0", not reads)


def thousand(quick: bool) -> Iterator[Row]:
    """1,000 binaries."""
    case = "1,000 binaries"
    with rig() as host:
        host.fill(1000, 1000)
        host.start_nginx()
        host.settle()
        ours, floor = side_by_side(2 if quick else 9, host.sync, host.floor)
        yield Row(case, "wall", seconds(ours.wall), seconds(floor.wall), "", "<= 10 s", ours.wall <= 10)
        yield at_most(case, "CPU, to the floor", ours.cpu, floor.cpu, 10)
        more = ours.memory - floor.memory
        yield Row(case, "peak memory", mib(ours.memory), mib(floor.memory), "", "floor + 16 MiB", more <= 16 * MIB)
