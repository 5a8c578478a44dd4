"""A large release: what the whole update takes, against curl, md5sum and fsync of the same bytes."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

from tests.bench.measure import MIB, Row, Variant, at_most, fact, mib, side_by_side
from tests.bench.rig import Rig, random_file, rig

_NAME = "large"


class _Release:
    """One rig with two releases, and the host put back before each run."""

    def __init__(self, host: Rig, size: int, *, old: bool) -> None:
        self.host, self.size, self.old = host, size, old
        self.target = host.bin / _NAME
        self.url = f"{host.environment['BIN_MANAGER_API']}/releases/latest/{_NAME}/download"
        self.new_file, self.new_md5 = host.root / "new", random_file(host.root / "new", size)
        self.old_md5 = random_file(self.target, size) if old else ""
        host.write_manifest([_NAME])
        host.start_nginx()
        os.sync()

    def put_back(self) -> None:
        """The old release is installed and known, nothing is kept, nothing waits to be written."""
        backup = self.host.state / "backups" / _NAME / self.old_md5
        if self.old and backup.is_file():
            os.replace(backup, self.target)
        elif not self.old:
            self.target.unlink(missing_ok=True)
        shutil.rmtree(self.host.state, ignore_errors=True)
        (self.host.root / "curled").unlink(missing_ok=True)
        if self.old:
            self.host.publish(_NAME, self.target, self.old_md5)
            time.sleep(2.1)  # younger files are hashed again
            self.host.run("sync")
        self.host.publish(_NAME, self.new_file, self.new_md5)
        os.sync()
        self._touch_memory()

    def _touch_memory(self) -> None:
        """Fill memory and give it back: the first touch of what a virtual machine's host had taken back from it is
        many times slower, and would count for whoever happens to come after a pause."""
        scratch = self.host.root / "scratch"
        with open(scratch, "wb", buffering=0) as file:
            for _ in range(self.size * 5 // 4 // MIB):
                file.write(bytes(MIB))
        scratch.unlink()

    def check(self) -> None:
        """The new release is installed, and the old one is kept, as a link to what was installed."""
        log = (self.host.root / "log").read_text().splitlines()
        if self.new_md5 not in log[-1] or self.target.stat().st_size != self.new_file.stat().st_size:
            raise SystemExit(f"it was not updated: {log[-1]}")

    def curl(self) -> Variant:
        to = self.host.root / "curled"
        script = f"curl -sSfo {to} {self.url} && md5sum {to} && sync {to}"
        return Variant("curl", ["sh", "-c", script], self.host.environment, before=self.put_back)

    def ours(self) -> Variant:
        return replace(self.host.sync, before=self.put_back, after=self.check)


def update(quick: bool) -> Iterator[Row]:
    """One release of 512 MiB, first as a first install, then over an old one of that size."""
    size = (128 if quick else 512) * MIB
    for old in (False, True):
        case = f"a release of {size // MIB} MiB" + (" over another one" if old else "")
        with rig(service=False) as host:
            release = _Release(host, size, old=old)
            ours, curl = side_by_side(3 if quick else 9, release.ours(), release.curl())
            yield at_most(case, "wall, to curl, md5sum and fsync", ours.wall, curl.wall, 0.85)
            yield at_most(case, "CPU, to curl, md5sum and fsync", ours.cpu, curl.cpu, 2)
            yield fact(case, "peak memory", mib(ours.memory), "<= 60 MiB", ours.memory <= 60 * MIB)
            if old:
                yield from _bytes(case, release, size)


def _bytes(case: str, release: _Release, size: int) -> Iterator[Row]:
    """Count, by system call, how often each byte went through."""
    release.put_back()
    before = release.target.stat().st_ino
    calls = "read,pread64,readv,recvfrom,recvmsg,write,pwrite64,writev,mmap,link,linkat,copy_file_range,sendfile,ioctl"
    lines = release.host.trace(f"{calls},fsync,fdatasync,sync_file_range", "sync")
    kept = release.host.state / "backups" / _NAME / release.old_md5
    linked = kept.is_file() and kept.stat().st_ino == before
    part = f"{release.host.bin}/.{_NAME}.{release.new_md5}.part"
    received = _sum(lines, r"(?:recvfrom|read)\(\d+<(?:socket|TCP)")
    written = _sum(lines, rf"p?write\w*\(\d+<{re.escape(part)}>")
    # The descriptor keeps its name until the swap; afterwards the path is the target's.
    read = _sum(lines, rf"p?read\w*\(\d+<(?:{re.escape(part)}|{re.escape(str(release.target))}|{re.escape(str(kept))})")
    yield fact(case, "bytes received / size", f"{received / size:.4f}", "1.00", abs(received / size - 1) < 0.001)
    yield fact(case, "bytes written / size", f"{written / size:.4f}", "1.00", written == size)
    yield fact(case, "bytes read from the new, the old and the kept file", read, "0", read == 0)
    yield fact(case, "the backup is a link", "yes" if linked else "no", "yes", linked)
    count = sum("recvfrom(" in line or "read(" in line for line in lines)
    yield fact(case, "read and recvfrom calls", count, "", None)


def _sum(lines: list[str], call: str) -> int:
    """The bytes that calls beginning like `call` returned, also those that strace shows in two halves."""
    total = 0
    halves: set[tuple[str, str]] = set()
    for line in lines:
        pid, _, rest = line.partition(" ")
        begun = re.match(rf"\s*({call})", rest)
        resumed = re.match(r"\s*<\.\.\. (\w+) resumed>", rest)
        if begun and rest.endswith("<unfinished ...>"):
            halves.add((pid, rest.strip().partition("(")[0]))
            continue
        if not begun and not (resumed and (pid, resumed[1]) in halves):
            continue
        if resumed:
            halves.discard((pid, resumed[1]))
        ended = re.search(r"= (\d+)$", rest)
        total += int(ended[1]) if ended else 0
    return total


def several(quick: bool) -> Iterator[Row]:
    """Four outdated binaries from a bin-manager that gives each connection 16 MiB/s."""
    case = "4 outdated binaries of 16 MiB at 16 MiB/s"
    with rig(service=False) as host:
        names = [f"part-{at}" for at in range(4)]
        for name in names:
            host.publish(name, host.root / name, random_file(host.root / name, 16 * MIB))
        host.write_manifest(names)
        host.start_nginx(limit="16m")

        def put_back() -> None:
            for folder in (host.bin, host.state):
                shutil.rmtree(folder, ignore_errors=True)
            host.bin.mkdir()
            os.sync()

        side = replace(host.sync, before=put_back)
        alone = replace(side, name="one by one", environment={**host.environment, "JOBS": "1"})
        ours, other = side_by_side(2 if quick else 5, side, alone)
        yield at_most(case, "wall, to one by one (JOBS=1)", ours.wall, other.wall, 0.5)
