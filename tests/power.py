"""What a disk may hold after a power loss, worked out from the system calls of a real run.

Nothing counts as being on the disk before its fsync: neither bytes, nor a file's mode, nor a name in a folder. What was
not yet synced may be there or not, each by itself and in any order, as POSIX allows; a filesystem that keeps more order
shows some of these disks only.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.host import md5
from tests.sweep import CHANGING, NAME, Bench, Goal, strace

_CALL = re.compile(r"(\d+)\s+(\w+)\((.*)\)\s+= (-?\d+)(.*)")
_UNFINISHED = re.compile(r"(\d+)\s+(\w+)\((.*) <(?:unfinished|detached) \.\.\.>")
_RESUMED = re.compile(r"(\d+)\s+<\.\.\. (\w+) resumed>(.*)\)\s+= (-?\d+)(.*)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"(\d+)<((?:\\x[0-9a-f]{2})*)>")


@dataclass(frozen=True)
class Event:
    """One system call that succeeded. `file` is what its descriptor stands for, `strings` the strings it was given."""

    name: str
    file: str
    strings: tuple[bytes, ...]
    arguments: str
    result: int

    @property
    def paths(self) -> list[str]:
        return [os.fsdecode(string) for string in self.strings]


def _plain(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def read_events(text: str) -> list[Event]:
    """The calls that succeeded in what `strace -f -y -xx` wrote, in the order in which they ended."""
    events, begun = [], {}
    for line in text.splitlines():
        unfinished = _UNFINISHED.match(line)
        if unfinished and unfinished[2] != "execve":
            begun[unfinished[1]] = unfinished[3]
            continue
        if unfinished:  # strace lets go of what is executed
            name, arguments, result = unfinished[2], unfinished[3], "0"
        elif resumed := _RESUMED.match(line):
            thread, name, more, result, _ = resumed.groups()
            arguments = begun.pop(thread, "") + more
        elif call := _CALL.match(line):
            _, name, arguments, result, _ = call.groups()
        else:
            continue
        if int(result) < 0:
            continue
        descriptor = _FD.match(arguments)
        strings = tuple(_plain(string) for string in _STRING.findall(arguments))
        file = os.fsdecode(_plain(descriptor[2])) if descriptor else ""
        events.append(Event(name, file, strings, re.sub(_STRING, "", arguments), int(result)))
    return events


@dataclass
class Inode:
    """A file: what a reader sees, and what is on the disk (None: nothing yet)."""

    content: bytes = b""
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    safe: tuple[bytes, int, tuple[int, int]] | None = None

    @property
    def now(self) -> tuple[bytes, int, tuple[int, int]]:
        return self.content, self.mode, self.owner

    def sync(self) -> None:
        self.safe = self.now


# A change of one folder: for each name that it concerns, the file it stands for afterwards (None: no file).
Change = dict[str, Inode | None]


@dataclass(frozen=True)
class File:
    """A file on a disk after a power loss; `inode` is the same for all its names."""

    content: bytes
    mode: int
    owner: tuple[int, int]
    inode: int


Disk = dict[str, File]


@dataclass
class Model:
    """The host's files in the eyes of its programs, and in those of its disk.

    Args:
        roots: the folders that are looked at.
    """

    roots: tuple[str, ...]
    names: dict[str, Inode] = field(default_factory=dict)
    on_disk: dict[str, Inode] = field(default_factory=dict)
    pending: dict[str, list[Change]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    unsafe_folders: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Take what is there now; all of it is on the disk."""
        inodes: dict[int, Inode] = {}
        for root in self.roots:
            for folder, _, files in os.walk(root):
                self.folders.add(folder)
                for file in files:
                    path = os.path.join(folder, file)
                    status = os.lstat(path)
                    if not os.path.isfile(path):
                        continue
                    owner = status.st_uid, status.st_gid
                    inode = inodes.setdefault(
                        status.st_ino, Inode(Path(path).read_bytes(), status.st_mode & 0o7777, owner)
                    )
                    inode.sync()
                    self.names[path] = self.on_disk[path] = inode

    def _mine(self, path: str) -> bool:
        return any(path == root or path.startswith(f"{root}/") for root in self.roots)

    def _change(self, changes: Change) -> None:
        for path, inode in changes.items():
            if inode is None:
                self.names.pop(path, None)
            else:
                self.names[path] = inode
        folders = {os.path.dirname(path) for path in changes}
        assert len(folders) == 1, "a rename from folder to folder is not thought of here"
        self.pending.setdefault(folders.pop(), []).append(changes)

    def apply(self, event: Event) -> None:
        """Carry out a call."""
        name, paths = event.name, event.paths
        touched = event.file if event.file else paths[0] if paths else ""
        if not self._mine(touched):
            return
        if name == "openat":
            if "O_CREAT" in event.arguments and paths[0] not in self.names:
                mode = int(re.findall(r"0[0-7]+", event.arguments)[-1], 8)
                self._change({paths[0]: Inode(mode=mode & ~0o022)})
            assert "O_TRUNC" not in event.arguments, "a file is emptied in its place"
        elif name == "write":
            self.names[event.file].content += event.strings[0][: event.result]
        elif name == "ftruncate":
            inode = self.names[event.file]
            inode.content = inode.content[: int(event.arguments.split(",")[1])]
        elif name in ("fsync", "fdatasync"):
            if event.file in self.folders:
                self._sync_folder(event.file)
            else:
                self.names[event.file].sync()
        elif name in ("chmod", "fchmod"):
            path = event.file or paths[0]
            if path in self.names:
                self.names[path].mode = int(event.arguments.split(",")[1], 8)
            else:
                assert path in self.folders
        elif name == "fchown":
            user, group = event.arguments.split(",")[1:]
            self.names[event.file].owner = int(user), int(group)
        elif name == "rename":
            self._change({paths[0]: None, paths[1]: self.names[paths[0]]})
        elif name == "linkat":
            self._change({paths[1]: self.names[paths[0]]})
        elif name == "unlink":
            self._change({paths[0]: None})
        elif name == "mkdir":
            self.folders.add(paths[0])
            self.unsafe_folders.add(paths[0])
        else:
            assert name in ("fsetxattr", "fremovexattr", "ioctl", "execve", "utimensat"), f"{name} is new here"

    def _sync_folder(self, folder: str) -> None:
        for changes in self.pending.pop(folder, []):
            self._commit(self.on_disk, changes)
        self.unsafe_folders -= {name for name in self.unsafe_folders if os.path.dirname(name) == folder}

    @staticmethod
    def _commit(names: dict[str, Inode], changes: Change) -> None:
        for path, inode in changes.items():
            if inode is None:
                names.pop(path, None)
            else:
                names[path] = inode

    def safe(self, path: str) -> bool:
        """Whether what a reader sees under a name would be there after a power loss."""
        inode = self.names.get(path)
        folder = os.path.dirname(path)
        if any(path in changes for changes in self.pending.get(folder, [])) or self._folder_is_unsafe(folder):
            return False
        return inode is None or inode.safe == inode.now

    def _folder_is_unsafe(self, folder: str) -> bool:
        return any(folder == unsafe or folder.startswith(f"{unsafe}/") for unsafe in self.unsafe_folders)

    def disks(self, chance: random.Random) -> Iterator[Disk]:
        """Disks after a power loss now: nothing of what is pending arrived; all; each thing alone; all but it; some."""
        changes = [(folder, at) for folder, queue in self.pending.items() for at in range(len(queue))]
        inodes = {id(inode): inode for inode in self.names.values() if inode.safe != inode.now}
        everything: list[object] = [*changes, *inodes]
        choices: list[set[object]] = [set(), set(everything), set(changes), set(inodes)]
        choices += [{one} for one in everything] + [set(everything) - {one} for one in everything]
        choices += [{one for one in everything if chance.random() < 0.5} for _ in range(6 if everything else 0)]
        for chosen in choices:
            names = dict(self.on_disk)
            for folder, queue in self.pending.items():
                for at, change in enumerate(queue):
                    if (folder, at) in chosen:
                        self._commit(names, change)
            disk = {}
            for path, inode in names.items():
                arrived = inode.now if id(inode) in chosen or inode.safe == inode.now else inode.safe
                if arrived is None:
                    # A name came, its bytes did not, or only the first of them.
                    arrived = inode.content[: chance.choice((0, len(inode.content) // 2))], 0o600, inode.owner
                disk[path] = File(*arrived, id(inode))
            lost = {name for name in self.unsafe_folders if chance.random() < 0.5}
            yield {path: file for path, file in disk.items() if not any(path.startswith(f"{one}/") for one in lost)}


def record(bench: Bench) -> tuple[Goal, Model, list[Event]]:
    """One run to its end: what it was to do, the host's files before it, and its calls."""
    if bench.attributes[3]:  # which the model does not know
        os.removexattr(bench.target, "user.origin")
        bench.attributes = (*bench.attributes[:3], [])
    goal = bench.begin()
    model = Model((str(bench.host.root), str(bench.host.state)))
    model.begin()
    output = bench.host.root / "trace"
    traced = f"{CHANGING},execve"
    bench.run([*strace(str(output), "-y", "-xx", "-s", "99999999", "-e", f"trace={traced}"), *bench.command()])
    return goal, model, read_events(output.read_text())


def put(bench: Bench, disk: Disk) -> None:
    """Make the bench's host one that has just started after the power loss: supervisord runs what it finds."""
    host = bench.host
    bench.stop_service()
    host.log_path.unlink(missing_ok=True)
    for path in host.root.glob("*manifest.json*"):
        path.unlink()
    for folder in (host.bin, host.state):
        shutil.rmtree(folder, ignore_errors=True)
    host.bin.mkdir()
    first: dict[int, Path] = {}
    for name, file in disk.items():
        path = Path(name)
        if not (path.is_relative_to(host.bin) or path.is_relative_to(host.state) or path.parent == host.root):
            continue
        if path.parent == host.root and "manifest.json" not in path.name:
            continue
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        if file.inode in first:
            os.link(first[file.inode], path)
            continue
        path.write_bytes(file.content)
        os.chown(path, *file.owner)
        path.chmod(file.mode)
        first[file.inode] = path
    bench.start_service()


def try_disk(bench: Bench, goal: Goal, disk: Disk) -> list[str]:
    """Start the host with this disk; returns what is wrong after the syncs that follow."""
    put(bench, disk)
    bench.watcher.forget()
    return bench.whole(goal) or bench.converges(goal, syncs=2)


def faults(bench: Bench, goal: Goal, disk: Disk, *, swapped: bool) -> list[str]:
    """What no power loss may leave behind.

    Args:
        bench: where the run took place.
        goal: what the run was to do.
        disk: what is on the disk.
        swapped: the new release was put in place before.
    """
    host, wrong = bench.host, []
    target = disk.get(str(bench.target))
    installed = md5(target.content) if target else "absent"
    if installed not in (goal.old, goal.new):
        wrong.append(f"the path holds {installed}")
    if target and goal.old != "absent" and (target.mode, target.owner) != (0o750, (1, 1)):
        wrong.append(f"the file has mode {target.mode:o} and owner {target.owner}")
    manifest = disk.get(str(host.manifest_path))
    try:
        assert manifest
        if json.loads(manifest.content)["binaries"][0]["currentMd5"] not in (goal.old, goal.new, ""):
            wrong.append("the manifest names another release")
    except (ValueError, LookupError, AssertionError):
        wrong.append("the manifest is not whole")
    kept: dict[str, Any] = {}
    for name in ("state.json", f"journal/{NAME}.json"):
        if file := disk.get(str(host.state / name)):
            try:
                kept[name] = json.loads(file.content)
            except ValueError:
                wrong.append(f"{name} is not whole")
    recorded = f"journal/{NAME}.json" in kept
    backup = disk.get(str(host.state / "backups" / NAME / goal.old))
    if installed == goal.new and goal.old != "absent" and (not backup or md5(backup.content) != goal.old):
        wrong.append("the new release is there, and no backup of the old one")
    holds = kept.get("state.json", {}).get("memories", {}).get(NAME, {}).get("holds", [])
    if goal.held and installed == goal.new and not recorded:
        wrong.append("a bad release is there, and no record of it")
    if goal.held and swapped and not recorded and goal.held not in [hold["md5"] for hold in holds]:
        wrong.append("a bad release was tried, and neither a record nor a hold tells of it")
    return wrong
