"""The file of a download under way: promised space, resumed, hashed while it comes, verified, made durable."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from bin_proxy.atomic import create_private
from bin_proxy.errors import CorruptDownload, HostError, host_errors

if TYPE_CHECKING:
    from bin_proxy.bin_manager import Release

_CHUNK = 1024 * 1024
_SPARE = 64 * 1024 * 1024
_WRITE_BACK = 8 * 1024 * 1024


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
        with host_errors(f"look at {folder}"):
            device, numbers = os.stat(folder).st_dev, os.statvfs(folder)
        free = numbers.f_bavail * numbers.f_frsize
        spare = min(_SPARE, numbers.f_blocks * numbers.f_frsize // 20)
        with self._lock:
            free -= sum(left for other, (where, left) in self._claims.items() if where == device and other != key)
            if amount > 0 and free - amount < spare:
                text = f"{free:,} bytes are free, {amount:,} are needed and {spare:,} stay spare"
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
    """The `.part` file of a download: hashed in a thread of its own while the network is read.

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
        self._wanted = {"MD5": release.md5, **({"sha256": release.sha256} if release.sha256 else {})}
        self._chunks: queue.Queue[bytes] = queue.Queue(8)
        with host_errors(f"open {path}"):
            self._fd = self._open()
        self._forget()
        threading.Thread(target=self._hash, daemon=True).start()
        try:
            with host_errors(f"read {path}"):
                while chunk := os.read(self._fd, _CHUNK):
                    self.offset += len(chunk)
                    self._chunks.put(chunk)
        except HostError:
            self.close()
            raise
        self.resumed, self._sent = self.offset > 0, self.offset

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
        self._digests = [hashlib.new(name, usedforsecurity=False) for name in self._wanted]
        self.offset, self.total, self._claimed, self._sent, self.resumed = 0, self._release.size, 0, 0, False

    def _hash(self) -> None:
        while chunk := self._chunks.get():
            for digest in self._digests:
                digest.update(chunk)
            self._chunks.task_done()

    def _hashed(self) -> dict[str, str]:
        self._chunks.join()
        return {name: digest.hexdigest() for name, digest in zip(self._wanted, self._digests, strict=True)}

    def expect(self, total: int) -> None:
        """Refuse a download of `total` bytes in all that is too large or finds no space, before it is written."""
        if total > self._largest:
            raise HostError(f"the release has {total:,} bytes, MAX_DOWNLOAD_MIB allows {self._largest:,}")
        self.total = total
        self._space.claim(self.path, os.path.dirname(self.path), total - self.offset)

    def write(self, chunk: bytes) -> None:
        """Append, and hash alongside.

        Raises:
            CorruptDownload: it is more than was announced, or than is accepted.
            HostError: it cannot be written, or there is no space for it.
        """
        end = self.offset + len(chunk)
        if self.total is not None and end > self.total:
            raise CorruptDownload(f"more bytes come than the {self.total:,} that were announced")
        if end > self._largest:
            raise CorruptDownload(f"more bytes come than the {self._largest:,} that MAX_DOWNLOAD_MIB allows")
        if self.total is None and end > self._claimed:
            self._claimed = end + 4 * _CHUNK
            self._space.claim(self.path, os.path.dirname(self.path), self._claimed - self.offset)
        with host_errors(f"write {self.path}"):
            rest = memoryview(chunk)
            while rest:  # os.write may write fewer
                rest = rest[os.write(self._fd, rest) :]
        self.offset = end
        if end - self._sent >= _WRITE_BACK:
            # Begins to write these pages out and does not wait (posix_fadvise(2), mm/fadvise.c); being dirty, they stay
            # cached. The fsync at the end then finds little left.
            with suppress(OSError):
                os.posix_fadvise(self._fd, self._sent, end - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = end
        self._space.used(self.path, len(chunk))
        self._chunks.put(chunk)

    def restart(self) -> None:
        """Forget all bytes.

        Raises:
            HostError: the file cannot be emptied.
        """
        with host_errors(f"empty {self.path}"):
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        self._chunks.join()
        self._forget()

    def is_whole(self) -> bool:
        """Whether what is there already is the release, so that nothing need be fetched."""
        return self.offset > 0 and self._release.size in (None, self.offset) and self._hashed() == self._wanted

    def verify(self) -> None:
        """Compare all bytes with what bin-manager told of the release.

        Raises:
            CorruptDownload: they are not the release.
        """
        found = self._hashed()
        for name, wanted in self._wanted.items():
            if found[name] != wanted:
                raise CorruptDownload(
                    f"the {self.offset:,} bytes that came have the {name} {found[name]}, not {wanted}"
                )
        if self._release.size not in (None, self.offset):
            raise CorruptDownload(f"{self.offset:,} bytes came, not {self._release.size:,}")

    def finish(self) -> None:
        """Make all bytes durable.

        Raises:
            HostError: they cannot be made durable.
        """
        with host_errors(f"write {self.path}"):
            os.fsync(self._fd)

    def close(self) -> None:
        """Let go of the file and of the space; what was written stays."""
        self._chunks.put(b"")
        self._space.free(self.path)
        os.close(self._fd)
