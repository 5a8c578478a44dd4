"""Replacing a file so that any reader, and any crash, sees the old bytes or the new ones, whole."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# They describe the bytes of the file they stand on, so they must not travel to other bytes.
_ABOUT_THE_BYTES = {"security.ima", "security.evm"}


@contextmanager
def opened(path: str, flags: int = os.O_RDONLY | os.O_NOFOLLOW) -> Iterator[int]:
    """A file descriptor of `path`, by default never through a link; closed at the end."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def fsync_folder(folder: str) -> None:
    """Make the names in `folder` survive a power loss."""
    with opened(folder or ".", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def make_folder(path: str, mode: int) -> None:
    """Make a folder, and those above it, if it is absent, so that it survives a power loss."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path), 0o755)
        with suppress(FileExistsError):  # another run was quicker
            os.mkdir(path, mode)
        fsync_folder(os.path.dirname(path))


def create_private(path: str) -> int:
    """Create `path` anew, 0600, never through a link and never on top of what lies there.

    Returns:
        a file descriptor for reading and writing.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)


def _xattrs(file: str | int) -> dict[str, bytes]:
    try:
        names = os.listxattr(file)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return {}
    return {name: os.getxattr(file, name) for name in names if name not in _ABOUT_THE_BYTES}


def copy_attributes(source: str, fd: int) -> None:
    """Give the open file owner, group, mode, extended attributes and capabilities of `source`.

    chown erases set-id bits and capabilities (chown(2)), so it comes first; an ACL that the folder
    bequeathed hides the group's real mode, so it goes before chmod.
    """
    status, wanted = os.stat(source), _xattrs(source)
    os.fchown(fd, status.st_uid, status.st_gid)
    have = _xattrs(fd)
    for name in have.keys() - wanted.keys():
        os.removexattr(fd, name)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    for name, value in wanted.items():
        if have.get(name) != value:
            os.setxattr(fd, name, value)


def temporary_of(path: str) -> str:
    """The name under which `path` is written before it is renamed; no other program would choose it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.bin-proxy.tmp")


def write_atomically(
    path: str, data: bytes, *, durable: bool = True, like: str | None = None, still: Callable[[], bool] = lambda: True
) -> bool:
    """Replace `path` by a file with the bytes `data`, by way of `temporary_of` it.

    Args:
        path: the file; a symbolic link is replaced, not followed.
        data: its new content.
        durable: wait until the bytes and the name would survive a power loss.
        like: a file whose owner, mode and attributes it gets; without it, 0644 and whoever runs this.
        still: asked right before the replacement, whether it is still wanted.

    Returns:
        whether it was replaced.

    Raises:
        OSError: nothing was replaced, or (from the folder's fsync) it was and may not survive a power loss.
    """
    temporary = temporary_of(path)
    with open(create_private(temporary), "wb") as file:
        file.write(data)
        file.flush()
        if like:
            copy_attributes(like, file.fileno())
        else:
            os.fchmod(file.fileno(), 0o644)
        if durable:
            os.fsync(file.fileno())
    if not still():
        return False
    os.replace(temporary, path)
    if durable:
        fsync_folder(os.path.dirname(path))
    return True
