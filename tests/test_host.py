"""A hostile host: clocks that jump, reboots, full and read-only disks, odd files, damaged state, odd callers."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bin_proxy.policy.model import Record
from bin_proxy.store.state import State
from tests import clock
from tests.clock import at
from tests.conftest import require, require_root
from tests.faults import answering
from tests.host import Host, dies_after, dies_at_once, eventually, good, md5, running, running_host
from tests.server import Handler

REPOSITORY = Path(__file__).parent.parent
V1, V2, V3 = good("v1"), good("v2"), good("v3")
NOBODY = 65534
_NOON = 1_800_000_000  # the moment at which the tests of clocks begin, in Unix time


# helpers


def install_old(host: Host, name: str = "manager", **entry: Any) -> None:
    """Release v1 lies there, v2 is published, and no service belongs to it."""
    host.install(name, V1)
    host.server.publish(name, V2)
    host.write_manifest({"name": name, "version": "latest", "currentMd5": "", "service": False, **entry})


@contextmanager
def quick_host() -> Iterator[Host]:
    """A host whose service "manager" runs v1, is up at once and is watched for a moment only."""
    with running_host("manager", startsecs="0") as host:
        host.settings["MIN_HEALTHY_SECONDS"] = "0.6"
        yield host


def complaint(done: subprocess.CompletedProcess[str], about: str) -> None:
    """The run failed, and says why in one line that matches `about`."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert re.fullmatch(rf"bin-proxy: [^\n]*(?:{about})[^\n]*\n", done.stderr), done.stderr


def assert_untouched(host: Host, before: os.stat_result, name: str = "manager") -> None:
    """The installed file is the very same one, and nothing was begun, held or left but a part."""
    now = (host.bin / name).lstat()
    assert [now.st_ino, now.st_mtime_ns, now.st_size] == [before.st_ino, before.st_mtime_ns, before.st_size]
    assert [stray for stray in host.strays() if not stray.endswith(".part")] == []
    for part in host.bin.glob(".*.part"):
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
    assert "holds" not in held_text(host)


def held_text(host: Host) -> str:
    """What the state file remembers of holds: empty where it holds nothing."""
    path = host.state / "state.json"
    memories = json.loads(path.read_text())["memories"] if path.exists() else {}
    return "holds" if any(memory["holds"] for memory in memories.values()) else ""


def assert_converges(host: Host, data: bytes = V2, name: str = "manager", **settings: str) -> None:
    """One sync brings the release, silently, and leaves nothing behind; the next has nothing to do."""
    done = host.sync(**settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.disk_md5(name) == host.reported(name) == md5(data)
    assert host.strays() == []
    assert host.outcomes(**settings) == {name: "current"}


@contextmanager
def tmpfs(folder: Path, size: str, options: str = "mode=755") -> Iterator[Path]:
    """A filesystem of its own at `folder`."""
    require("mount", "umount")
    require_root()
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Not even root may replace or write `path`."""
    require("chattr")
    require_root()
    subprocess.run(["chattr", "+i", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Use up the space of a filesystem but for `leave` bytes."""
    filler = folder / "filler"
    with open(filler, "wb") as file, suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
            file.flush()
    if leave:
        with open(filler, "r+b") as file:
            file.truncate(max(0, filler.stat().st_size - leave))
    return filler


def write_state(host: Host, file: str, raw: bytes) -> None:
    (host.state / file).parent.mkdir(parents=True, exist_ok=True)
    (host.state / file).write_bytes(raw)


def getxattrs(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def attributes(path: Path) -> tuple[Any, ...]:
    """What belongs to the file and not to its bytes."""
    found = path.stat()
    return found.st_uid, found.st_gid, stat.filemode(found.st_mode), getxattrs(path)


# clocks


JUMPS = {"an hour": 3600, "back an hour": -3600, "a day": 86400, "back a day": -86400, "to 2099": 2_300_000_000}


@pytest.mark.parametrize("jump", [*JUMPS, "to 1970"])
def test_a_hold_outlives_a_clock_that_jumps(host: Host, jump: str) -> None:
    """A held release stays held under whatever clock, and another one is installed under it at once."""
    install_old(host, verifyCommand=["/bin/sh", "-c", "! grep -q v2 {file}"])
    assert host.outcomes(**at(_NOON)) == {"manager": "held"}
    moment = 3600 if jump == "to 1970" else _NOON + JUMPS[jump]
    for now in (moment, moment + 60, _NOON + 120):
        assert host.outcomes(**at(now)) == {"manager": "held"}
    assert host.server.downloads == 1
    host.server.publish("manager", V3)
    assert_converges(host, V3, **at(moment + 120))


def test_growing_pauses_pass_by_the_clock(host: Host) -> None:
    """A corrupt release is fetched again after 1, 2 and 4 minutes, not in between."""
    install_old(host)
    host.server.always[host.server.download_path("manager")] = corrupt
    fetched = []
    for second in (0, 30, 50, 70, 100, 180, 200, 300, 430, 450):
        before = len(downloads(host))
        done = host.sync(**at(_NOON + second))
        assert done.returncode == 1
        if len(downloads(host)) > before:
            fetched.append(second)
    assert fetched == [0, 70, 200, 450]


def test_no_jump_blocks_a_release_for_more_than_its_pause(host: Host) -> None:
    """A pause that was set under a clock far ahead is over when the clock is right again, and the other way round."""
    install_old(host)
    host.server.scripts[host.server.download_path("manager")] = [corrupt] * 3
    for moment in (_NOON + 86400, _NOON, 3600):
        before = len(downloads(host))
        assert host.outcomes(**at(moment)) == {"manager": "failed"}
        assert len(downloads(host)) == before + 1
        assert host.outcomes(**at(moment + 20)) == {"manager": "waiting"}
    assert_converges(host, **at(_NOON + 60))


@pytest.mark.parametrize("moment", ["after its delay", "in 1970", "in 2099"])
def test_the_splay_passes_by_the_clock(host: Host, moment: str) -> None:
    """An update waits for the host's own delay, the same every time, and a clock that jumps does not block it."""
    install_old(host)
    done = host.sync("--splay", "500000", **at(_NOON))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    told = re.search(r"due in (\d+) s", host.log())
    assert told
    delay = int(told[1])
    assert 0 < delay <= 500000
    assert host.outcomes("--splay", "500000", **at(_NOON + delay - 30)) == {"manager": "waiting"}
    assert host.server.downloads == 0
    now = {"after its delay": _NOON + delay + 30, "in 1970": 3600, "in 2099": _NOON + 2_300_000_000}[moment]
    assert host.outcomes("--splay", "500000", **at(now)) == {"manager": "updated"}


def test_the_log_tells_a_trouble_hourly_whatever_the_clock_does(host: Host) -> None:
    """A trouble is told once on stderr, hourly in LOG_FILE, at most once more after a jump, and then its end."""
    install_old(host)
    host.server.always["*"] = answering(404, {"code": 404, "message": "gone"})
    lines = []
    for second in (0, 60, 3540, 3660, 3720, 7320, 3600 - _NOON, 3660 - _NOON, 7380, 7440):
        done = host.sync(**at(_NOON + second))
        assert done.returncode == 1
        assert bool(done.stderr) == (second == 0)
        lines.append(len(host.log().splitlines()))
    told = [after - before for before, after in zip([0, *lines], lines, strict=False)]
    assert told == [1, 0, 0, 1, 0, 1, 1, 0, 1, 0]
    host.server.always.clear()
    assert_converges(host, **at(_NOON + 7500))
    assert "over" in host.log()
    assert all(re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \S", line) for line in host.log().splitlines())


@pytest.mark.parametrize("moment", [_NOON, 3600, _NOON + 2_000_000_000])
def test_no_clock_hides_a_changed_file(host: Host, moment: float) -> None:
    """A file that changed but for its size, its dates set back, is found out under any clock."""
    install_old(host)
    host.server.publish("manager", V1)
    for _ in range(2):
        assert host.outcomes(**at(moment)) == {"manager": "current"}
    was = (host.bin / "manager").stat()
    with open(host.bin / "manager", "r+b") as file:
        file.write(V2)
    os.utime(host.bin / "manager", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert len(V1) == len(V2)
    assert host.outcomes(**at(moment)) == {"manager": "updated"}
    assert host.disk_md5("manager") == md5(V1)


def test_a_pause_ends_by_the_clock(host: Host) -> None:
    """`pause --for` lasts as long as it says, and no jump makes a command raise."""
    install_old(host)
    assert host.run("pause", "manager", "--for", "2h", **at(_NOON)).returncode == 0
    for moment in (_NOON + 60, _NOON + 7000, 3600, _NOON - 86400):
        assert host.outcomes(**at(moment)) == {"manager": "paused"}
        status = json.loads(host.run("status", "--json", **at(moment)).stdout)
        assert [row["state"] for row in status["binaries"]] == ["paused"]
        assert host.run("doctor", **at(moment)).returncode in (0, 1)
    assert host.server.downloads == 0
    assert host.outcomes(**at(_NOON + 7300)) == {"manager": "updated"}
    assert host.run("status", **at(3600)).returncode == 0


@pytest.mark.parametrize(("step", "outcome"), [(3600, "rolled-back"), (-3600, "updated")], ids=["ahead", "back"])
def test_a_clock_that_jumps_during_an_update(step: int, outcome: str) -> None:
    """A clock that is set again and again, from the download on, neither cuts a health window nor draws it out."""
    with quick_host() as host:
        release = dies_after(1.2, "v2") if outcome == "rolled-back" else V2
        host.server.publish("manager", release)
        ahead = host.root / "ahead"
        ahead.write_text("0")
        fetched, over = threading.Event(), threading.Event()

        def keep_jumping() -> None:
            fetched.wait(60)
            for count in range(1, 100_000):
                (host.root / "ahead.new").write_text(str(count * step))
                (host.root / "ahead.new").rename(ahead)
                if over.wait(0.05):
                    return

        host.server.scripts[host.server.download_path("manager")] = [lambda handler: fetched.set() or True]
        jumper = threading.Thread(target=keep_jumping)
        jumper.start()
        try:
            outcomes = host.outcomes(MIN_HEALTHY_SECONDS="2.5", **clock.by(ahead))
        finally:
            fetched.set()
            over.set()
            jumper.join()
        assert outcomes == {"manager": outcome}
        final = md5(V1 if outcome == "rolled-back" else V2)
        assert host.running_md5("manager") == host.reported("manager") == host.disk_md5("manager") == final
        assert host.strays() == []


def corrupt(handler: Handler) -> bool:
    """Send other bytes than the release, as many."""
    release = handler.server.owner.releases["latest", handler.path.split("/")[-2]]
    handler.answer(200, b"\1" * len(release))
    return False


def downloads(host: Host) -> list[str]:
    """The requests for a download so far."""
    return [path for path, _ in host.server.requests if path.endswith("/download")]


# a reboot half-way


def hang(handler: Handler) -> bool:
    """Send half of the release, then nothing."""
    release = handler.server.owner.releases["latest", handler.path.split("/")[-2]]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(release)))
    handler.end_headers()
    handler.wfile.write(release[: len(release) // 2])
    time.sleep(3)
    handler.close_connection = True
    return False


def phase(host: Host) -> str:
    """The phase that the journal tells, empty where there is no record."""
    with suppress(OSError, ValueError):
        return str(json.loads((host.state / "journal/manager.json").read_text())["phase"])
    return ""


MOMENTS: dict[str, Callable[[Host], Any]] = {
    "downloading": lambda host: list(host.bin.glob(".manager.*.part")),
    "begun": phase,
    "swapped": lambda host: host.disk_md5("manager") != md5(V1),
    "watched": lambda host: host.disk_md5("manager") != md5(V1) and host.pid("manager"),
    "rolling back": lambda host: phase(host) == "rolling-back",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_reboot_half_way(moment: str) -> None:
    """Everything is killed at some moment of an update; cron comes before supervisord; then all agrees again."""
    with quick_host() as host:
        release = dies_at_once("bad") if moment == "rolling back" else V2
        host.server.publish("manager", release)
        if moment == "downloading":
            host.server.scripts[host.server.download_path("manager")] = [hang]
        run = subprocess.Popen(
            host.command("sync"),
            cwd=REPOSITORY,
            env=host.environment(MIN_HEALTHY_SECONDS="3"),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        eventually(lambda: MOMENTS[moment](host))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        host.stop_supervisord(signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-f", f"{host.root}/"], check=False)
        assert host.disk_md5("manager") in (md5(V1), md5(release))
        early = host.sync()
        assert early.returncode == 1
        assert host.disk_md5("manager") in (md5(V1), md5(release))
        host.start_supervisord()
        host.sync()
        final = V1 if moment == "rolling back" else V2
        # An update that was undone because it was interrupted may be tried again by the next run.
        assert host.sync().returncode == (1 if moment == "rolling back" else 0)
        assert host.disk_md5("manager") == host.reported("manager") == md5(final)
        eventually(lambda: host.running_md5("manager") == md5(final))
        assert host.strays() == []


# quota, full disks


QUOTA = {
    "the download": ("bin/.manager.{md5}.part", "manager: .*[Qq]uota"),
    "the record": ("state/journal/.manager.json.bin-proxy.tmp", "manager: .*[Qq]uota"),
    "the backup": ("state/backups/manager/{old}.tmp", "manager: .*[Qq]uota"),
    "the memory": ("state/.state.json.bin-proxy.tmp", "[Qq]uota"),
    "the manifest": (".manifest.json.bin-proxy.tmp", "[Qq]uota"),
    "the cache": ("state/.cache.json.bin-proxy.tmp", "[Qq]uota"),
}


@pytest.mark.parametrize("what", QUOTA)
def test_a_quota_that_is_used_up(host: Host, what: str) -> None:
    """EDQUOT wherever something is written: one clear line, exit 1, a whole file; without it the next run converges."""
    require("strace")
    install_old(host)
    if what == "the backup":  # a file with another name is copied
        os.link(host.bin / "manager", host.root / "other-name")
    where, about = QUOTA[what]
    path = host.root / where.format(md5=md5(V2), old=md5(V1))
    strace = ["strace", "-f", "-qqq", "-o", "/dev/null", "-P", str(path)]
    strace += ["-e", "trace=write", "-e", "inject=write:error=EDQUOT"]
    done = subprocess.run(
        [*strace, *host.command("sync")],
        cwd=REPOSITORY,
        env=host.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("strace: "))
    complaint(done, about)
    if what in ("the download", "the record", "the backup"):
        assert host.disk_md5("manager") == md5(V1)
    assert host.disk_md5("manager") in (md5(V1), md5(V2))
    assert_converges(host)


def test_a_full_disk_for_the_release(host: Host) -> None:
    """A release that finds no space is refused before it is written; with space the next run converges."""
    with tmpfs(host.bin, "4m") as folder:
        install_old(host)
        host.server.publish("manager", good("v2", 2 << 20))
        filler = fill(folder, 1 << 20)
        before = (host.bin / "manager").stat()
        for minute in range(2):
            done = host.sync()
            if minute == 0:
                complaint(done, "manager: no space in .*free.*needed")
            assert (done.returncode, host.disk_md5("manager")) == (1, md5(V1))
        assert_untouched(host, before)
        filler.unlink()
        assert_converges(host, good("v2", 2 << 20))


def test_a_disk_that_fills_up_during_the_download(host: Host) -> None:
    """Somebody else takes the space that was there: ENOSPC is one clear line, and the next run converges."""
    data = good("v2", 2 << 20)
    with tmpfs(host.bin, "4m") as folder:
        install_old(host)
        host.server.publish("manager", data)

        def send_while_it_fills(handler: Handler) -> bool:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[:65536])
            eventually(lambda: any(part.stat().st_size for part in host.bin.glob(".*.part")))
            fill(folder)
            handler.wfile.write(data[65536:])
            return False

        host.server.scripts[host.server.download_path("manager")] = [send_while_it_fills]
        before = (host.bin / "manager").stat()
        complaint(host.sync(), "manager: .*No space left")
        assert_untouched(host, before)
        (folder / "filler").unlink()
        assert_converges(host, data)


def test_a_full_disk_for_the_backup(host: Host) -> None:
    """A backup that cannot be copied to another filesystem keeps the update from happening."""
    with tmpfs(host.state, "2m") as folder:
        install_old(host)
        host.install("manager", good("v1", 3 << 20))
        before = (host.bin / "manager").stat()
        complaint(host.sync(), "manager: no space in .*free.*needed")
        assert_untouched(host, before)
        assert not list(folder.glob("backups/manager/*"))
        # Told as a whole before, but no longer there when it is needed.
        subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
        assert_converges(host)
        assert list(folder.glob("backups/manager/*"))


@pytest.mark.parametrize("state_there", [False, True])
def test_a_full_disk_for_the_journal(host: Host, state_there: bool) -> None:
    """Where nothing can be recorded nothing is begun: the host stays as it is until there is space."""
    install_old(host)
    with tmpfs(host.state, "256k") as folder:
        if state_there:
            host.server.publish("manager", V1)
            assert host.sync().returncode == 0
            host.server.publish("manager", V2)
        # 64 KiB of backup would not fit either, but the file is hardly ever this small.
        filler = fill(folder)
        before = (host.bin / "manager").stat()
        done = host.sync()
        assert done.returncode == 1
        assert 1 <= len(done.stderr.splitlines()) <= 2
        assert all(re.match("bin-proxy: .*[Ss]pace", line) for line in done.stderr.splitlines())
        now = (host.bin / "manager").stat()
        assert now.st_ino == before.st_ino
        assert host.disk_md5("manager") == md5(V1)
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
        assert host.sync().returncode == 0
        assert host.disk_md5("manager") == host.reported("manager") == md5(V2)
        assert host.strays() == []


def without_length(handler: Handler) -> bool:
    """Send the release and close, never telling its length."""
    release = handler.server.owner.releases["latest", handler.path.split("/")[-2]]
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    for start in range(0, len(release), 1 << 20):
        handler.wfile.write(release[start : start + (1 << 20)])
        time.sleep(0.01)
    handler.close_connection = True
    return False


@pytest.mark.parametrize("length", ["told", "untold"])
def test_releases_side_by_side_share_what_is_free(host: Host, length: str) -> None:
    """Two releases that fit singly and not together never both come, and 5 % of the filesystem stay free."""
    size = 40 << 20
    data = {name: good(f"{name} v2", 20 << 20) for name in ("one", "two")}
    with tmpfs(host.bin, str(size)) as folder:
        host.write_manifest(*({"name": name, "service": False, "currentMd5": ""} for name in data))
        barrier = threading.Barrier(2)
        for name, release in data.items():
            host.server.publish(name, release)
            answer = without_length if length == "untold" else None

            def together(handler: Handler, answer: Any = answer) -> bool:
                with suppress(threading.BrokenBarrierError):
                    barrier.wait(3)
                return answer(handler) if answer else True

            host.server.scripts[host.server.download_path(name)] = [together] * 4
        least = [size]
        over = threading.Event()

        def measure() -> None:
            while not over.wait(0.002):
                numbers = os.statvfs(folder)
                least.append(numbers.f_bavail * numbers.f_frsize)

        watcher = threading.Thread(target=measure)
        watcher.start()
        try:
            done = host.sync("--json")
        finally:
            over.set()
            watcher.join()
        outcomes = sorted(row["outcome"] for row in json.loads(done.stdout)["results"])
        # Where no length is told, both may find out too late that there is no space for two.
        assert outcomes == ["failed", "updated"] or (length == "untold" and outcomes == ["failed", "failed"])
        assert re.search("(one|two): no space in", done.stderr)
        assert min(least) >= size // 20
        # With twice the space the other one follows.
        subprocess.run(["mount", "-o", f"remount,size={2 * size}", folder], check=True)
        host.server.scripts.clear()
        assert host.sync().returncode == 0
        assert {name: host.disk_md5(name) for name in data} == {name: md5(release) for name, release in data.items()}
        assert host.strays() == []


def test_two_binaries_that_are_links_of_one_file_are_both_updated(host: Host) -> None:
    """To replace one changes the other's link count and its times, not what it is."""
    host.install("one", good("v1"))
    os.link(host.bin / "one", host.bin / "two")
    host.write_manifest(*({"name": name, "service": False, "currentMd5": ""} for name in ("one", "two")))
    for name in ("one", "two"):
        host.server.publish(name, good(f"{name} v2"))
    done = host.sync()
    assert (done.returncode, done.stderr) == (0, "")
    assert {name: host.disk_md5(name) for name in ("one", "two")} == {
        name: md5(good(f"{name} v2")) for name in ("one", "two")
    }
    for name in ("one", "two"):
        assert (host.state / "backups" / name / md5(good("v1"))).stat().st_nlink == 1
    assert host.strays() == []


# other filesystems


def test_a_state_folder_on_another_filesystem() -> None:
    """Backups are copies there: a good update, and a bad one that is rolled back, work as elsewhere."""
    with quick_host() as host, tmpfs(host.state, "32m"):
        host.server.publish("manager", V2)
        assert_converges(host)
        backup = host.state / "backups/manager" / md5(V1)
        assert md5(backup.read_bytes()) == md5(V1)
        assert stat.S_IMODE((host.state / "backups").stat().st_mode) == 0o700
        host.server.publish("manager", dies_at_once("v3"))
        assert host.outcomes() == {"manager": "rolled-back"}
        assert host.disk_md5("manager") == host.reported("manager") == host.running_md5("manager") == md5(V2)
        assert host.outcomes() == {"manager": "held"}
        assert host.strays() == []


def test_rollback_by_hand_from_another_filesystem() -> None:
    """rollback works from backups that are copies."""
    with quick_host() as host, tmpfs(host.state, "32m"):
        host.server.publish("manager", V2)
        assert host.sync().returncode == 0
        done = host.run("rollback", "manager")
        assert done.returncode == 0, done
        assert host.disk_md5("manager") == host.reported("manager") == host.running_md5("manager") == md5(V1)
        assert host.outcomes() == {"manager": "held"}
        assert host.strays() == []


def test_a_read_only_binary_folder() -> None:
    """A read-only filesystem is found out before the download, and costs nothing each minute."""
    with quick_host() as host, tmpfs(host.root / "ro", "8m") as folder:
        (folder / "manager").write_bytes(V1)
        (folder / "manager").chmod(0o755)
        settings = {"BIN_DIR": str(folder)}
        host.server.publish("manager", V2)
        pid = host.pid("manager")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        complaint(host.sync(**settings), "manager: .*read-only")
        done = host.sync(**settings)
        assert (done.returncode, done.stderr) == (1, "")
        assert (downloads(host), host.pid("manager"), held_text(host)) == ([], pid, "")
        assert host.strays() == []
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        assert host.sync(**settings).returncode == 0
        assert md5((folder / "manager").read_bytes()) == md5(V2)


def test_an_immutable_binary() -> None:
    """Refused before the swap, service untouched, not held, fetched once; once it may be replaced it is."""
    with quick_host() as host:
        host.server.publish("manager", V2)
        pid, before = host.pid("manager"), (host.bin / "manager").stat()
        with immutable(host.bin / "manager"):
            complaint(host.sync(), "manager: .*(not permitted|immutable)")
            for _ in range(2):
                done = host.sync()
                assert (done.returncode, done.stderr) == (1, "")
            assert_untouched(host, before)
            assert host.pid("manager") == pid
            assert host.server.downloads <= 1
        assert_converges(host)
        assert host.server.downloads == 1
        assert host.running_md5("manager") == md5(V2)


def test_an_immutable_manifest(host: Host) -> None:
    """The update stands, that the manifest could not be written is told once, and it is written when it can be."""
    install_old(host)
    with immutable(host.manifest_path):
        complaint(host.sync(), "manifest")
        assert host.disk_md5("manager") == md5(V2)
        again = [host.sync() for _ in range(2)]
        assert all(done.returncode == 1 for done in again)
        # The first told of this update, one of the following may tell of the manifest's own trouble; then silence.
        assert again[-1].stderr == ""
        assert host.reported("manager") == ""
    assert_converges(host)
    assert host.server.downloads == 1


# things in the way


def folder_in_the_way(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("data")


IN_THE_WAY: dict[str, Callable[[Path], Any]] = {
    "a folder": folder_in_the_way,
    "a dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a loop of links": lambda path: path.symlink_to(path),
    "a pipe": os.mkfifo,
    "a device": lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "a link to a folder": lambda path: path.symlink_to("/usr"),
    "a link to a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_something_in_the_way(host: Host, what: str) -> None:
    """What is no regular file stays as it is, nothing is fetched for it, and the other binaries are updated."""
    if what == "a device":
        require_root()
    IN_THE_WAY[what](host.bin / "manager")
    before = (host.bin / "manager").lstat()
    for name in ("manager", "other"):
        host.server.publish(name, V2)
    host.write_manifest(*({"name": name, "currentMd5": "", "service": False} for name in ("manager", "other")))
    complaint(host.sync(), f"manager: .*{re.escape(str(host.bin / 'manager'))}")
    now = (host.bin / "manager").lstat()
    assert (now.st_ino, now.st_mode, now.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert not (host.bin / "nowhere").exists()
    assert host.disk_md5("other") == md5(V2)
    assert host.server.downloads == 1
    assert host.strays() == []
    again = host.sync()
    assert (again.returncode, again.stderr) == (1, "")
    if what == "a folder":
        (host.bin / "manager/precious").unlink()
        (host.bin / "manager").rmdir()
    else:
        (host.bin / "manager").unlink()
    assert host.outcomes() == {"manager": "updated", "other": "current"}


def test_a_file_in_place_of_the_folder(host: Host) -> None:
    """A BIN_DIR that is a file is a clear line, and the file stays."""
    install_old(host)
    host.bin.rename(host.root / "bin.old")
    host.bin.write_text("not a folder")
    complaint(host.sync(), f"manager: .*{host.bin}")
    assert host.bin.read_text() == "not a folder"
    host.bin.unlink()
    (host.root / "bin.old").rename(host.bin)
    assert_converges(host)


# what belongs to the file


def dress_up(path: Path) -> None:
    """Owner, set-id bits, a capability, a user attribute and an ACL, none of them what a new file would have."""
    require("setcap", "setfacl")
    require_root()
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o6751)
    os.setxattr(path, "user.origin", b"kept")
    subprocess.run(["setfacl", "-m", "u:1234:r-x", path], check=True)
    subprocess.run(["setcap", "cap_net_bind_service=+ep", path], check=True)


def test_attributes_survive_update_and_both_ways_back() -> None:
    """Owner, mode, set-id bits, capabilities, attributes and ACL are kept by an update, an automatic roll-back and
    a rollback by hand, also in a folder that bequeaths an ACL of its own."""
    with quick_host() as host:
        subprocess.run(["setfacl", "-d", "-m", "u:4321:rwx,g:4321:rwx", host.bin], check=True)
        path = host.bin / "manager"
        dress_up(path)
        wanted = attributes(path)
        assert {"user.origin", "security.capability", "system.posix_acl_access"} <= wanted[3].keys()
        host.server.publish("manager", V2)
        assert host.outcomes() == {"manager": "updated"}
        assert attributes(path) == wanted
        host.server.publish("manager", dies_at_once("v3"))
        assert host.outcomes() == {"manager": "rolled-back"}
        assert (host.disk_md5("manager"), attributes(path)) == (md5(V2), wanted)
        done = host.run("rollback", "manager")
        assert done.returncode == 0, done
        assert (host.disk_md5("manager"), attributes(path)) == (md5(V1), wanted)


def test_attributes_that_changed_since_the_backup_are_kept() -> None:
    """A roll-back brings bytes back, not the attributes that an operator has changed since they were kept."""
    with quick_host() as host:
        require_root()
        path = host.bin / "manager"
        host.server.publish("manager", V2)
        assert host.outcomes() == {"manager": "updated"}
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o750)
        wanted = attributes(path)
        assert host.run("rollback", "manager").returncode == 0
        assert (host.disk_md5("manager"), attributes(path)) == (md5(V1), wanted)


def test_a_link_stays_and_its_target_is_replaced(host: Host) -> None:
    """The link is not touched; the file behind it is replaced, staged beside it."""
    install_old(host)
    real = host.root / "real"
    real.mkdir()
    (host.bin / "manager").rename(real / "manager-1")
    (host.bin / "manager").symlink_to("../real/manager-1")
    before = (host.bin / "manager").lstat()
    assert_converges(host)
    assert (host.bin / "manager").lstat().st_ino == before.st_ino
    assert [path.name for path in real.iterdir()] == ["manager-1"]
    assert not (real / "manager-1").is_symlink()


def give(path: Path, attribute: str) -> None:
    require("setcap")
    require_root()
    if attribute == "owner":
        os.chown(path, NOBODY, NOBODY)
    else:
        subprocess.run(["setcap", "cap_net_bind_service=+ep", path], check=True)


@pytest.mark.parametrize(("attribute", "lacking"), [("owner", "chown"), ("capability", "setfcap")])
def test_an_attribute_that_cannot_be_given(host: Host, attribute: str, lacking: str) -> None:
    """Root without the privilege that it takes refuses before the swap, fetches once, and holds nothing."""
    require("setpriv")
    install_old(host)
    give(host.bin / "manager", attribute)
    before, wanted = (host.bin / "manager").stat(), attributes(host.bin / "manager")
    for minute in range(2):
        done = subprocess.run(
            ["setpriv", f"--bounding-set=-{lacking}", f"--inh-caps=-{lacking}", *host.command("sync")],
            cwd=REPOSITORY,
            env=host.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if minute == 0:
            complaint(done, "manager: .*not permitted")
        assert (done.returncode, done.stderr if minute else "") == (1, "")
    assert_untouched(host, before)
    assert host.server.downloads == 1
    assert_converges(host)
    assert attributes(host.bin / "manager") == wanted


def test_an_ordinary_user_and_a_file_of_root() -> None:
    """Somebody who may write the folder, but cannot give the file back to root, does not replace root's file."""
    require("setpriv")
    require_root()
    host = Host()
    try:
        install_old(host)
        code = host.root / "code"
        code.mkdir()
        subprocess.run(["cp", "-r", REPOSITORY / "bin_proxy", code], check=True)
        for path in (host.root, host.bin, host.manifest_path, host.root / "config"):
            os.chown(path, NOBODY, NOBODY)
        before = (host.bin / "manager").stat()
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        done = subprocess.run(
            [*user, *host.command("sync")],
            cwd=code,
            env=host.environment(PYTHONDONTWRITEBYTECODE="1", SUPERVISORCTL=""),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        complaint(done, "manager: .*not permitted")
        assert_untouched(host, before)
        os.chown(host.bin / "manager", NOBODY, NOBODY)
        again = subprocess.run(
            [*user, *host.command("sync")],
            cwd=code,
            env=host.environment(PYTHONDONTWRITEBYTECODE="1", SUPERVISORCTL=""),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (again.returncode, again.stderr) == (0, "")
        assert host.disk_md5("manager") == md5(V2)
    finally:
        host.close()


def test_the_backup_of_a_hard_linked_file_is_a_copy(host: Host) -> None:
    """A file with another name is copied, so that writing through that name alters no backup."""
    install_old(host)
    other = host.root / "other-name"
    os.link(host.bin / "manager", other)
    assert_converges(host)
    backup = host.state / "backups/manager" / md5(V1)
    assert backup.stat().st_ino != other.stat().st_ino
    assert md5(other.read_bytes()) == md5(V1)
    other.write_bytes(b"altered")
    assert md5(backup.read_bytes()) == md5(V1)
    assert (host.bin / "manager").stat().st_ino not in {path.stat().st_ino for path in host.state.rglob("*")}


# an operator at work


def entry_of(host: Host, name: str) -> dict[str, Any]:
    entries = json.loads(host.manifest_path.read_text())["binaries"]
    return next(entry for entry in entries if entry["name"] == name)


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_manifest_edited_during_a_sync(how: str) -> None:
    """An operator's edit during the health window and the MD5 that the sync records are both in the file afterwards."""
    with quick_host() as host:
        host.write_manifest("manager", {"name": "other", "currentMd5": "by hand", "service": False})
        host.server.publish("manager", V2)
        host.server.publish("other", V1)
        host.install("other", V1)
        host.manifest_path.chmod(0o640)
        run = subprocess.Popen(host.command("sync", "--only", "manager"), cwd=REPOSITORY, env=host.environment())
        eventually(lambda: host.disk_md5("manager") == md5(V2))
        text = host.manifest_path.read_text().replace('"binaries"', '"note": "edited",\n  "binaries"')
        text = text.replace('"name": "other"', '"name": "other", "owner": "ops"')
        if how == "in place":
            host.manifest_path.write_text(text)
        else:
            (host.root / "m.new").write_text(text)
            (host.root / "m.new").chmod(0o640)
            (host.root / "m.new").rename(host.manifest_path)
        assert run.wait(60) == 0
        assert host.reported("manager") == md5(V2)
        assert json.loads(host.manifest_path.read_text())["note"] == "edited"
        assert entry_of(host, "other") == {"name": "other", "owner": "ops", "currentMd5": "by hand", "service": False}
        assert stat.S_IMODE(host.manifest_path.stat().st_mode) == 0o640
        assert host.manifest_path.read_text() == text.replace('"currentMd5": ""', f'"currentMd5": "{md5(V2)}"', 1)


def test_a_manifest_that_is_invalid_for_a_moment() -> None:
    """An editor that is half-way through is not overwritten, the update stands, and the next run records it."""
    with quick_host() as host:
        host.server.publish("manager", V2)
        whole = host.manifest_path.read_text()
        run = subprocess.Popen(
            host.command("sync"), cwd=REPOSITORY, env=host.environment(), stderr=subprocess.PIPE, text=True
        )
        eventually(lambda: host.disk_md5("manager") == md5(V2))
        host.manifest_path.write_text(whole[:40])
        _, told = run.communicate(timeout=60)
        assert run.returncode == 1
        assert len(told.splitlines()) == 1
        assert "manifest" in told
        assert host.manifest_path.read_text() == whole[:40]
        assert host.running_md5("manager") == md5(V2)
        assert host.sync().returncode == 2
        host.manifest_path.write_text(whole.replace('"binaries"', '"edited": true, "binaries"'))
        assert_converges(host)
        assert json.loads(host.manifest_path.read_text())["edited"] is True
        assert host.server.downloads == 1


def test_an_entry_removed_during_its_update() -> None:
    """An entry that leaves the manifest while it is updated does not come back, and the update is finished."""
    with quick_host() as host:
        host.server.publish("manager", V2)
        run = subprocess.Popen(host.command("sync"), cwd=REPOSITORY, env=host.environment())
        eventually(lambda: host.disk_md5("manager") == md5(V2))
        host.write_manifest()
        assert run.wait(60) == 0
        assert json.loads(host.manifest_path.read_text()) == {"binaries": []}
        assert host.running_md5("manager") == md5(V2)
        assert host.strays() == []
        assert host.sync().returncode == 0


def test_a_state_folder_that_fills_up_during_an_update_restarts_nothing_every_minute() -> None:
    """What runs the release that it should is left alone, however long nothing can be written down."""
    with quick_host() as host, tmpfs(host.state, "256k") as folder:
        assert host.sync().returncode == 0
        new = host.server.publish("manager", V2)
        pid = host.pid("manager")
        with running(host, "sync", MIN_HEALTHY_SECONDS="3") as run:
            eventually(lambda: host.pid("manager") not in (0, pid))
            filler = fill(folder)
            assert run.wait(60) == 1
        pid = host.pid("manager")
        for _ in range(3):
            host.sync()
            assert host.pid("manager") == pid
        assert host.log().count("manager: updated") == 1
        filler.unlink()
        assert host.sync().returncode == 0
        assert host.pid("manager") == pid and host.running_md5("manager") == host.reported("manager") == new


def test_an_interrupted_roll_back_with_a_full_state_folder_restarts_nothing_every_minute() -> None:
    """The hold must not be lost, so its record stays; the previous release, which runs, is only watched."""
    with quick_host() as host, tmpfs(host.state, "256k") as folder:
        assert host.sync().returncode == 0
        bad = host.server.publish("manager", dies_after(2.5, "bad"))
        pid = host.pid("manager")
        with running(host, "sync", MIN_HEALTHY_SECONDS="5") as run:
            eventually(lambda: host.pid("manager") not in (0, pid))
            filler = fill(folder)
            assert run.wait(60) == 1
        assert host.running_md5("manager") == md5(V1)
        pid = host.pid("manager")
        for _ in range(2):
            assert host.sync().returncode == 1
            assert host.pid("manager") == pid
        filler.unlink()
        assert host.sync().returncode == 1
        assert host.outcomes() == {"manager": "held"} and host.server.downloads == 1
        assert host.pid("manager") == pid and bad != host.disk_md5("manager")


# damaged state


def make_held(host: Host) -> None:
    """v1 is installed; v2, which is offered, is held."""
    install_old(host, verifyCommand=["/bin/sh", "-c", "! grep -q v2 {file}"])
    assert host.outcomes() == {"manager": "held"}
    assert host.server.downloads == 1


def test_a_state_file_cut_at_every_byte(host: Host) -> None:
    """A state file, cache or record of which a part is left is set aside whole, never half believed."""
    make_held(host)
    for file in ("state.json", "cache.json"):
        raw = (host.state / file).read_bytes()
        # An empty cache is what a power loss leaves, as nobody waits for the disk to have it: no news for anybody.
        for length in range(1 if file == "cache.json" else 0, len(raw)):
            write_state(host, file, raw[:length])
            state = State(str(host.state), ("manager",))
            assert [name for name, _ in state.unreadable] == [file]
            assert [hold.md5 for hold in state.memory("manager").holds] == [md5(V2)] and state.blind == []
        write_state(host, file, raw)
    record = Record(
        "manager", str(host.bin / "manager"), md5(V1), md5(V2), 7, {"manager": 42}, True, False, "sync", 0.5
    )
    State(str(host.state), ("manager",)).write_record(record)
    raw = (host.state / "journal/manager.json").read_bytes()
    for length in range(len(raw)):
        write_state(host, "journal/manager.json", raw[:length])
        assert State(str(host.state), ("manager",)).records == {"manager": None}
    write_state(host, "journal/manager.json", raw)
    whole = State(str(host.state), ("manager",))
    assert whole.records == {"manager": record}
    assert (whole.unreadable, [hold.md5 for hold in whole.memory("manager").holds]) == ([], [md5(V2)])


NOISE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "zeros": lambda raw: b"\0" * len(raw),
    "noise": lambda raw: bytes((7 * at * at + at) % 256 for at in range(4096)),
    "another shape": lambda raw: b'{"version": 1, "memories": [], "pauses": 3}',
    "a list": lambda raw: b"[1, 2, 3]",
    "deep": lambda raw: b"[" * 100_000,
    "a later version": lambda raw: raw.replace(b'"version": 1', b'"version": 99'),
    "an endless number": lambda raw: b'{"version": 1' + b"0" * 10_000 + b"}",
    "not finite": lambda raw: raw.replace(b'"version": 1', b'"version": NaN'),
}


@pytest.mark.parametrize(
    ("damage", "files"),
    [(damage, ["state.json"]) for damage in NOISE]
    + [(damage, ["state.json", "cache.json"]) for damage in ("cut", "a later version")],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_damaged_memory_does_not_bring_a_held_release_back(host: Host, damage: str, files: list[str]) -> None:
    """Damaged files are kept aside and told once; a release that may have been held stays away; the next one comes."""
    make_held(host)
    for file in files:
        write_state(host, file, NOISE[damage]((host.state / file).read_bytes()))
    bad = {file: (host.state / file).read_bytes() for file in files}
    done = host.sync()
    assert done.returncode == 1
    for file in files:
        [aside] = host.state.glob(f"{file}.*unreadable*")
        assert aside.read_bytes() == bad[file]
        assert len([line for line in done.stderr.splitlines() if f"/{file} " in line]) == 1
    again = host.sync()
    assert (again.returncode, again.stderr) == (1, "")
    assert host.outcomes() == {"manager": "held"}
    assert (host.server.downloads, host.disk_md5("manager")) == (1, md5(V1))
    host.server.publish("manager", V3)
    assert_converges(host, V3)
    assert sum(1 for path in host.state.iterdir() if "unreadable" in path.name) == len(files)


def test_memory_and_cache_lost_while_bin_manager_is_down(host: Host) -> None:
    """Until it is known what was on offer, nothing is: the first answer after the loss may be the held release."""
    make_held(host)
    for file in ("state.json", "cache.json"):
        write_state(host, file, b"[")
    for _ in range(2):
        assert host.sync(BIN_MANAGER_API="http://127.0.0.1:1").returncode == 1
    assert [host.outcomes() for _ in range(2)] == [{"manager": "held"}] * 2
    assert (host.server.downloads, host.disk_md5("manager")) == (1, md5(V1))
    host.server.publish("manager", V3)
    assert_converges(host, V3)


def test_a_damaged_cache_costs_nothing(host: Host) -> None:
    """A cache that cannot be read is kept aside and told; the update goes on."""
    install_old(host)
    write_state(host, "cache.json", b"\xff\xfe")
    done = host.sync()
    assert len(done.stderr.splitlines()) == 1
    assert "cache.json" in done.stderr
    assert host.disk_md5("manager") == md5(V2)
    assert host.sync().stderr == ""


def interrupt(host: Host, **settings: str) -> bytes:
    """Kill a sync whose service does not run at that moment; returns the record that it leaves."""
    run = subprocess.Popen(
        host.command("sync"), cwd=REPOSITORY, env=host.environment(**settings), stderr=subprocess.DEVNULL
    )
    eventually(lambda: host.disk_md5("manager") == md5(V2))
    run.send_signal(signal.SIGKILL)
    run.wait()
    eventually(lambda: not subprocess.run(["pgrep", "-f", f"restart manager.*{host.conf}"], check=False).stdout)
    host.ctl("stop", "manager")
    return (host.state / "journal/manager.json").read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "a later version"])
def test_a_damaged_record_ends_in_a_running_service(damage: str) -> None:
    """An update that was begun, whose record tells nothing any more: the service is seen to run, on a whole file."""
    with quick_host() as host:
        host.server.publish("manager", V2)
        raw = interrupt(host)
        write_state(host, "journal/manager.json", NOISE[damage](raw))
        done = host.sync()
        assert len([line for line in done.stderr.splitlines() if "journal/manager.json" in line]) == 1
        eventually(lambda: host.pid("manager"))
        host.sync()
        assert host.sync().returncode == 0
        assert host.disk_md5("manager") == host.reported("manager") == host.running_md5("manager") == md5(V2)
        [aside] = list(host.state.rglob("*unreadable*"))
        assert aside.read_bytes() == NOISE[damage](raw)


def test_a_damaged_record_waits_for_supervisord() -> None:
    """That a service has to be seen to run is not forgotten while supervisord is down, nor by a kill in between."""
    with quick_host() as host:
        host.programs["manager"]["autostart"] = "false"
        host.write_conf()
        host.server.publish("manager", V2)
        raw = interrupt(host)
        write_state(host, "journal/manager.json", raw[:20])
        host.stop_supervisord()
        for _ in range(2):
            assert host.sync().returncode == 1
        host.start_supervisord()
        assert host.service_state("manager") == "STOPPED"
        host.sync()
        eventually(lambda: host.running_md5("manager") == md5(V2))
        assert host.sync().returncode == 0
        assert host.reported("manager") == md5(V2)


def test_a_state_folder_that_vanishes(host: Host) -> None:
    """STATE_DIR removed between runs is made anew, and updates go on."""
    install_old(host)
    assert_converges(host)
    subprocess.run(["rm", "-rf", host.state], check=True)
    host.server.publish("manager", V3)
    assert_converges(host, V3)
    assert stat.S_IMODE(host.state.stat().st_mode) == 0o755
    assert stat.S_IMODE((host.state / "backups").stat().st_mode) == 0o700
    assert md5((host.state / "backups/manager" / md5(V2)).read_bytes()) == md5(V2)


def test_a_state_folder_that_is_a_file(host: Host) -> None:
    """A file where STATE_DIR should be is one clear line; nothing is touched."""
    install_old(host)
    host.state.write_text("")
    before = (host.bin / "manager").stat()
    done = host.sync()
    complaint(done, str(host.state))
    assert (host.bin / "manager").stat().st_ino == before.st_ino
    assert host.server.requests == []
    host.state.unlink()
    assert_converges(host)


# LOG_FILE


def no_log_pipe(host: Host) -> Path:
    os.mkfifo(host.root / "pipe")
    return host.root / "pipe"


LOGS: dict[str, Callable[[Host], Path]] = {
    "a missing folder": lambda host: host.root / "missing" / "log",
    "a pipe": no_log_pipe,
    "a full disk": lambda host: Path("/dev/full"),
    "a folder": lambda host: host.bin,
}


@pytest.mark.parametrize("what", LOGS)
def test_a_log_file_that_cannot_be_written(host: Host, what: str) -> None:
    """That is told in one line, nothing hangs, and the work goes on."""
    install_old(host)
    path = LOGS[what](host)
    done = host.sync(LOG_FILE=str(path), timeout=30)
    assert re.fullmatch(r"bin-proxy: [^\n]*LOG_FILE[^\n]*\n", done.stderr), done.stderr
    assert host.disk_md5("manager") == host.reported("manager") == md5(V2)
    again = host.sync(LOG_FILE=str(path), timeout=30)
    assert (again.returncode, again.stderr) == (0, "")


def test_a_line_for_which_the_log_has_no_room_is_not_cut(host: Host) -> None:
    """One event is one line: what does not fit is said, and the next line stands by itself."""
    install_old(host)
    with tmpfs(host.root / "small", "8k") as folder:
        room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "log").write_text("x" * (room - 31) + "\n")
        done = host.sync(LOG_FILE=str(folder / "log"))
        assert "LOG_FILE" in done.stderr and host.disk_md5("manager") == md5(V2)
        assert (folder / "log").stat().st_size == room - 30
        os.truncate(folder / "log", 0)
        host.server.publish("manager", V3)
        assert host.sync(LOG_FILE=str(folder / "log")).returncode == 0
        [line] = (folder / "log").read_text().splitlines()
        assert line.startswith("[") and md5(V3) in line


def test_a_log_file_on_a_full_disk(host: Host) -> None:
    """A line that could be written only in part counts as not written."""
    install_old(host)
    with tmpfs(host.root / "logs", "64k") as folder:
        (folder / "log").write_text("")
        fill(folder)
        done = host.sync(LOG_FILE=str(folder / "log"))
        assert "LOG_FILE" in done.stderr
        assert host.disk_md5("manager") == md5(V2)


# odd callers


@pytest.mark.parametrize("umask", ["077", "000"])
def test_the_modes_do_not_depend_on_the_umask(umask: str) -> None:
    """What bin-proxy makes has the modes that are promised, whatever umask its caller has."""
    with quick_host() as host:
        host.server.publish("manager", V2)
        host.server.publish("new", V1)
        host.write_manifest("manager", {"name": "new", "service": False})
        state = host.root / "var" / "lib" / "state"
        done = subprocess.run(
            ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *host.command("sync")],
            cwd=REPOSITORY,
            env=host.environment(STATE_DIR=str(state)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (host.bin / "new", host.bin / "manager", state)}
        assert set(modes.values()) == {0o755}, modes
        assert stat.S_IMODE((state / "backups").stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "state.json").stat().st_mode) == 0o644
        for path in [host.root / "var", host.root / "var/lib", *state.rglob("*"), host.log_path]:
            assert not path.stat().st_mode & 0o022, path


@pytest.mark.parametrize(
    ("command", "closed"),
    [("sync", "<&-"), ("sync", ">&-"), ("sync", "2>&-"), ("sync", "<&- >&- 2>&-"), ("sync --json", ">&-")],
)
def test_closed_streams(host: Host, command: str, closed: str) -> None:
    """Without stdin, stdout or stderr the work is done all the same, and nothing is written into files instead."""
    install_old(host)
    script = f"{' '.join(host.command(*command.split()))} {closed}"
    environment = host.environment()
    done = subprocess.run(["sh", "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert done.stderr == b""
    assert done.returncode == 0
    assert host.disk_md5("manager") == host.reported("manager") == md5(V2)
    assert (host.state / "lock").read_bytes() == b""
    # A trouble that cannot be told is no reason to stop either.
    host.server.always["*"] = answering(500, b"<html>")
    done = subprocess.run(["sh", "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 1
    assert (host.state / "lock").read_bytes() == b""
    host.server.always.clear()
    assert host.outcomes() == {"manager": "current"}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_cannot_be_written(host: Host, stream: str) -> None:
    """A full disk behind stdout or stderr does not stop the work."""
    install_old(host)
    with open("/dev/full", "wb") as full:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        command = host.command("-v", "sync", "--json")
        done = subprocess.run(command, cwd=REPOSITORY, env=host.environment(), timeout=60, **streams)
    assert b"Traceback" not in (done.stderr or b"")
    assert host.disk_md5("manager") == host.reported("manager") == md5(V2)
    assert host.strays() == []


def test_a_caller_without_home_folder_or_path(host: Host) -> None:
    """No HOME, no LANG, no PATH, and a working folder that was removed: cron and init systems are like that."""
    install_old(host)
    gone = host.root / "gone"
    gone.mkdir()
    environment = {key: value for key, value in host.environment().items() if key not in ("PATH", "LANG", "HOME")}
    script = "import os, sys; os.rmdir(os.getcwd()); os.execve(sys.argv[1], sys.argv[1:], os.environ)"
    done = subprocess.run(
        [sys.executable, "-c", script, *host.command("sync")],
        cwd=gone,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.disk_md5("manager") == host.reported("manager") == md5(V2)


def test_three_hundred_binaries(host: Host) -> None:
    """A long manifest is brought to its releases in one run, and the next run has nothing to do."""
    with tmpfs(host.bin, "64m"), tmpfs(host.state, "64m"):
        bring_three_hundred(host, [f"tool{number:03}" for number in range(300)])


def bring_three_hundred(host: Host, names: list[str]) -> None:
    for name in names:
        host.install(name, f"{name} v1".encode())
        host.server.publish(name, f"{name} v2".encode())
    host.write_manifest(*({"name": name, "currentMd5": "", "service": False} for name in names))
    assert set(host.outcomes().values()) == {"updated"}
    assert all(host.disk_md5(name) == host.reported(name) == md5(f"{name} v2".encode()) for name in names)
    assert host.server.downloads == 300
    done = host.sync()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (host.server.downloads, host.strays()) == (300, [])
    assert len(host.log().splitlines()) == 300
    # One cause that strikes all is one line.
    host.server.stop()
    done = host.sync()
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
