"""Kills or fails the real command line at every system call on a file of the host, one after another.

    python -m tests.sweep --full                      every point of every kind, two hours on two cores
    python -m tests.sweep --kind kill --sample 20     20 points of one kind, drawn with a fixed seed

A run is recorded with strace first; each recorded call that changes a file of the host (with --kind reads, each that
looks at one) is a point. Then the same run is done again for each point, and strace kills it there (or lets the call
fail); afterwards an ordinary sync has to bring file, service and manifest to one release, and to leave nothing behind.
The exit code is 1 if that fails anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xmlrpc.client
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from tests.host import dies_at_once, eventually, good, md5, running_host

NAME = "manager"
REPOSITORY = Path(__file__).parent.parent
ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES")
WORDS = {
    "ENOSPC": "No space left on device",
    "EIO": "Input/output error",
    "EROFS": "Read-only file system",
    "EACCES": "Permission denied",
}
# What changes a file, or makes a change durable. openat counts where it creates, ioctl where it clones.
CHANGING = (
    "write,writev,pwrite64,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,"
    "fsync,fdatasync,chmod,fchmod,fchmodat,chown,fchown,lchown,fchownat,setxattr,lsetxattr,fsetxattr,removexattr,"
    "lremovexattr,fremovexattr,truncate,ftruncate,fallocate,utimensat,openat,ioctl,copy_file_range,sendfile"
)
# What looks at a file. Only such an error is tried, as disk full and the like are of no concern to who reads.
READING = (
    "openat,read,pread64,getdents64,stat,lstat,fstat,newfstatat,statx,statfs,fstatfs,readlink,readlinkat,access,faccessat,"
    "faccessat2,getxattr,lgetxattr,fgetxattr,listxattr,llistxattr,flistxattr"
)
# What supervisorctl says to supervisord and hears from it.
TALKING = ("connect", "sendto", "recvfrom")
_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)")
_FILE = re.compile(r"\d+<([^>]*)>")
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Call:
    """One recorded system call on a file of the host; {old}, {new} and so on stand in `path` for what differs.

    `counts` says whether it is to be a point: it changes something, or where that is what is swept, it reads."""

    thread: int
    name: str
    path: str
    counts: bool


@dataclass(frozen=True)
class Point:
    """The `nth` call of `name` on one of `paths` within a thread, as strace counts them; `label` says it to people.

    `before` is how many calls of each kind a thread had made on these paths by then, the one that made most.
    """

    label: str
    name: str
    paths: tuple[str, ...]
    nth: int
    before: Counter[str] = field(default_factory=Counter, hash=False)


def strace(output: str, *options: str) -> list[str]:
    """strace that leaves supervisorctl and what else is executed alone."""
    return ["strace", "-f", "-qq", "-b", "execve", "-o", output, *options]


def read_calls(text: str, names: dict[str, str], *, reading: bool = False) -> list[Call]:
    """The calls in what `strace -f -y` wrote, as far as they concern a file whose path begins with one of `names`.

    Args:
        text: strace's output.
        names: what stands in a path of this run, and what is written in its place.
        reading: those that read are the ones to be points.
    """
    calls, threads = [], {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        thread, name, arguments = match.groups()
        found = _FILE.match(arguments) or _QUOTED.search(arguments)
        path = found[1] if found else ""
        for text_here, written in names.items():
            path = path.replace(text_here, written)
        if not path.startswith("{"):
            continue
        changes = name not in ("openat", "ioctl") or "O_CREAT" in arguments or "FICLONE" in arguments
        counts = changes if not reading else name != "openat" or not changes
        calls.append(Call(threads.setdefault(thread, len(threads)), name, path, counts))
    return calls


def find_points(calls: list[Call], *, every: bool = True) -> list[Point]:
    """A point for each call that counts, in their order.

    strace counts the calls of each thread by itself, and only those on the paths it is told; so for each call a choice
    of paths is looked for with which that call is the first to have its number.
    """
    points = []
    everything = tuple(dict.fromkeys(call.path for call in calls))
    for at, call in enumerate(calls):
        if not call.counts:
            continue
        alike = [other.path for other in calls[:at] if other.thread == call.thread and other.name == call.name]
        choices = [(call.path,), *((call.path, path) for path in dict.fromkeys(alike)), (*alike, call.path), everything]
        for paths in choices:
            nth = sum(o.thread == call.thread and o.name == call.name and o.path in paths for o in calls[: at + 1])
            if _first_at(calls, call.name, paths, nth) is call:
                each = Counter((o.thread, o.name) for o in calls[:at] if o.path in paths)
                before = Counter({name: max(each[t, name] for t, n in each if n == name) for _, name in each})
                points.append(Point(f"{len(points) + 1:02d} {call.name} {call.path}", call.name, paths, nth, before))
                break
        else:
            assert not every, f"no way to tell {call} from the others"
    return points


def _first_at(calls: list[Call], name: str, paths: tuple[str, ...], nth: int) -> Call | None:
    """The call at which strace strikes first, told to do so at the `nth` call of `name` on one of `paths`."""
    counts: Counter[int] = Counter()
    for call in calls:
        if call.name == name and call.path in paths:
            counts[call.thread] += 1
            if counts[call.thread] == nth:
                return call
    return None


_WATCHER = """
import hashlib, select, sys
last = None
while True:
    asked = select.select([sys.stdin], [], [], 0.004)[0] and sys.stdin.readline()
    try:
        with open(sys.argv[1], "rb") as file:
            seen = hashlib.md5(file.read()).hexdigest()
    except FileNotFoundError:
        seen = "absent"
    if seen != last:
        print(seen, flush=True)
        last = seen
    if asked:
        print("now", flush=True)
"""


class Watcher:
    """Another process that reads a file again and again, and tells every content it sees."""

    def __init__(self, path: Path) -> None:
        self._seen: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._seen.append(line.strip())

    def forget(self) -> None:
        """Begin anew, with what a look that begins after this call finds."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        eventually(lambda: "now" in self._seen)
        at = self._seen.index("now")
        self._seen[: at + 1] = self._seen[at - 1 : at]

    def seen(self) -> list[str]:
        """The MD5s since `forget`, the one at that time included."""
        return list(self._seen)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()


@dataclass(frozen=True)
class Scenario:
    """A situation that a run meets; `prepare` makes it, on a bench that is at rest.

    Args:
        name: for people.
        prepare: gets the bench and returns what this run is to end with.
        arguments: of the run that is killed.
        elsewhere: STATE_DIR lies on another filesystem.
    """

    name: str
    prepare: Callable[[Bench], Goal]
    arguments: tuple[str, ...] = ("sync",)
    elsewhere: bool = False


@dataclass(frozen=True)
class Goal:
    """What must be in the end.

    Args:
        old: MD5 before, "absent" for none.
        new: MD5 of the release that is tried.
        ends: MD5 in the end.
        held: the MD5 that must be held in the end; every other must not be.
        either: the MD5 before is a good end too, because what was begun need not be begun again.
    """

    old: str
    new: str
    ends: str
    held: str = ""
    either: bool = False


class Bench:
    """A host with one service that serves many points one after another.

    Args:
        scenario: decides where STATE_DIR lies.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.stack = contextlib.ExitStack()
        self.tags = itertools.count()
        self.syncs: Counter[int] = Counter()
        self.said = ""
        self._length: float | None = None
        self._open()

    def _open(self) -> None:
        self.host = self.stack.enter_context(running_host(NAME, startsecs="0", autorestart="false"))
        self.host.settings |= {"MIN_HEALTHY_SECONDS": "0.2", "BACKUPS_KEEP": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if self.scenario.elsewhere:
            self.host.state = Path(tempfile.mkdtemp(prefix="bp", dir="/dev/shm")) / "state"
            self.stack.callback(shutil.rmtree, self.host.state.parent, ignore_errors=True)
            self.host.settings["STATE_DIR"] = str(self.host.state)
        self.target = self.host.bin / NAME
        # Attributes that every later release has to inherit.
        os.chown(self.target, 1, 1)
        self.target.chmod(0o750)
        with contextlib.suppress(OSError):
            os.setxattr(self.target, "user.origin", b"test")
        self.attributes = self._attributes()
        self.watcher = Watcher(self.target)
        self.stack.callback(self.watcher.close)
        transport = SupervisorTransport(None, None, f"unix://{self.host.socket}")
        self.stack.callback(transport.close)
        self.supervisor: Any = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)

    def _attributes(self) -> tuple[Any, ...]:
        found = os.stat(self.target)
        return found.st_uid, found.st_gid, found.st_mode, sorted(os.listxattr(self.target))

    def reopen(self) -> None:
        """Begin on a new host, because this one is broken."""
        self.close()
        self.stack = contextlib.ExitStack()
        self._open()

    def close(self) -> None:
        self.stack.close()

    # The host

    def disk(self) -> str:
        return self.host.disk_md5(NAME) or "absent"

    def service(self) -> tuple[str, str]:
        """The state of the service, and the MD5 of what it executes."""
        found = self.supervisor.supervisor.getProcessInfo(NAME)
        try:
            return found["statename"], md5(Path(f"/proc/{found['pid']}/exe").read_bytes()) if found["pid"] else ""
        except OSError:
            return found["statename"], "gone"

    def at_rest(self) -> str:
        """Make the host one on which nothing has happened yet; returns the MD5 of what is installed and runs."""
        host = self.host
        if not self.target.exists() or self.service() != ("RUNNING", self.disk()):
            self.run_release(good(f"mended{next(self.tags)}"))
        shutil.rmtree(host.state, ignore_errors=True)
        for folder, mode in (("", 0o755), ("journal", 0o755), ("backups", 0o700), (f"backups/{NAME}", 0o700)):
            (host.state / folder).mkdir(mode)
        older = good("older")
        (host.state / "backups" / NAME / md5(older)).write_bytes(older)
        installed = self.disk()
        host.write_manifest({"name": NAME, "version": "latest", "currentMd5": installed, "keep": "this"})
        host.log_path.write_text("")
        host.server.downloads = 0
        return installed

    def run_release(self, data: bytes) -> None:
        """Install by hand and let the service execute it."""
        self.stop_service()
        self.target.unlink(missing_ok=True)
        self.host.install(NAME, data)
        user, group, mode, names = self.attributes
        os.chown(self.target, user, group)
        self.target.chmod(mode & 0o7777)
        for name in names:
            os.setxattr(self.target, name, b"test")
        self.start_service()
        eventually(lambda: self.service()[0] == "RUNNING")

    def stop_service(self) -> None:
        with contextlib.suppress(xmlrpc.client.Fault):
            self.supervisor.supervisor.stopProcess(NAME, True)

    def start_service(self) -> None:
        """Start what is there, be it good or bad, as at a start of the host."""
        with contextlib.suppress(xmlrpc.client.Fault):
            self.supervisor.supervisor.startProcess(NAME, True)

    def publish(self, data: bytes) -> str:
        return self.host.server.publish(NAME, data)

    # Runs

    def command(self) -> list[str]:
        return self.host.command(*self.scenario.arguments)

    def start(self, command: list[str], **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=self.host.environment(**settings),
        )

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        try:
            out, err = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "\nTIMEOUT"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
        return self.finish(self.start(command, **settings))

    def names(self, goal: Goal) -> dict[str, str]:
        """What differs in the paths of every run, and how it is written."""
        return {goal.new: "{new}", goal.old: "{old}", str(self.host.state): "{state}", str(self.host.root): "{root}"}

    def expand(self, path: str, goal: Goal) -> str:
        for here, written in self.names(goal).items():
            path = path.replace(written, here)
        return path

    def record(self, *, reading: bool = False) -> list[Call]:
        """The calls of one run to its end, those that change something or those that read."""
        goal = self.scenario.prepare(self)
        output = str(self.host.root / "trace")
        self.run([*strace(output, "-y", "-e", f"trace={READING if reading else CHANGING}"), *self.command()])
        calls = read_calls(Path(output).read_text(errors="replace"), self.names(goal), reading=reading)
        assert calls, "strace saw nothing"
        return calls

    def inject(
        self, goal: Goal, points: Iterable[tuple[Point, str]], arguments: list[str]
    ) -> tuple[subprocess.CompletedProcess[str], bool]:
        """Run with something happening at the points; returns the run, and whether the first of them was reached."""
        output = self.host.root / "trace"
        options, names = [], []
        for point, what in points:
            options += [option for path in point.paths for option in ("-P", self.expand(path, goal))]
            options += ["-e", f"inject={point.name}:{what}"]
            names.append(point.name)
        done = self.run([*strace(str(output), "-e", f"trace={','.join(names)}", *options), *arguments])
        text = output.read_text(errors="replace")
        return done, done.returncode == -signal.SIGKILL or "(INJECTED)" in text

    def begin(self) -> Goal:
        """Make the situation, and begin to watch."""
        goal = self.scenario.prepare(self)
        self.watcher.forget()
        return goal

    @contextlib.contextmanager
    def playing(self, scenario: Scenario) -> Iterator[None]:
        """For a while, play another situation."""
        before, self.scenario = self.scenario, scenario
        try:
            yield
        finally:
            self.scenario = before

    def length(self) -> float:
        """How long an undisturbed run takes, in seconds."""
        if self._length is None:
            self.begin()
            started = time.monotonic()
            self.run(self.command())
            self._length = time.monotonic() - started
        return self._length

    def write_ctl(self, call: int, option: str, parent: bool) -> None:
        """Make `ctl`, a supervisorctl of which one call runs under strace, and which then may kill who called it."""
        folder, real = self.host.root / "ctl", self.host.settings["SUPERVISORCTL"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kill = f"touch {folder}/struck; kill -KILL $PPID $$" if parent else f"touch {folder}/struck; kill -KILL $$"
        self.ctl.write_text(
            f"""#!/bin/sh
echo x >> {folder}/calls
n=$(wc -l < {folder}/calls)
[ {call} = 0 ] && exec strace -f -qq -o {folder}/trace.$n -e {option} {real} "$@"
[ $n = {call} ] || exec {real} "$@"
strace -f -qq -o {folder}/trace.$n -e {option} {real} "$@"
[ $? = 137 ] && {{ {kill}; }}
exit 1
"""
        )
        self.ctl.chmod(0o755)

    @property
    def ctl(self) -> Path:
        return self.host.root / "ctl" / "supervisorctl"

    def record_ctl(self) -> list[tuple[int, str, int]]:
        """Every word between supervisorctl and supervisord in a run: which call of supervisorctl, which kind, which."""
        self.begin()
        self.write_ctl(0, f"trace={','.join(TALKING)}", parent=False)
        self.run(self.command(), SUPERVISORCTL=str(self.ctl))
        found = []
        traces = sorted(self.ctl.parent.glob("trace.*"), key=lambda path: int(path.suffix[1:]))
        for trace in traces:
            counts: Counter[str] = Counter()
            for line in trace.read_text(errors="replace").splitlines():
                match = _LINE.match(line)
                if match and match[2] in TALKING:
                    counts[match[2]] += 1
                    found.append((int(trace.suffix[1:]), match[2], counts[match[2]]))
        assert found, "supervisorctl was not called"
        return found

    # What must be true

    def whole(self, goal: Goal) -> list[str]:
        """What must be true at every instant: the path holds one whole release, the manifest is whole."""
        wrong = []
        seen = {*self.watcher.seen(), self.disk()}
        if odd := seen - {goal.old, goal.new, goal.ends}:
            wrong.append(f"the path held {sorted(odd)}")
        try:
            entry = json.loads(self.host.manifest_path.read_text())["binaries"][0]
            if entry["keep"] != "this" or entry["currentMd5"] not in (goal.old, goal.new, ""):
                wrong.append(f"the manifest says {entry}")
        except (OSError, ValueError, LookupError) as error:
            wrong.append(f"the manifest is broken: {error!r}")
        return wrong

    def leftovers(self) -> list[str]:
        """Whatever is neither the host's nor bin-proxy's to keep."""
        host = self.host
        known = {"bin", "manifest.json", "log", "config", "s.conf", "s.sock", "s.log", "s.pid", "trace", "state", "ctl"}
        found = host.strays()
        found += [path.name for path in host.root.iterdir() if path.name not in known and f"{NAME}-" not in path.name]
        found += [path.name for path in host.bin.iterdir() if path.name != NAME]
        ours = {"lock", "state.json", "cache.json", "journal", "backups"}
        found += [path.name for path in host.state.iterdir() if path.name not in ours]
        kept = list((host.state / "backups" / NAME).glob("*"))
        found += [f"damaged backup {path}" for path in kept if md5(path.read_bytes()) != path.name]
        found += [f"{len(kept)} backups"] if len(kept) > 1 else []
        if self.target.exists():
            inode = self.target.stat().st_ino
            found += [f"backup shares inode {path}" for path in kept if path.stat().st_ino == inode]
        return sorted(set(found))

    def held(self) -> list[str]:
        try:
            memories = json.loads((self.host.state / "state.json").read_text())["memories"]
        except FileNotFoundError:
            return []
        return [hold["md5"] for hold in memories.get(NAME, {}).get("holds", [])]

    def agreement(self, allowed: Iterable[str]) -> list[str]:
        """Whether file, service and manifest agree on one of the releases `allowed`, with nothing left behind."""
        wrong = []
        disk = self.disk()
        if disk not in allowed:
            wrong.append(f"the path holds {disk}, not one of {list(allowed)}")
        if disk == "absent":
            state, _ = self.service()
            if state in ("STARTING", "RUNNING", "BACKOFF"):
                wrong.append(f"there is no file, and the service is {state}")
        else:
            deadline = time.monotonic() + 3
            while (found := self.service()) != ("RUNNING", disk) and time.monotonic() < deadline:
                time.sleep(0.05)
            if found != ("RUNNING", disk):
                wrong.append(f"the path holds {disk}, the service is {found}")
            if allowed and self._attributes() != self.attributes and self.scenario.name not in ("first", "first-bad"):
                wrong.append(f"the file's attributes are {self._attributes()}, not {self.attributes}")
        reported = self.host.reported(NAME)
        if reported != disk.replace("absent", ""):
            wrong.append(f"the manifest says {reported!r}, the path holds {disk}")
        if "first" not in self.scenario.name and not any((self.host.state / "backups" / NAME).iterdir()):
            wrong.append("no backup is kept")
        if left := self.leftovers():
            wrong.append(f"left behind: {left}")
        return wrong

    def converges(self, goal: Goal, syncs: int) -> list[str]:
        """Ordinary syncs bring the host to its goal; already the first leaves file, service and manifest agreed.

        Args:
            goal: what must be in the end.
            syncs: within how many.
        """
        wanted = 1 if goal.held else 0
        ends = (goal.ends, goal.old) if goal.either else (goal.ends,)
        for attempt in range(1, syncs + 1):
            done = self.run(self.host.command("sync"))
            said = f"sync {attempt} exited {done.returncode}: {(done.stderr + done.stdout).strip()[-600:]}"
            if "Traceback" in done.stderr or "TIMEOUT" in done.stderr or done.returncode not in (0, 1):
                return [said]
            if wrong := self.agreement({goal.old, goal.new, goal.ends}):
                return [*wrong, said]
            if self.disk() in ends and done.returncode == wanted:
                self.syncs[attempt] += 1
                break
        else:
            return [f"no end with exit {wanted}, the path holds {self.disk()}, {said}"]
        wrong, held = self.whole(goal), set(self.held())
        if goal.held and goal.held not in held:
            wrong.append(f"the bad release is not held, but {held}")
        if odd := held - ({goal.old} if goal.either else {goal.held}):
            wrong.append(f"held without need: {odd}")
        if goal.held and not wrong:
            before = self.host.server.downloads
            done = self.run(self.host.command("sync", "--json"))
            outcome = json.loads(done.stdout)["results"][0]["outcome"] if done.stdout else done.stderr
            if (outcome, self.host.server.downloads, done.returncode) != ("held", before, 1):
                wrong.append(f"the next sync: {outcome}, {self.host.server.downloads - before} downloads")
        return wrong


# Situations


def _publish(make: Callable[[str], bytes], held: bool) -> Callable[[Bench], Goal]:
    def prepare(bench: Bench) -> Goal:
        old = bench.at_rest()
        new = bench.publish(make(f"release {next(bench.tags)}"))
        return Goal(old, new, old if held else new, new if held else "")

    return prepare


def _first(make: Callable[[str], bytes], held: bool) -> Callable[[Bench], Goal]:
    def prepare(bench: Bench) -> Goal:
        bench.at_rest()
        with contextlib.suppress(xmlrpc.client.Fault):
            bench.supervisor.supervisor.signalProcess(NAME, "KILL")
        eventually(lambda: bench.service()[0] == "EXITED")
        bench.target.unlink()
        shutil.rmtree(bench.host.state)
        bench.host.write_manifest({"name": NAME, "version": "latest", "currentMd5": "", "keep": "this"})
        new = bench.publish(make(f"release {next(bench.tags)}"))
        return Goal("absent", new, "absent" if held else new, new if held else "")

    return prepare


def _rollback(bench: Bench) -> Goal:
    """An update, which is then taken back by hand: afterwards its release is held, and no sync brings it again."""
    previous = bench.at_rest()
    left = bench.publish(good(f"release {next(bench.tags)}"))
    done = bench.run(bench.host.command("sync"))
    assert bench.disk() == left, done.stderr
    return Goal(left, previous, previous, either=True)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("good", _publish(good, held=False)),
        Scenario("bad", _publish(dies_at_once, held=True)),
        Scenario("first", _first(good, held=False)),
        Scenario("first-bad", _first(dies_at_once, held=True)),
        Scenario("elsewhere", _publish(good, held=False), elsewhere=True),
        Scenario("elsewhere-bad", _publish(dies_at_once, held=True), elsewhere=True),
        Scenario("rollback", _rollback, ("rollback", NAME)),
    )
}


def recovery_after(scenario: Scenario, kill: Kill) -> Scenario:
    """The sync that cleans up after a kill, which is to be killed, too."""

    def prepare(bench: Bench) -> Goal:
        with bench.playing(scenario):
            goal = scenario.prepare(bench)
            kill.strike(bench, goal)
        return goal

    return replace(
        scenario, name=f"recovery of {scenario.name} after {kill.label}", prepare=prepare, arguments=("sync",)
    )


# What happens to a run


@dataclass(frozen=True)
class Verdict:
    """Whether the point was reached, and what was wrong afterwards."""

    reached: bool
    wrong: list[str]


@dataclass(frozen=True)
class Kill:
    """SIGKILL to bin-proxy at a system call, before it is carried out."""

    point: Point

    @property
    def label(self) -> str:
        return f"kill at {self.point.label}"

    def strike(self, bench: Bench, goal: Goal) -> bool:
        """Do it; returns whether the point was reached."""
        return bench.inject(goal, [(self.point, f"signal=KILL:when={self.point.nth}")], bench.command())[1]

    def try_on(self, bench: Bench) -> Verdict:
        goal = bench.begin()
        reached = self.strike(bench, goal)
        return Verdict(reached, bench.whole(goal) or bench.converges(goal, syncs=2))


@dataclass(frozen=True)
class Fail:
    """One system call fails once; with `cleaning_up`, whatever would tidy up its file afterwards fails, too.

    One that was `reading` may go unsaid where nothing hangs on it, or say that the config or manifest is at fault.
    """

    point: Point
    error: str
    cleaning_up: bool = False
    reading: bool = False

    @property
    def label(self) -> str:
        return f"{self.error} at {self.point.label}" + (" and in cleaning up" if self.cleaning_up else "")

    def try_on(self, bench: Bench) -> Verdict:
        goal = bench.begin()
        what = [(self.point, f"error={self.error}:when={self.point.nth}")]
        if self.cleaning_up:
            for name in ("unlink", "chmod"):
                later = self.point.before[name] + 1
                what.append((replace(self.point, name=name), f"error=EPERM:when={later}+"))
        done, reached = bench.inject(goal, what, bench.command())
        said = f"the run exited {done.returncode}: {(done.stderr + done.stdout).strip()[-600:]}"
        wrong = bench.whole(goal)
        ends = (0, 1, 2) if self.reading else (0, 1)
        if "Traceback" in done.stderr or "TIMEOUT" in done.stderr or done.returncode not in ends:
            wrong.append("no clear end")
        lines = [line for line in done.stderr.splitlines() if line.startswith("bin-proxy: ")]
        if done.returncode == 0 and self.disk_is_not_where_it_should_be(bench, goal):
            wrong.append("exit 0, and it did not converge")
        if done.returncode and not lines:
            wrong.append(f"exit {done.returncode} without a line")
        if done.returncode == 1 and not goal.held and not self.reading and WORDS[self.error] not in done.stderr:
            wrong.append("the line does not tell the error")
        if wrong:
            return Verdict(reached, [*wrong, said])
        return Verdict(reached, [f"{line}; before that {said}" for line in bench.converges(goal, syncs=3)])

    @staticmethod
    def disk_is_not_where_it_should_be(bench: Bench, goal: Goal) -> bool:
        return bool(goal.held) or bool(bench.agreement((goal.ends,)))


@dataclass(frozen=True)
class KillChild:
    """SIGKILL to the `call`-th supervisorctl at its `nth` system call of a kind; with `parent`, to bin-proxy, too."""

    call: int
    name: str
    nth: int
    parent: bool

    @property
    def label(self) -> str:
        both = " and its parent" if self.parent else ""
        return f"kill supervisorctl{both} in its call {self.call} at {self.name} {self.nth}"

    def strike(self, bench: Bench, goal: Goal) -> bool:
        """Do it; returns whether the point was reached."""
        bench.write_ctl(self.call, f"inject={self.name}:signal=KILL:when={self.nth}", self.parent)
        done = bench.run(bench.command(), SUPERVISORCTL=str(bench.ctl))
        bench.said = f"the run exited {done.returncode}: {(done.stderr + done.stdout).strip()[-600:]}"
        return (bench.host.root / "ctl" / "struck").exists()

    def try_on(self, bench: Bench) -> Verdict:
        goal = bench.begin()
        reached = self.strike(bench, goal)
        wrong = bench.whole(goal)
        if not self.parent:
            # bin-proxy lives, so it leaves nothing to be mended.
            wrong += bench.agreement((goal.ends, goal.old))
        wrong = wrong or bench.converges(goal, syncs=2)
        return Verdict(reached, [f"{line}; before that {bench.said}" for line in wrong])


@dataclass(frozen=True)
class KillAnyTime:
    """SIGKILL after a share of an update's length, to bin-proxy or to it and all it started."""

    share: float
    tree: bool

    @property
    def label(self) -> str:
        return f"kill {'the whole tree' if self.tree else 'bin-proxy'} after {self.share:.4f} of an update"

    def try_on(self, bench: Bench) -> Verdict:
        length = bench.length()
        goal = bench.begin()
        process = bench.start(bench.command())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.share * length)
        for pid in [*(descendants(process.pid) if self.tree else ()), process.pid]:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        done = bench.finish(process)
        return Verdict(done.returncode < 0, bench.whole(goal) or bench.converges(goal, syncs=2))


Strike = Kill | Fail | KillChild | KillAnyTime


def descendants(pid: int) -> list[int]:
    """All that a process started, and all that those started."""
    found = []
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for word in child.read_text().split():
                found += [*descendants(int(word)), int(word)]
    return found


# Whole sweeps


@dataclass(frozen=True)
class Task:
    """One strike in one situation."""

    scenario: Scenario
    strike: Strike

    def __str__(self) -> str:
        return f"{self.scenario.name}: {self.strike.label}"


def kills(bench: Bench) -> list[Strike]:
    return [Kill(point) for point in find_points(bench.record())]


def errors(bench: Bench) -> list[Strike]:
    points = find_points(bench.record())
    found: list[Strike] = [Fail(point, error) for point in points for error in ERRORS]
    # A link that fails becomes a copy.
    again = [p for p in points if p.name not in ("unlink", "chmod", "linkat") and len(p.paths) == 1]
    return found + [Fail(point, "ENOSPC", cleaning_up=True) for point in again]


def unreadables(bench: Bench) -> list[Strike]:
    return [Fail(point, "EIO", reading=True) for point in find_points(bench.record(reading=True), every=False)]


def child_kills(bench: Bench, *, parent: bool) -> list[Strike]:
    return [KillChild(call, name, nth, parent) for call, name, nth in bench.record_ctl()]


def kills_any_time(bench: Bench, count: int, seed: int) -> list[Strike]:
    chance = random.Random(seed)
    return [KillAnyTime(chance.uniform(0, 1.1), chance.random() < 0.5) for _ in range(count)]


def recoveries(bench: Bench) -> list[Scenario]:
    """Runs that clean up after kills in every stage: before the swap, after it, in a restart, at the end."""
    scenario = bench.scenario
    points = find_points(bench.record())
    stages: list[Kill | KillChild] = []
    for name, path in (
        ("rename", r"\{root\}/bin/\.manager\.\{new\}\.part"),
        ("fsync", r"\{root\}/bin"),
        ("rename", r"\{root\}/\S*manifest\.json\S*"),
        ("unlink", r"\{state\}/journal/manager\.json"),
    ):
        found = [point for point in points if point.name == name and re.search(f" {path}$", point.label)]
        # The manifest of a bad release's run says what it said before, so it is not written.
        assert found or (scenario.name == "bad" and "manifest" in path), path
        stages += [Kill(point) for point in found[:1]]
    if scenario.name == "bad":
        stages += [Kill(p) for p in points if p.name == "rename" and p.label.endswith("/.manager.{old}.part")]
    talk = bench.record_ctl()
    for call in sorted({call for call, _, _ in talk})[1:]:
        # Half-way, that is between the stop and the start of a restart.
        moments = [moment for moment in talk if moment[0] == call and moment[1] == "sendto"]
        stages += [KillChild(*moments[len(moments) // 2], parent=True)]
    return [recovery_after(scenario, stage) for stage in stages]


def sample(tasks: list[Any], count: int, seed: int) -> list[Any]:
    """`count` of the tasks, drawn evenly over their order: one at random out of each stretch."""
    if count >= len(tasks):
        return tasks
    chance = random.Random(seed)
    edges = [round(at * len(tasks) / count) for at in range(count + 1)]
    return [tasks[chance.randrange(low, high)] for low, high in itertools.pairwise(edges)]


RANDOM_KILLS = 200
KINDS = ("kill", "kill-group", "kill-child", "random", "recovery", "errors", "reads")
_SITUATIONS = {
    "kill": tuple(SCENARIOS),
    "errors": tuple(SCENARIOS),
    "reads": tuple(SCENARIOS),
    "kill-group": ("good", "bad", "first", "rollback"),
    "kill-child": ("good", "bad", "first", "rollback"),
    "random": ("good", "bad"),
    "recovery": ("good", "bad"),
}


def plan(kind: str, bench: Bench, count: int, seed: int, match: str = "") -> list[Task]:
    """The tasks of a kind in the situation that the bench plays, whose name `match` is found in; at most `count`."""
    scenario = bench.scenario
    if kind == "recovery":
        tasks = []
        # Recording is what takes long, so a small sample is of few stages.
        for again in sample(recoveries(bench), max(2, count // 4), seed):
            with bench.playing(again):
                tasks += [Task(again, strike) for strike in kills(bench)]
        return sample([task for task in tasks if re.search(match, str(task))], count, seed)
    strikes = {
        "kill": lambda: kills(bench),
        "errors": lambda: errors(bench),
        "reads": lambda: unreadables(bench),
        "kill-group": lambda: child_kills(bench, parent=True),
        "kill-child": lambda: child_kills(bench, parent=False),
        "random": lambda: kills_any_time(bench, min(count, RANDOM_KILLS), seed),
    }[kind]()
    return sample([task for strike in strikes if re.search(match, str(task := Task(scenario, strike)))], count, seed)


@dataclass
class Tally:
    """What came of many tasks."""

    points: int = 0
    reached: int = 0
    violations: int = 0

    def add(self, verdict: Verdict) -> None:
        self.points += 1
        self.reached += verdict.reached
        self.violations += bool(verdict.wrong)


def try_task(bench: Bench, task: Task) -> Verdict:
    """Carry out one task; where something is wrong afterwards, the bench begins on a new host."""
    with bench.playing(task.scenario):
        try:
            verdict = task.strike.try_on(bench)
        except (AssertionError, OSError, subprocess.TimeoutExpired, xmlrpc.client.Error) as error:
            verdict = Verdict(True, [f"the test itself failed: {error!r}"])
    if verdict.wrong:
        bench.reopen()
    return verdict


def try_some(bench: Bench, kind: str, count: int, seed: int = 7) -> int:
    """Try `count` points of a kind, of which none may go wrong; returns how many were reached."""
    tasks = plan(kind, bench, count, seed)
    assert len(tasks) == count
    verdicts = {str(task): try_task(bench, task) for task in tasks}
    wrong = {name: verdict.wrong for name, verdict in verdicts.items() if verdict.wrong}
    assert not wrong, wrong
    return sum(verdict.reached for verdict in verdicts.values())


def run_tasks(kind: str, count: int, seed: int, jobs: int, names: tuple[str, ...], match: str) -> Tally:
    """Sweep one kind in the situations `names`, with `jobs` hosts side by side."""
    tally, lock, syncs = Tally(), threading.Lock(), Counter[int]()
    for name in names:
        started = time.monotonic()
        here = Tally()
        bench = Bench(SCENARIOS[name])
        try:
            waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
            for task in plan(kind, bench, count, seed, match):
                waiting.put(task)

            def work(bench: Bench, waiting: queue.SimpleQueue[Task] = waiting, here: Tally = here) -> None:
                while True:
                    try:
                        task = waiting.get_nowait()
                    except queue.Empty:
                        return
                    verdict = try_task(bench, task)
                    with lock:
                        here.add(verdict)
                        tally.add(verdict)
                        if here.points % 25 == 0:
                            print(f"... {here.points} points of {kind} {task.scenario.name}", flush=True)
                        for line in verdict.wrong:
                            print(f"VIOLATION {task}\n    {line}", flush=True)

            others = [Bench(SCENARIOS[name]) for _ in range(jobs - 1)]
            threads = [threading.Thread(target=work, args=(other,)) for other in (bench, *others)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            finally:
                # After Ctrl-C each host finishes its point, and what was found by then is told.
                with contextlib.suppress(queue.Empty):
                    while True:
                        waiting.get_nowait()
                for thread in threads:
                    thread.join()
                for other in (bench, *others):
                    syncs += other.syncs
                for other in others:
                    other.close()
                figures = f"{here.points} points, {here.reached} reached, {here.violations} violations"
                print(f"{kind} {name}: {figures}, {time.monotonic() - started:.0f} s", flush=True)
        finally:
            bench.close()
    print(f"{kind}: syncs until all was well: {dict(sorted(syncs.items()))}", flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every point, instead of a sample")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; all without it")
    parser.add_argument("--scenario", action="append", choices=tuple(SCENARIOS), help="may be repeated")
    parser.add_argument("--match", default="", metavar="REGEX", help="only points whose name this is found in")
    parser.add_argument("--sample", type=int, default=10, help="points of each kind and scenario  [default: 10]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="hosts side by side  [default: 2]")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    totals = {}
    for kind in options.kind or KINDS:
        names = tuple(name for name in _SITUATIONS[kind] if not options.scenario or name in options.scenario)
        count = 10**9 if options.full else options.sample
        totals[kind] = run_tasks(kind, count, options.seed, options.jobs, names, options.match)
    for kind, tally in totals.items():
        print(f"TOTAL {kind}: {tally.points} points, {tally.reached} reached, {tally.violations} violations")
    return 1 if any(tally.violations for tally in totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
