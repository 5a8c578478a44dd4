"""A release on its way to the host: downloaded beside its target, verified, durable; nothing else is touched."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable
from contextlib import suppress

from bin_proxy.atomic import create_private, opened
from bin_proxy.bin_manager import BinManager, Release
from bin_proxy.errors import BinProxyError, CorruptDownload, HostError, ReleaseError, host_errors
from bin_proxy.manifest import Binary
from bin_proxy.process import run
from bin_proxy.settings import Settings
from bin_proxy.slot import Slot, discard, inspect, part_path

_CHUNK = 1024 * 1024
_SPARE = 64 * 1024 * 1024
_WRITE_BACK = 8 * 1024 * 1024


class Space:
    """Who has been promised how much of which filesystem, counting all that is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: dict[str, tuple[int, Callable[[], int]]] = {}

    def claim(
        self, key: str, folder: str, needs: Callable[[], int], refused: Callable[[], None] = lambda: None
    ) -> None:
        """Promise of the filesystem of `folder` what `key` still `needs` (in bytes) at any time, and nothing it had.

        Args:
            key, folder, needs: who, where, how many bytes.
            refused: called before anybody else is answered, so that what it gives back can be promised to others.

        Raises:
            HostError: 64 MiB, or 5 % of the filesystem where that is less, would not stay free.
        """
        with self._lock, host_errors(f"look at {folder}"):
            device, numbers = os.stat(folder).st_dev, os.statvfs(folder)
            spare = min(_SPARE, numbers.f_blocks * numbers.f_frsize // 20)
            self._claims.pop(key, None)
            free = numbers.f_bavail * numbers.f_frsize
            free -= sum(left() for where, left in self._claims.values() if where == device)
            if needs() > 0 and free - needs() < spare:
                refused()
                text = f"{free:,} bytes are free, {needs():,} are needed and {spare:,} stay spare"
                raise HostError(f"no space in {folder}: {text}")
            self._claims[key] = (device, needs)

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
        self.total = self._claimed = total
        self._claim()

    def _claim(self) -> None:
        folder = os.path.dirname(self.path)
        self._space.claim(self.path, folder, lambda: self._claimed - self.offset, self._give_back)

    def _give_back(self) -> None:
        """Of unknown size, what came goes at once: else two that fit singly refuse each other for what both have."""
        if self.total is None:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)

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
            self._claim()
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
        with suppress(OSError):  # what counts was waited for in `finish`
            os.close(self._fd)


def stage(
    settings: Settings,
    space: Space,
    api: BinManager,
    binary: Binary,
    slot: Slot,
    release: Release,
    watch: Callable[[Part | None], None],
) -> Release:
    """Download, verify and make durable, beside the target; nothing else is touched. Threads may call this.

    Args:
        settings, space, api: the limits, the ledger of what was promised, where it comes from.
        binary, slot, release: what goes where.
        watch: called with the file under way, for a progress bar, and with None when the last byte has come.

    Returns:
        the release that is staged, or another one, not staged, that bin-manager names meanwhile.

    Raises:
        BinManagerError: it did not come, or not whole.
        HostError: it cannot be written, or verifyCommand cannot be run.
        ReleaseError: verifyCommand refuses it.
    """
    path = part_path(slot.target, binary.name, release.md5)
    part = Part(path, release, settings.max_download_mib << 20, space)
    try:
        watch(part)
        if release.size is not None:
            part.expect(release.size)
        with host_errors(f"look at {settings.state_dir}"):
            elsewhere = slot.status and os.stat(settings.state_dir).st_dev != slot.status.st_dev
        if slot.status and elsewhere:  # the backup is a copy there, and going back needs another here
            size = slot.status.st_size
            space.claim(f"{path}:backup", settings.state_dir, lambda: size)
            space.claim(f"{path}:restore", slot.folder, lambda: size)
        try:
            _fill(part, binary, release, api)
        except CorruptDownload:
            with suppress(HostError):
                discard(path)
            newest = api.latest(binary)
            if newest.md5 != release.md5:
                return newest
            raise
        watch(None)
        part.finish()
    except BinProxyError as error:
        # Nothing is worth keeping, or it is of unknown size and would only keep the disk full.
        if not part.offset or (part.total is None and isinstance(error, HostError)):
            with suppress(HostError):
                discard(path)
        raise
    finally:
        part.close()
        space.free(f"{path}:backup")
        space.free(f"{path}:restore")
    if binary.verify:
        _verify(binary.verify, binary.health_timeout, path, release.md5)
    return release


def _fill(part: Part, binary: Binary, release: Release, api: BinManager) -> None:
    if not part.is_whole():
        api.download(binary, release, part)
    try:
        part.verify()
    except CorruptDownload:
        if not part.resumed:
            raise
        part.restart()  # the beginning was another release's
        api.download(binary, release, part)
        part.verify()


def _verify(command: tuple[str, ...], limit: float, path: str, md5: str) -> None:
    what = f"verifyCommand {command[0]}"
    # By its descriptor, as the command may put a link in its place.
    with host_errors(f"verify {path}"), opened(path) as fd:
        try:
            os.fchmod(fd, 0o700)
            done = run([word.replace("{file}", path) for word in command], limit)
        finally:
            os.fchmod(fd, 0o600)
    changed = os.path.islink(path) or inspect(path).md5 != md5
    if done.code is None and not changed:
        raise HostError(f"{what} did not end within {limit:g} s")
    if done.code != 0 or changed:
        with suppress(HostError):  # the next sync removes it; that it was refused is what counts
            discard(path)
        words = "changed the file that it was to verify" if changed else f"exited {done.code}: {done.last_words}"
        raise ReleaseError(f"{what} {words}")
