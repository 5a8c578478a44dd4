"""STATE_DIR/backups: the previous releases of each binary."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from bin_proxy.errors import BackupLost
from bin_proxy.host.files import create_private, fsync_folder, make_folder
from bin_proxy.host.installed import Slot, inspect

_CHUNK = 1024 * 1024


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
