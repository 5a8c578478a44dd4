"""What makes a change of a file safe: where it is, what it is, back up, swap, prune."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass

from bin_proxy.atomic import copy_attributes, create_private, fsync_folder, make_folder, opened
from bin_proxy.errors import BackupLost, HostError, host_errors

_CHUNK = 1024 * 1024
# A file changed within the clock's granularity of its stat keeps its times; 2 s covers every filesystem.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Slot:
    """The place of a binary: `target` is its file, links resolved; `status` and `md5` are None where it is absent."""

    target: str
    status: os.stat_result | None = None
    md5: str | None = None

    @property
    def folder(self) -> str:
        return os.path.dirname(self.target)

    @property
    def fingerprint(self) -> list[int | str] | None:
        """By what `inspect` tells the same file, unchanged, without reading it; None where it is too fresh for that."""
        found = self.status
        if found is None or self.md5 is None or abs(time.time_ns() - found.st_ctime_ns) < _RACY_NS:
            return None
        return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, self.md5]


def inspect(path: str, known: list[int | str] | None = None) -> Slot:
    """Find the file behind `path` and its MD5, by way of its `fingerprint` where the file is unchanged since.

    Raises:
        HostError: something else than a file lies there, or it cannot be looked at or read.
    """
    target = os.path.realpath(path)
    with host_errors(f"look at {path}"):
        try:
            status = os.lstat(target)
        except FileNotFoundError:
            if os.path.islink(path):
                raise HostError(f"{path} is a link to {target}, which does not exist") from None
            return Slot(target)
        if not stat.S_ISREG(status.st_mode):
            raise HostError(f"{path} is not a regular file: move it away")
        if known and Slot(target, status, str(known[-1])).fingerprint == known:
            return Slot(target, status, str(known[-1]))
        digest = hashlib.md5(usedforsecurity=False)
        with open(target, "rb") as file:
            status = os.fstat(file.fileno())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return Slot(target, status, digest.hexdigest())


def part_path(target: str, name: str, md5: str) -> str:
    """Where the release `md5` of `name` is staged: beside its target, hence on the same filesystem."""
    return os.path.join(os.path.dirname(target), f".{name}.{md5}.part")


def check_writable(folder: str) -> None:
    """Whether a file in `folder` could be replaced.

    Raises:
        HostError: it could not.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HostError(f"{folder} cannot be written: it is absent, mounted read-only, or somebody else's")


def discard(path: str) -> None:
    """Remove a file of ours, if it is there.

    Raises:
        HostError: it is there and cannot be removed.
    """
    with host_errors(f"remove {path}"), suppress(FileNotFoundError):
        os.lstat(path)  # on a read-only filesystem unlink complains of what is not there, too
        os.unlink(path)


def swap(part: str, target: str) -> None:
    """Give the staged file what belongs to the target (0755 where there is none), and put it in its place, durably.

    Raises:
        OSError: it was not done, or (from the folder's fsync) it was and may not survive a power loss.
    """
    with opened(part) as fd:
        try:
            copy_attributes(target, fd)
        except FileNotFoundError:
            os.fchmod(fd, 0o755)
        os.fsync(fd)
    os.replace(part, target)
    fsync_folder(os.path.dirname(target))


class Backups:
    """STATE_DIR/backups: previous releases by name and MD5.

    Args:
        folder: STATE_DIR.
    """

    def __init__(self, folder: str) -> None:
        self._root = os.path.join(folder, "backups")

    def listed(self, name: str, order: list[str]) -> list[str]:
        """The MD5s that are kept, in `order` where it knows them, then by name; none where one may not look.

        Raises:
            OSError: they cannot be listed.
        """
        there: list[str] = []
        with suppress(FileNotFoundError, PermissionError):
            there = sorted(os.listdir(os.path.join(self._root, name)))
        kept = [entry for entry in there if not entry.endswith(".tmp")]
        return sorted(kept, key=lambda entry: order.index(entry) if entry in order else len(order))

    def add(self, name: str, slot: Slot) -> None:
        """Keep the installed file: a hard link where that is possible, else a durable copy.

        Raises:
            OSError: it is not kept; what was kept before still is.
        """
        folder = os.path.join(self._root, name)
        entry = os.path.join(folder, str(slot.md5))
        make_folder(folder, 0o700)
        _link_or_copy(slot.target, f"{entry}.tmp")
        os.replace(f"{entry}.tmp", entry)
        fsync_folder(folder)

    def stage(self, name: str, md5: str, part: str) -> None:
        """Stage a kept release beside its target, after checking its bytes.

        Raises:
            BackupLost: it is gone or damaged.
            HostError, OSError: it cannot be read or staged.
        """
        entry = os.path.join(self._root, name, md5)
        if inspect(entry).md5 != md5:
            raise BackupLost(f"the backup {entry} is gone or damaged")
        _link_or_copy(entry, part)

    def prune(self, name: str, order: list[str], keep: int, installed: str | None) -> list[str]:
        """Remove all but the newest `keep` (one at the least), and the one that is installed: it must share no inode.

        Returns:
            the MD5s that stay, newest first.

        Raises:
            OSError: they cannot be listed, or one cannot be removed.
        """
        folder = os.path.join(self._root, name)
        make_folder(folder, 0o700)
        kept = [md5 for md5 in self.listed(name, order) if md5 != installed][: max(1, keep)]
        for entry in set(os.listdir(folder)) - set(kept):
            os.unlink(os.path.join(folder, entry))
        fsync_folder(folder)  # the record that would do this again goes next
        return kept


def _link_or_copy(source: str, target: str) -> None:
    """A file with another name elsewhere is copied, as writing to that name would alter the backup."""
    with suppress(FileNotFoundError):
        os.unlink(target)
    if os.lstat(source).st_nlink == 1:
        with suppress(OSError):  # another filesystem, or one without links: a copy does as well
            return os.link(source, target, follow_symlinks=False)
    with open(create_private(target), "wb") as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy, _CHUNK)
        copy.flush()
        os.fsync(copy.fileno())
