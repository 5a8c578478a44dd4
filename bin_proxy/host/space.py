"""The free space of each filesystem, as a budget for one run."""

from __future__ import annotations

import os
import threading

from bin_proxy.errors import HostError, host_errors

_SPARE = 64 * 1024 * 1024


class Space:
    """What this run may still write to each filesystem: 64 MiB, or 5 % of it where that is less, stay free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[int, int] = {}

    def take(self, folder: str, size: int) -> None:
        """Set `size` bytes of the filesystem of `folder` aside; fewer than none give some back.

        Raises:
            HostError: so many are not left.
        """
        with self._lock, host_errors(f"look at {folder}"):
            device, numbers = os.stat(folder).st_dev, os.statvfs(folder)
            spare = min(_SPARE, numbers.f_blocks * numbers.f_frsize // 20)
            left = self._left.setdefault(device, max(0, numbers.f_bavail * numbers.f_frsize - spare))
            if size > left:
                raise HostError(f"no space in {folder}: {left:,} bytes are free beyond {spare:,}, {size:,} are needed")
            self._left[device] = left - size
