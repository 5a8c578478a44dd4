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
from bin_proxy.errors import BackupLost, HostError, host_error, host_errors

_CHUNK = 1024 * 1024
# A file changed within the clock's granularity of its stat keeps its times; 2 s covers every filesystem.
_RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Slot:
    """The place of a binary: `target` is its file, links resolved; `status` and `md5` are None where it is absent."""

    target: str
    status: os.stat_result | None
    md5: str | None

    @property
    def folder(self) -> str:
        return os.path.dirname(self.target)


def identity(status: os.stat_result) -> list[int]:
    """What changes whenever a file's content does."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def locate(path: str) -> tuple[str, os.stat_result | None]:
    """Find the file behind `path`.

    Returns:
        the file with links resolved, and its status, None where it is absent.

    Raises:
        HostError: something else than a file lies there, or it cannot be looked at.
    """
    target = os.path.realpath(path)
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        if os.path.islink(path):
            raise HostError(f"{path} is a link to {target}, which does not exist") from None
        if not os.path.isdir(os.path.dirname(target)):
            raise HostError(f"the folder of {path} does not exist: mkdir -p {os.path.dirname(target)}") from None
        return target, None
    except OSError as error:
        raise host_error(f"look at {path}", error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise HostError(f"{path} is {kind}: move it away")
    return target, status


def inspect(path: str, known: list[int | str] | None = None) -> Slot:
    """Locate a binary and find its MD5, by way of its `fingerprint` where the file is unchanged since.

    Raises:
        HostError: as for `locate`, or it cannot be read.
    """
    target, status = locate(path)
    if status is None:
        return Slot(target, None, None)
    if known and known[:-1] == identity(status):
        return Slot(target, status, str(known[-1]))
    digest = hashlib.md5(usedforsecurity=False)
    with host_errors(f"read {target}"), open(target, "rb") as file:
        status = os.fstat(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return Slot(target, status, digest.hexdigest())


def fingerprint(slot: Slot) -> list[int | str] | None:
    """By what `inspect` tells the same file, unchanged, without reading it; None where there is none."""
    return None if slot.status is None or slot.md5 is None else [*identity(slot.status), slot.md5]


def remember(slot: Slot) -> list[int | str] | None:
    """What spares the next run the hashing of this file; None where the file is too fresh to be sure."""
    if slot.status is None:
        return None
    now = time.time_ns()
    if min(abs(now - slot.status.st_mtime_ns), abs(now - slot.status.st_ctime_ns)) < _RACY_NS:
        return None
    return fingerprint(slot)


def part_path(target: str, name: str, md5: str) -> str:
    """Where the release `md5` of `name` is staged: beside its target, hence on the same filesystem."""
    return os.path.join(os.path.dirname(target), f".{name}.{md5}.part")


def check_writable(folder: str) -> None:
    """Whether a file in `folder` could be replaced.

    Raises:
        HostError: it could not.
    """
    with host_errors(f"look at {folder}"):
        flags = os.statvfs(folder).f_flag
    if flags & os.ST_RDONLY:
        raise HostError(f"{folder} is on a filesystem mounted read-only")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HostError(f"{folder} cannot be written: run as root, or correct its owner")


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
        """The MD5s that are kept, in `order` where it knows them, then by name; none where that cannot be seen."""
        with suppress(OSError):
            return [entry for entry in self._entries(name, order) if not entry.endswith(".tmp")]
        return []

    def _entries(self, name: str, order: list[str]) -> list[str]:
        there = sorted(os.listdir(os.path.join(self._root, name)))
        return sorted(there, key=lambda entry: order.index(entry) if entry in order else len(order))

    def add(self, name: str, slot: Slot) -> None:
        """Keep the installed file: a hard link where that is possible, else a durable copy.

        A file with another name elsewhere is copied, as writing to that name would alter the backup.

        Raises:
            OSError: it is not kept; what was kept before still is.
        """
        assert slot.md5 and slot.status
        folder = os.path.join(self._root, name)
        entry = os.path.join(folder, slot.md5)
        make_folder(folder, 0o700)
        if os.path.lexists(entry) and os.path.samefile(entry, slot.target):
            return
        _link_or_copy(slot.target, f"{entry}.tmp", linkable=slot.status.st_nlink == 1)
        os.replace(f"{entry}.tmp", entry)
        fsync_folder(folder)

    def stage(self, name: str, md5: str, part: str) -> None:
        """Stage a kept release beside its target, after checking its bytes.

        Raises:
            BackupLost: it is gone or damaged.
            HostError, OSError: it cannot be read or staged.
        """
        entry = os.path.join(self._root, name, md5)
        found = inspect(entry).md5
        if found != md5:
            raise BackupLost(f"the backup {entry} is {'damaged' if found else 'gone'}")
        _link_or_copy(entry, part, linkable=True)

    def prune(self, name: str, order: list[str], keep: int, installed: str | None) -> list[str]:
        """Remove all but the newest `keep` (one at the least), and the one that is installed: it must share no inode.

        Returns:
            the MD5s that stay, newest first.

        Raises:
            OSError: they cannot be listed, or one cannot be removed.
        """
        there: list[str] = []
        with suppress(FileNotFoundError):
            there = self._entries(name, order)
        kept = [entry for entry in there if entry != installed and not entry.endswith(".tmp")][: max(1, keep)]
        removed = [entry for entry in there if entry not in kept]
        for entry in removed:
            os.unlink(os.path.join(self._root, name, entry))
        if removed:  # the record that would do this again goes next
            fsync_folder(os.path.join(self._root, name))
        return kept


def _link_or_copy(source: str, target: str, *, linkable: bool) -> None:
    with suppress(FileNotFoundError):
        os.unlink(target)
    if linkable:
        try:
            return os.link(source, target, follow_symlinks=False)
        except OSError:
            pass  # another filesystem, too many links, a filesystem without them: a copy does as well
    with open(create_private(target), "wb") as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy, _CHUNK)
        copy.flush()
        os.fsync(copy.fileno())
