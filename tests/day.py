"""A day in the life of a host: a sync every minute, and now and then everything that can go wrong, by a seed.

    python -m tests.day --minutes 1440 --seed 7

Every minute is one real `sync`, whose clock is a minute further than the one before. What must always hold is checked
while it runs and when it ends; in the end all troubles are over, and everything must be as bin-manager says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import clock
from tests.host import Host, dies_after, dies_at_once, eventually, good, md5
from tests.server import Handler

REPOSITORY = Path(__file__).parent.parent
_MORNING = 1_800_000_000
_HELD_FOR_SURE = 15  # 20 holds are kept; older ones may have gone
_SYNC_LIMIT = 90.0  # seconds in which any run of this day must end
_LOG_LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \S.*")


@dataclass
class Binary:
    """One binary, as the day's author knows it."""

    name: str
    service: bool
    kinds: dict[str, str] = field(default_factory=dict)  # every MD5 that was ever published: "good", "bad"
    bytes_of: dict[str, bytes] = field(default_factory=dict)
    offered: str = ""
    held: list[str] = field(default_factory=list)  # what a sync reported as held for its failure
    left_by_hand: set[str] = field(default_factory=set)
    paused_at: str | None = None  # the MD5 on disk when it was paused
    stopped: bool = False  # an operator stopped its service
    excused: bool = False  # a disturbance may still show in its outcome

    def surely_held(self) -> list[str]:
        return self.held[-_HELD_FOR_SURE:]


class Violation(AssertionError):
    """Something that must always hold did not."""


class Watcher(threading.Thread):
    """Looks at the installed files all the time: each must be there, and be a whole release."""

    def __init__(self, host: Host, binaries: list[Binary]) -> None:
        super().__init__(daemon=True)
        self._host, self._binaries = host, binaries
        self.over = threading.Event()
        self.looks = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        seen: dict[str, tuple[int, ...]] = {}
        while not self.over.wait(0.004):
            for binary in self._binaries:
                self.looks += 1
                try:
                    with open(self._host.bin / binary.name, "rb") as file:
                        found = os.fstat(file.fileno())
                        now = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
                        if now != seen.get(binary.name):
                            seen[binary.name] = now
                            if md5(file.read()) not in binary.kinds:
                                self.wrong.append(f"{binary.name} held bytes that are no release")
                except FileNotFoundError:
                    self.wrong.append(f"{binary.name} was absent")


class Day:
    """The host, what happens to it, and what is counted.

    Args:
        seed: of all that is random here.
        activity: how much more happens than on an ordinary day.
    """

    def __init__(self, seed: int, activity: float = 1.0) -> None:
        self.random, self.activity = random.Random(seed), activity
        self.counts: Counter[str] = Counter()
        self.host = Host()
        self.binaries = [Binary("manager", True), Binary("worker", True), Binary("tool", False)]
        self.ahead = 0.0
        self.minute = 0
        self.slowest = 0.0
        self.notes = 0
        self.down_until = -1
        self.disturbed = False
        self.during: list[threading.Thread] = []
        self.story: list[str] = []

    # the stage

    def begin(self) -> None:
        host = self.host
        host.settings |= {
            "MIN_HEALTHY_SECONDS": "0.5",
            "HTTP_TIMEOUT": "0.7",
            "DOWNLOAD_TIMEOUT": "5",
            "RESTART_TIMEOUT": "10",
            "HEALTH_TIMEOUT": "2",
        }
        for binary in self.binaries:
            data = good(f"{binary.name} first")
            self.publish(binary, data, "good")
            host.install(binary.name, data)
        host.program("manager", startsecs="0")
        host.program("worker", startsecs="1", stopwaitsecs="2")
        host.write_manifest("manager", "worker", {"name": "tool", "currentMd5": "", "service": False, "owner": "ops"})
        host.start_supervisord()
        for binary in self.binaries:
            if binary.service:
                host.await_running(binary.name)
        self.watcher = Watcher(host, self.binaries)
        self.watcher.start()

    def end(self) -> None:
        self.watcher.over.set()
        self.host.close()

    def publish(self, binary: Binary, data: bytes, kind: str) -> None:
        digest = md5(data)
        binary.kinds.setdefault(digest, kind)
        binary.bytes_of.setdefault(digest, data)
        binary.offered = digest
        self.host.server.publish(binary.name, data)

    def tell(self, what: str) -> None:
        self.counts[what.split(":")[0]] += 1
        self.story.append(f"minute {self.minute}: {what}")

    def chance(self, one_in_a_day: float) -> bool:
        """Whether something happens now that happens so many times on an ordinary day."""
        return self.random.random() < self.activity * one_in_a_day / 1440

    # what happens before a sync

    def publish_something(self) -> None:
        for binary in self.binaries:
            if not self.chance(50):
                continue
            tag = f"{binary.name} {self.minute}"
            older = [digest for digest in binary.kinds if digest != binary.offered]
            choice = self.random.random()
            if binary.stopped or not binary.service or choice < 0.6 or (not older and choice > 0.85):
                self.publish(binary, good(tag, self.random.choice([0, 0, 300_000])), "good")
            elif choice < 0.72:
                self.publish(binary, dies_at_once(tag), "bad")
            elif choice < 0.78:
                self.publish(binary, dies_after(0.2, tag), "bad")
            elif choice < 0.85:
                broken = [b"", b"#!/no/such/interpreter\n" + tag.encode(), b"\x7fELF\x02\x01\x01" + tag.encode()]
                self.publish(binary, self.random.choice(broken), "bad")
            else:
                digest = self.random.choice(older)
                self.publish(binary, binary.bytes_of[digest], binary.kinds[digest])
            self.tell(f"a {binary.kinds[binary.offered]} release: {binary.name} {binary.offered[:8]}")

    def break_bin_manager(self) -> None:
        """For this minute, or for a few requests, bin-manager does not do its part."""
        server = self.host.server
        server.always.clear()
        server.scripts.clear()
        if server.server is None:
            server.start()
        if not self.chance(120):
            return
        name, fault = self.random.choice(list(FAULTS.items()))
        self.tell(f"a fault of bin-manager: {name}")
        self.disturbed = True
        if fault is None:
            server.stop()
        elif self.random.random() < 0.5:
            server.always["*"] = fault
        else:
            binary = self.random.choice(self.binaries)
            path = self.random.choice([server.md5_path, server.download_path])(binary.name)
            server.scripts[path] = [fault] * self.random.randint(1, 3)

    def meddle(self) -> None:
        """What operators do."""
        host, binary = self.host, self.random.choice(self.binaries)
        calm = not self.disturbed and host.supervisord is not None and not list((host.state / "journal").glob("*"))
        if self.chance(12) and calm and binary.service and binary.kinds[binary.offered] == "good":
            if binary.stopped:
                host.ctl("start", binary.name)
            else:
                host.ctl("stop", binary.name)
            binary.stopped = not binary.stopped
            self.tell(f"an operator stopped or started a service: {binary.name}")
        if self.chance(8) and not binary.stopped:
            digest = self.random.choice([one for one, kind in binary.kinds.items() if kind == "good"])
            (host.root / "by-hand").write_bytes(binary.bytes_of[digest])
            (host.root / "by-hand").chmod(0o755)
            (host.root / "by-hand").rename(host.bin / binary.name)
            if binary.service and host.supervisord:
                host.ctl("restart", binary.name)
            binary.paused_at = binary.paused_at and digest
            binary.excused = True
            self.tell(f"an operator put a file there: {binary.name} {digest[:8]}")
        if self.chance(10):
            if binary.paused_at is None:
                host.run(
                    "pause", binary.name, *(["--for", "20m"] if self.random.random() < 0.5 else []), **self.clock()
                )
                binary.paused_at = host.disk_md5(binary.name)
            else:
                host.run("resume", binary.name, **self.clock())
                binary.paused_at = None
            self.tell(f"an operator paused or resumed: {binary.name}")
        if self.chance(8) and calm and not binary.stopped:
            before = host.disk_md5(binary.name)
            done = host.run("rollback", binary.name, **self.clock())
            self.check(done.returncode in (0, 1, 2, 75), f"rollback exited {done.returncode}: {done.stderr}")
            if done.returncode == 0 and before:
                binary.left_by_hand.add(before)
                binary.paused_at = binary.paused_at and host.disk_md5(binary.name)
            self.tell(f"an operator went back: {binary.name}, exit {done.returncode}")
        if self.chance(6):
            binary.held.clear()
            host.run("sync", "--retry-held", "--only", binary.name, **self.clock())
            self.tell(f"an operator tried what is held: {binary.name}")
        if self.chance(3):
            (host.state / "cache.json").write_bytes(self.random.randbytes(60))
            self.disturbed = True
            self.tell("a damaged cache")
        if self.chance(5):
            self.ahead += self.random.choice([-7200, -600, 600, 7200, 86400])
            for one in self.binaries:
                one.paused_at = None  # "--for" may end early or late; not looked at here
                host.run("resume", one.name, **self.clock())
            self.tell("the clock jumped")

    def restart_supervisord(self) -> None:
        host = self.host
        if host.supervisord is None and self.minute >= self.down_until:
            host.start_supervisord()
            self.settle()
        elif host.supervisord and self.chance(10):
            host.stop_supervisord()
            host.start_supervisord()
            self.settle()
            self.tell("supervisord restarted")
        elif host.supervisord and self.chance(8):
            self.reboot()
            self.tell("a reboot")
        if host.supervisord is None:
            self.disturbed = True

    def settle(self) -> None:
        for binary in self.binaries:
            binary.stopped = False
        with suppress(AssertionError):  # one whose file is bad at this moment comes up with the next sync
            eventually(lambda: all(self.executes(one) for one in self.binaries if one.service), 5)

    def reboot(self) -> None:
        """Everything stops at once; supervisord comes a minute or two later, cron does not wait for it."""
        self.host.stop_supervisord(signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-f", f"^{self.host.bin}/"], check=False)
        subprocess.run(["pkill", "-KILL", "-f", f"supervisorctl -c {self.host.conf}"], check=False)
        self.down_until = self.minute + self.random.choice([0, 1, 2])
        self.disturbed = True

    # what happens during a sync

    def disturb(self, run: subprocess.Popen[str], active: bool) -> None:
        """Kill the run, its children or supervisord, or edit the manifest, at a random moment of it."""
        moment = self.random.uniform(0, 2.5 if active else 0.4)
        choice = self.random.random() * (1 if active else 20)
        if choice < 0.25:
            children = self.random.random() < 0.5
            self.disturbed = True
            self.tell("a killed sync" + (" and its children" if children else ""))
            self.at(moment, lambda: self.kill(run, children))
        elif choice < 0.3:
            self.disturbed = True
            self.tell("a sync that was asked to end")
            self.at(moment, lambda: run.send_signal(self.random.choice([signal.SIGTERM, signal.SIGHUP])))
        elif choice < 0.32 and self.host.supervisord:
            self.disturbed = True
            self.tell("a reboot during a sync")
            self.at(moment, lambda: (self.kill(run, True), self.reboot()))
        elif choice < 0.35 and self.host.supervisord:
            self.disturbed = True
            self.tell("supervisord restarted during a sync")
            self.at(moment, self.bounce)
        elif choice < 0.5 or self.chance(20):
            self.tell("an edit of the manifest during a sync")
            self.at(moment, self.edit)

    def at(self, seconds: float, action: Callable[[], Any]) -> None:
        def act() -> None:
            time.sleep(seconds)
            action()

        self.during.append(threading.Thread(target=act))
        self.during[-1].start()

    def kill(self, run: subprocess.Popen[str], children: bool) -> None:
        found = [int(pid) for pid in self.children(run.pid)] if children else []
        run.kill()
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def bounce(self) -> None:
        self.host.stop_supervisord()
        self.host.start_supervisord()
        for binary in self.binaries:
            binary.stopped = False

    def edit(self) -> None:
        """An operator's editor: read, change, put in place; again where the file changed meanwhile, as vim asks."""
        path = self.host.manifest_path
        while True:
            before = path.stat()
            data = json.loads(path.read_text())
            data["note"] = self.notes + 1
            data["binaries"][2]["owner"] = f"ops {self.notes + 1}"
            new = path.with_name("manifest.edit")
            new.write_text(json.dumps(data, indent=2) + "\n")
            if (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
                new.rename(path)
                self.notes += 1
                return

    # what is looked at

    @staticmethod
    def children(pid: int) -> list[str]:
        with suppress(OSError):
            return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return []

    def executes(self, binary: Binary) -> set[str]:
        """The MD5s of what supervisord's children of this binary execute."""
        found = set()
        for pid in self.children(self.host.supervisord.pid) if self.host.supervisord else []:
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if str(self.host.bin / binary.name).encode() in words[:2]:
                    found.add(md5(Path(f"/proc/{pid}/exe").read_bytes()))
        return found

    def check(self, holds: bool, otherwise: str) -> None:
        self.counts["checks"] += 1
        if not holds:
            raise Violation(f"minute {self.minute}: {otherwise}\n" + "\n".join(self.story[-12:]))

    def clock(self) -> dict[str, str]:
        return clock.at(_MORNING + self.ahead + 60 * self.minute)

    # one minute

    def live(self) -> dict[str, dict[str, Any]]:
        """One minute: what happens, a sync, and a look at everything. Returns the results by name, if there are any."""
        host = self.host
        self.minute += 1
        self.disturbed = False
        self.restart_supervisord()
        self.break_bin_manager()
        self.publish_something()
        self.meddle()
        active = any(host.disk_md5(one.name) != one.offered and one.offered not in one.held for one in self.binaries)
        return self.sync(active, lambda run: self.disturb(run, active))

    def sync(self, active: bool, disturb: Callable[[subprocess.Popen[str]], None]) -> dict[str, dict[str, Any]]:
        host = self.host
        asked = len(host.server.requests)
        begun = time.monotonic()
        run = subprocess.Popen(
            host.command("sync", "--json"),
            cwd=REPOSITORY,
            env=host.environment(**self.clock()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        disturb(run)
        try:
            out, told = run.communicate(timeout=_SYNC_LIMIT)
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            raise Violation(f"minute {self.minute}: a sync did not end within {_SYNC_LIMIT} s") from None
        finally:
            for thread in self.during:
                thread.join()
            self.during.clear()
        seconds = time.monotonic() - begun
        self.slowest = max(self.slowest, seconds)
        self.counts["active minutes" if active else "quiet minutes"] += 1
        fetched = Counter(path.split("/")[-2] for path, _ in host.server.requests[asked:] if path.endswith("/download"))
        self.counts["download requests"] += sum(fetched.values())
        results = self.look(run.returncode, out, told, fetched)
        for binary in self.binaries:
            binary.excused = self.disturbed or (binary.excused and not results)
        return results

    def look(self, code: int, out: str, told: str, fetched: Counter[str]) -> dict[str, dict[str, Any]]:
        """Check what must hold after any run, and what must hold after one that nobody disturbed."""
        self.check("Traceback" not in told + out, told)
        codes = (0, 1, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGHUP, -signal.SIGTERM, -signal.SIGHUP)
        self.check(code in (codes if self.disturbed else (0, 1)), f"exit {code}: {told}")
        self.check(not self.watcher.wrong, "; ".join(self.watcher.wrong))
        self.check(self.watcher.is_alive(), "the watcher ended")
        manifest = json.loads(self.host.manifest_path.read_text())
        self.check(manifest.get("note", 0) == self.notes, f"the edit {self.notes} is lost: {manifest}")
        rows = json.loads(out)["results"] if code in (0, 1) and out else []
        results = {row["name"]: row for row in rows}
        for binary, entry in zip(self.binaries, manifest["binaries"], strict=True):
            self.check(entry["name"] == binary.name, f"the manifest's entries are {manifest}")
            if binary.offered in binary.surely_held():
                self.check(not fetched[binary.name], f"{binary.name}: a held release was fetched again")
            if binary.name in results:
                self.look_at(binary, results[binary.name], entry)
        if results and not self.disturbed:
            trouble = any(self.is_trouble(row) for row in rows) or "cache.json cannot be read" in told
            self.check((code == 0) == (not trouble), f"exit {code}: {rows} {told}")
            for line in self.host.log().splitlines():
                self.check(bool(_LOG_LINE.fullmatch(line)), f"the log has the line {line!r}")
            self.check(len(told.splitlines()) <= len(self.binaries) + 1, f"too many lines: {told}")
        return results

    def is_trouble(self, row: dict[str, Any]) -> bool:
        return row["error"] is not None

    def look_at(self, binary: Binary, row: dict[str, Any], entry: dict[str, Any]) -> None:
        outcome, name, disk = row["outcome"], binary.name, self.host.disk_md5(binary.name)
        self.counts[outcome] += 1
        told = f"{name} {outcome} ({row['error']}), {str(disk)[:8]} installed, {binary.offered[:8]} offered"
        if outcome == "held" and row["error"]:
            if row["toMd5"] not in binary.held:
                binary.held.append(row["toMd5"])
            right = binary.kinds[row["toMd5"]] == "bad"
            self.check(right, f"{told}: a good release is held for its failure")
        if outcome == "rolled-back" and row["toMd5"] in binary.held:
            self.check(False, f"{told}: a held release was tried again")
        if self.disturbed:
            return
        self.check(outcome != "failed" or binary.excused, f"{told}: nothing was wrong")
        self.check(outcome != "rolled-back" or binary.excused or binary.kinds[row["toMd5"]] == "bad", told)
        if outcome == "rolled-back" and not binary.excused:
            binary.held.append(row["toMd5"])  # its first failure holds it: it must not be fetched any more
        if outcome in ("current", "updated"):
            self.check(disk == binary.offered, told)
            self.check(entry["currentMd5"] == disk, f"{told}, {entry['currentMd5']} in the manifest")
        if outcome == "paused":
            self.check(binary.paused_at in (None, disk), f"{told}: it was paused at {binary.paused_at}")
        if outcome != "failed":
            journal = self.host.state / "journal" / f"{name}.json"
            self.check(not journal.exists(), f"{told}: its record is still open")
        parts = [part.name for part in self.host.bin.glob(f".{name}.*")]
        self.check(outcome in ("failed", "waiting") or not parts, f"{told}: {parts} are left")
        if binary.service:
            runs = self.executes(binary)
            if binary.stopped:
                self.check(not runs, f"{told}: its service was started though an operator had stopped it")
            elif outcome in ("current", "updated", "rolled-back", "held", "waiting", "paused"):
                # A file that was put there by hand, or that waits for its time, may be about to be restarted.
                self.check(runs == {disk}, f"{told}: {runs or 'nothing'} runs")
        kept = list((self.host.state / "backups" / name).glob("*"))
        self.check(len(kept) <= 4, f"{told}: {len(kept)} backups are kept")
        installed = (self.host.bin / name).stat().st_ino
        self.check(installed not in {path.stat().st_ino for path in kept}, f"{told}: a backup is the installed file")

    # the end of the day

    def converge(self) -> None:
        """All troubles end and each binary gets a new release: two minutes later everything is as it should be."""
        self.minute += 1
        server = self.host.server
        server.always.clear()
        server.scripts.clear()
        if server.server is None:
            server.start()
        if self.host.supervisord is None:
            self.host.start_supervisord()
        self.settle()
        self.host.run("resume", **self.clock())
        for binary in self.binaries:
            if binary.paused_at is not None:
                self.host.run("resume", binary.name, **self.clock())
            if binary.stopped:
                self.host.ctl("start", binary.name)
            binary.stopped, binary.paused_at, binary.excused = False, None, True
            self.publish(binary, good(f"{binary.name} last"), "good")
        for _ in range(2):
            self.disturbed = False
            results = self.sync(True, lambda run: None)
            self.minute += 1
        self.check({row["outcome"] for row in results.values()} == {"current"}, f"at the end of the day: {results}")
        self.check(self.host.strays() == [], f"left behind: {self.host.strays()}")
        status = self.host.run("status", "--check", **self.clock())
        self.check(status.returncode == 0, f"status --check: {status.stdout}{status.stderr}")


def corrupt(handler: Handler) -> bool:
    if not handler.path.endswith("/download"):
        return True
    handler.answer(200, b"\1" * 1000)
    return False


def cut(handler: Handler) -> bool:
    """Half of what was announced, then the connection ends."""
    release = handler.server.owner.releases.get(("latest", handler.path.split("/")[-2]), b"")
    if not handler.path.endswith("/download"):
        return True
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(release)))
    handler.end_headers()
    handler.wfile.write(release[: len(release) // 2])
    handler.close_connection = True
    return False


def hang(handler: Handler) -> bool:
    time.sleep(1.2)
    handler.close_connection = True
    return False


def drip(handler: Handler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.1)
    handler.close_connection = True
    return False


def fail(status: int, body: Any) -> Callable[[Handler], bool]:
    def answer(handler: Handler) -> bool:
        handler.answer(status, body)
        return False

    return answer


def drop(handler: Handler) -> bool:
    handler.close_connection = True
    return False


FAULTS: dict[str, Callable[[Handler], bool] | None] = {
    "down": None,
    "500": fail(500, {"code": 500, "message": "oops"}),
    "503": fail(503, b"busy"),
    "404": fail(404, {"code": 404, "message": "no such release"}),
    "html": fail(200, b"<html>login</html>"),
    "corrupt": corrupt,
    "cut": cut,
    "hang": hang,
    "drip": drip,
    "drop": drop,
}


def spend(minutes: int, seed: int, activity: float = 1.0, seconds: float | None = None) -> Day:
    """Spend a day of so many minutes, but for at most so many seconds of the real time, and let it end well.

    Raises:
        Violation: something that must always hold did not; told with the seed.
    """
    day = Day(seed, activity)
    until = time.monotonic() + seconds if seconds else None
    try:
        day.begin()
        while day.minute < minutes and (until is None or time.monotonic() < until):
            day.live()
        day.converge()
    except AssertionError as error:
        log = "\n".join(day.host.log().splitlines()[-15:])
        raise Violation(f"seed {seed}, activity {activity}: {error}\n{log}") from error
    finally:
        day.end()
    return day


def main() -> None:
    """Spend one day and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.day", description="A simulated day of a host.")
    parser.add_argument("--minutes", type=int, default=1440)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--activity", type=float, default=1.0, help="how much more happens than on an ordinary day")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    begun = time.monotonic()
    try:
        day = spend(arguments.minutes, arguments.seed, arguments.activity)
    except Violation as violation:
        print(violation)
        sys.exit(1)
    print(f"{day.minute} minutes in {time.monotonic() - begun:.0f} s, the slowest in {day.slowest:.1f} s")
    print(f"{day.watcher.looks} looks at the files while it went on")
    for what, count in sorted(day.counts.items()):
        print(f"{count:7} {what}")


if __name__ == "__main__":
    main()
