"""The file of a binary: where it is, what it is, and how it is replaced."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass

from bin_proxy.errors import HostError, host_errors
from bin_proxy.host.files import copy_attributes, fsync_folder, opened

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
