"""What makes a change of a file safe: download beside it, back up, swap, restore, prune."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from bin_proxy.atomic import copy_attributes, create_private, fsync_folder, write_all
from bin_proxy.bin_manager import Release
from bin_proxy.errors import CorruptDownload, HostError, host_error

_CHUNK = 1024 * 1024
_SPARE = 64 * 1024 * 1024
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


def inspect(path: str, known: list[int | str] | None) -> Slot:
    """Locate a binary and find its MD5, by way of what `remember` returned where the file is unchanged since.

    Raises:
        HostError: as for `locate`, or it cannot be read.
    """
    target, status = locate(path)
    if status is None:
        return Slot(target, None, None)
    if known and known[:-1] == identity(status):
        return Slot(target, status, str(known[-1]))
    try:
        with open(target, "rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.md5(usedforsecurity=False)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise host_error(f"read {target}", error) from error
    return Slot(target, status, digest.hexdigest())


def remember(slot: Slot) -> list[int | str] | None:
    """What spares the next run the hashing of this file; None where the file is too fresh to be sure."""
    if slot.status is None or slot.md5 is None:
        return None
    now = time.time_ns()
    if min(abs(now - slot.status.st_mtime_ns), abs(now - slot.status.st_ctime_ns)) < _RACY_NS:
        return None
    return [*identity(slot.status), slot.md5]


def part_path(target: str, name: str, md5: str) -> str:
    """Where the release `md5` of `name` is staged: beside its target, hence on the same filesystem."""
    return os.path.join(os.path.dirname(target), f".{name}.{md5}.part")


def check_writable(folder: str) -> None:
    """Whether a file in `folder` could be replaced.

    Raises:
        HostError: it could not.
    """
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise HostError(f"{folder} is on a filesystem mounted read-only")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HostError(f"{folder} cannot be written: run as root, or correct its owner")


class Space:
    """Who has been promised how much of which filesystem, counting all that is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: dict[str, tuple[int, int]] = {}

    def claim(self, key: str, folder: str, amount: int) -> None:
        """Promise `amount` bytes more of the filesystem of `folder` to `key`, instead of what it was promised before.

        Raises:
            HostError: 64 MiB, or 5 % of the filesystem where that is less, would not stay free.
        """
        try:
            device, numbers = os.stat(folder).st_dev, os.statvfs(folder)
        except OSError as error:
            raise host_error(f"look at {folder}", error) from error
        free = numbers.f_bavail * numbers.f_frsize
        spare = min(_SPARE, numbers.f_blocks * numbers.f_frsize // 20)
        with self._lock:
            others = sum(left for other, (where, left) in self._claims.items() if where == device and other != key)
            if amount > 0 and free - others - amount < spare:
                text = f"{free - others:,} bytes are free, {amount:,} are needed and {spare:,} stay spare"
                raise HostError(f"no space in {folder}: {text}")
            self._claims[key] = (device, amount)

    def used(self, key: str, amount: int) -> None:
        """`amount` bytes of what `key` was promised are on the disk now."""
        with self._lock:
            if key in self._claims:
                device, left = self._claims[key]
                self._claims[key] = (device, max(0, left - amount))

    def free(self, key: str) -> None:
        """`key` needs nothing any more."""
        with self._lock:
            self._claims.pop(key, None)


class Part:
    """The `.part` file of a download: hashed in a thread of its own while the network is read (a bin_manager.Sink).

    Args:
        path: see `part_path`. What lies there is used only if it is a plain file of ours that nobody else can write.
        release: what the bytes must be.
        largest: bytes that are accepted at the most.
        space: the ledger to claim from.

    Raises:
        HostError: it cannot be opened.
    """

    def __init__(self, path: str, release: Release, largest: int, space: Space) -> None:
        self.path, self._release, self._largest, self._space = path, release, largest, space
        self.offset, self.total, self._claimed = 0, release.size, 0
        try:
            self._fd = self._open()
        except OSError as error:
            raise host_error(f"open {path}", error) from error
        self._forget()
        try:
            while chunk := os.read(self._fd, _CHUNK):
                self.offset += len(chunk)
                self._feed(chunk)
        except OSError as error:
            self.close()
            raise host_error(f"read {path}", error) from error
        self.resumed = self.offset > 0

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENXIO):
                raise
            return create_private(self.path)
        found = os.fstat(fd)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if ours and not found.st_mode & 0o022 and found.st_size <= self._largest:
            os.fchmod(fd, 0o600)
            return fd
        os.close(fd)
        return create_private(self.path)

    def _forget(self) -> None:
        self._digests = [hashlib.md5(usedforsecurity=False)]
        if self._release.sha256:
            self._digests.append(hashlib.sha256())
        self._thread: threading.Thread | None = None

    def _feed(self, chunk: bytes) -> None:
        if self._thread is None:
            self._chunks: queue.Queue[bytes] = queue.Queue(8)
            self._thread = threading.Thread(target=self._hash, daemon=True)
            self._thread.start()
        self._chunks.put(chunk)

    def _hash(self) -> None:
        while chunk := self._chunks.get():
            for digest in self._digests:
                digest.update(chunk)

    def _hashed(self) -> list[str]:
        if self._thread is not None:
            self._chunks.put(b"")
            self._thread.join()
            self._thread = None
        return [digest.hexdigest() for digest in self._digests]

    def expect(self, total: int) -> None:
        """Refuse a download of `total` bytes in all that is too large or finds no space, before it is written."""
        if total > self._largest:
            raise HostError(f"the release has {total:,} bytes, MAX_DOWNLOAD_MIB allows {self._largest:,}")
        self.total = total
        self._space.claim(self.path, os.path.dirname(self.path), total - self.offset)

    def write(self, chunk: bytes) -> None:
        """Append, and hash alongside."""
        if self.offset + len(chunk) > (self.total if self.total is not None else self._largest):
            if self.total is not None:
                raise CorruptDownload(f"more bytes come than the {self.total:,} that were announced")
            raise HostError(f"the release is larger than the {self._largest:,} bytes that MAX_DOWNLOAD_MIB allows")
        if self.total is None and self.offset + len(chunk) > self._claimed:
            self._claimed = self.offset + len(chunk) + 4 * _CHUNK
            self._space.claim(self.path, os.path.dirname(self.path), self._claimed - self.offset)
        try:
            write_all(self._fd, chunk)
        except OSError as error:
            raise host_error(f"write {self.path}", error) from error
        self.offset += len(chunk)
        self._space.used(self.path, len(chunk))
        self._feed(chunk)

    def restart(self) -> None:
        """Forget all bytes."""
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        except OSError as error:
            raise host_error(f"empty {self.path}", error) from error
        self._hashed()
        self._forget()
        self.offset, self.total, self._claimed, self.resumed = 0, self._release.size, 0, False

    def is_whole(self) -> bool:
        """Whether what is there already is the release, so that nothing need be fetched."""
        if self._release.size not in (None, self.offset) or not self.offset:
            return False
        return self._hashed() == [word for word in (self._release.md5, self._release.sha256) if word]

    def verify(self) -> None:
        """Compare all bytes with what bin-manager told of the release.

        Raises:
            CorruptDownload: they are not the release.
        """
        found = self._hashed()
        for name, wanted, got in zip(("MD5", "sha256"), (self._release.md5, self._release.sha256), found, strict=False):
            if wanted != got:
                raise CorruptDownload(f"the {self.offset:,} bytes that came have the {name} {got}, not {wanted}")
        if self._release.size not in (None, self.offset):
            raise CorruptDownload(f"{self.offset:,} bytes came, not {self._release.size:,}")

    def finish(self) -> None:
        """Make all bytes durable.

        Raises:
            HostError: they cannot be made durable.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise host_error(f"write {self.path}", error) from error

    def close(self) -> None:
        """Let go of the file and of the space; what was written stays."""
        self._hashed()
        self._space.free(self.path)
        os.close(self._fd)


def discard(path: str) -> None:
    """Remove a file of ours, if it is there.

    Raises:
        HostError: it is there and cannot be removed.
    """
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise host_error(f"remove {path}", error) from error


def dress(part: str, target: str) -> None:
    """Give the staged file what belongs to the file it replaces; where there is none, 0755.

    Raises:
        OSError: one attribute cannot be given.
    """
    fd = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.path.lexists(target):
            copy_attributes(target, fd)
        else:
            os.fchmod(fd, 0o755)
        os.fsync(fd)
    finally:
        os.close(fd)


def swap(part: str, target: str) -> None:
    """Put the staged file in the place of the target, at once and durably.

    Raises:
        OSError: it was not done, or (from the folder's fsync) it was and may not survive a power loss.
    """
    os.replace(part, target)
    fsync_folder(os.path.dirname(target))


class Backups:
    """STATE_DIR/backups: previous releases by name and MD5.

    Args:
        folder: STATE_DIR.
    """

    def __init__(self, folder: str) -> None:
        self._root = os.path.join(folder, "backups")

    def path(self, name: str, md5: str) -> str:
        """Where the release `md5` of `name` is kept."""
        return os.path.join(self._root, name, md5)

    def listed(self, name: str, order: list[str]) -> list[str]:
        """The MD5s that are kept, in `order` where it knows them, then as they lie there."""
        try:
            there = sorted(entry for entry in os.listdir(os.path.join(self._root, name)) if not entry.endswith(".tmp"))
        except OSError:
            return []
        return [md5 for md5 in order if md5 in there] + [md5 for md5 in there if md5 not in order]

    def add(self, name: str, slot: Slot) -> None:
        """Keep the installed file: a hard link where that is possible, else a durable copy.

        A file with another name elsewhere is copied, as writing to that name would alter the backup.

        Raises:
            OSError: it is not kept; what was kept before still is.
        """
        assert slot.md5 and slot.status
        entry = self.path(name, slot.md5)
        folder = os.path.dirname(entry)
        if not os.path.isdir(folder):
            os.makedirs(folder, 0o700)
            fsync_folder(self._root)
        if os.path.lexists(entry) and os.path.samefile(entry, slot.target):
            return
        _link_or_copy(slot.target, f"{entry}.tmp", linkable=slot.status.st_nlink == 1)
        os.replace(f"{entry}.tmp", entry)
        fsync_folder(folder)

    def stage(self, name: str, md5: str, part: str) -> None:
        """Stage a kept release beside its target, after checking its bytes.

        Raises:
            HostError: it is damaged.
            OSError: it is absent, or cannot be staged.
        """
        entry = self.path(name, md5)
        found = inspect(entry, None)
        if found.md5 != md5:
            raise HostError(f"the backup {entry} is {'damaged' if found.md5 else 'gone'}")
        _link_or_copy(entry, part, linkable=True)

    def prune(self, name: str, order: list[str], keep: int, installed: Slot | None) -> list[str]:
        """Remove all but the newest `keep` (one at the least), and the one that is installed: it must share no inode.

        Returns:
            the MD5s that stay, newest first.

        Raises:
            OSError: one cannot be removed.
        """
        kept: list[str] = []
        for md5 in self.listed(name, order):
            if len(kept) < max(1, keep) and not (installed and installed.md5 == md5):
                kept.append(md5)
            else:
                os.unlink(self.path(name, md5))
        with suppress(FileNotFoundError):
            for entry in os.listdir(os.path.join(self._root, name)):
                if entry.endswith(".tmp"):
                    os.unlink(os.path.join(self._root, name, entry))
        return kept


def _link_or_copy(source: str, target: str, *, linkable: bool) -> None:
    with suppress(FileNotFoundError):
        os.unlink(target)
    if linkable:
        try:
            return os.link(source, target, follow_symlinks=False)
        except OSError:
            pass  # another filesystem, too many links, a filesystem without them: a copy does as well
    fd = create_private(target)
    with open(fd, "wb") as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy, _CHUNK)
        copy.flush()
        os.fsync(copy.fileno())
