"""The file of an unfinished download, beside its target."""

from __future__ import annotations

import hashlib
import os
import queue
import stat
import threading
from contextlib import suppress

from bin_proxy.errors import CorruptDownload, HostError, host_errors
from bin_proxy.host.files import create_private
from bin_proxy.host.space import Space
from bin_proxy.policy.model import Release

_CHUNK = 1024 * 1024
_WRITE_BACK = 8 * 1024 * 1024


class Part:
    """The `.part` file of a download: hashed in a thread of its own while the network is read.

    Args:
        path: see `part_path`. What lies there is used only if it is a plain file of ours that nobody else can write.
        release: what the bytes must be.
        largest: bytes that are accepted at the most.
        space: the ledger of what is promised.

    Raises:
        HostError: it cannot be opened.
    """

    def __init__(self, path: str, release: Release, largest: int, space: Space) -> None:
        self.path, self._release, self._largest, self._space = path, release, largest, space
        self._chunks: queue.Queue[bytes] = queue.Queue(8)
        with host_errors(f"open {path}"):
            self._fd = self._open()
        self.total, self._room = release.size, 0
        self._forget()
        threading.Thread(target=self._hash, daemon=True).start()

    def _open(self) -> int:
        with suppress(OSError):  # it is absent, a link, a pipe: a new one takes its place, or tells why it cannot
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            found = os.fstat(fd)
            if (found.st_mode, found.st_uid, found.st_nlink) == (stat.S_IFREG | 0o600, os.geteuid(), 1):
                return fd
            os.close(fd)
        return create_private(self.path)

    def _forget(self) -> None:
        self.offset = 0
        self._digests = {self._release.md5: hashlib.md5(usedforsecurity=False)}
        if self._release.sha256:
            self._digests[self._release.sha256] = hashlib.sha256()

    def _hash(self) -> None:
        while chunk := self._chunks.get():
            for digest in self._digests.values():
                digest.update(chunk)
            self._chunks.task_done()

    def load(self) -> None:
        """Take in what an earlier run left.

        Raises:
            HostError: it cannot be read.
        """
        with host_errors(f"read {self.path}"):
            while chunk := os.read(self._fd, _CHUNK):
                self.offset += len(chunk)
                self._chunks.put(chunk)
        self._room = self.offset

    def expect(self, total: int) -> None:
        """Prepare for `total` bytes in all.

        Raises:
            HostError: they are more than may come, or there is no space for them.
        """
        if total > self._largest:
            raise HostError(f"the release has {total:,} bytes, MAX_DOWNLOAD_MIB allows {self._largest:,}")
        self.total = total
        self._make_room(total)

    def _make_room(self, size: int) -> None:
        self._space.take(os.path.dirname(self.path), size - self._room)
        self._room = size

    def write(self, chunk: bytes) -> None:
        """Append, and hash alongside.

        Raises:
            CorruptDownload: it is more than is accepted.
            HostError: it cannot be written, or there is no space for it.
        """
        end = self.offset + len(chunk)
        if end > self._largest:
            raise CorruptDownload(f"more bytes come than the {self._largest:,} that MAX_DOWNLOAD_MIB allows")
        if end > self._room:  # its size was not told
            self._make_room(end)
        with host_errors(f"write {self.path}"):
            rest = memoryview(chunk)
            while rest:  # os.write may write fewer
                rest = rest[os.write(self._fd, rest) :]
        if end // _WRITE_BACK > self.offset // _WRITE_BACK:
            # Begins to write these pages out and does not wait (posix_fadvise(2), mm/fadvise.c); being dirty, they stay
            # cached. The fsync at the end then finds little left.
            with suppress(OSError):
                os.posix_fadvise(self._fd, end - _WRITE_BACK, _WRITE_BACK, os.POSIX_FADV_DONTNEED)
        self.offset = end
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

    def fault(self) -> str:
        """What makes these bytes another thing than the release that bin-manager told of; nothing if they are it."""
        self._chunks.join()
        for wanted, digest in self._digests.items():
            if digest.hexdigest() != wanted:
                return f"the {self.offset:,} bytes that came have the {digest.name} {digest.hexdigest()}, not {wanted}"
        wrong = self._release.size not in (None, self.offset)
        return f"{self.offset:,} bytes came, not {self._release.size:,}" if wrong else ""

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
        with suppress(HostError, OSError):  # what counts was waited for in `finish`
            os.close(self._fd)
            self._make_room(self.offset)
