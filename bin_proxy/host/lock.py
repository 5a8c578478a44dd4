"""What keeps a run alone: the lock of STATE_DIR."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import Timeout, UnixFileLock

from bin_proxy.config.trust import untrusted
from bin_proxy.errors import Busy, UsageError, host_error, host_errors
from bin_proxy.host.files import make_folder


@contextmanager
def locked(state_dir: str, wait: float) -> Iterator[None]:
    """Hold the lock of STATE_DIR, which is made if absent, after waiting up to `wait` seconds for another run.

    Raises:
        Busy: another run holds it.
        UsageError: others than root could write what lies there.
        HostError: it cannot be had.
    """
    path = os.path.join(state_dir, "lock")
    with host_errors(f"lock {state_dir}"):
        make_folder(state_dir, 0o755)
        # Whoever writes a record there says which file is replaced by which.
        folders = [os.path.join(state_dir, name) for name in ("", "journal", "backups")]
        if faults := [fault for folder in folders if os.path.isdir(folder) for fault in untrusted(folder)]:
            raise UsageError(*dict.fromkeys(faults))
        # flock(2), which ends with the process; never filelock's softer lock, which a killed run would leave behind.
        lock = UnixFileLock(path, mode=0o600, fallback_to_soft=False)
        try:
            held = lock.acquire(timeout=wait, poll_interval=0.2)
        except Timeout:
            raise Busy(os.stat(path).st_mtime) from None
        except NotImplementedError as error:  # a filesystem without flock(2)
            raise host_error(f"lock {state_dir}", error) from error
        os.utime(path)  # tells others since when
    with held:
        yield


def is_locked(state_dir: str) -> bool:
    """Whether a run is at work, without taking the lock, which would turn that run's successor away (proc_locks(5))."""
    with suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        inode = os.stat(os.path.join(state_dir, "lock")).st_ino
        return any("FLOCK" in line and f":{inode} " in line for line in locks)
    return False
