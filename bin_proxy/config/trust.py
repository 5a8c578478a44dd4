"""Which files orders may be taken from: those that only root, or the invoker, could have written."""

from __future__ import annotations

import os
import shlex
import stat

from bin_proxy.errors import UsageError


def read_trusted(setting: str, path: str) -> str:
    """The text of the file that `setting` names, every character of it.

    Raises:
        UsageError: it cannot be read, or orders are not to be taken from it.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISCHR(kind):  # a pipe would be waited for without end
            raise ValueError("it is not a regular file")
        if faults := untrusted(path):
            raise UsageError(*faults)
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{setting} {path} cannot be read: {why}; correct either") from None


def untrusted(path: str) -> list[str]:
    """Why not to take orders from a file or folder: others than root could write it or swap it.

    Every folder and every link on the way is looked at.

    Returns:
        one line for each reason, with the command that mends it; only root is that careful.

    Raises:
        OSError: something on the way cannot be looked at.
    """
    if os.geteuid() != 0:
        return []
    trusted = {"0", os.environ.get("SUDO_UID", "0")}
    path = os.path.abspath(path)
    way: dict[str, os.stat_result] = {}
    ahead = [path]
    while ahead:
        here = ahead.pop()
        if here not in way:
            way[here] = os.lstat(here)
            ahead.append(os.path.dirname(here))
            if stat.S_ISLNK(way[here].st_mode):  # not normalised: behind a link, .. is the folder above its target
                ahead.append(os.path.join(os.path.dirname(here), os.readlink(here)))
    faults: list[str] = []
    for here, found in way.items():
        mode, quoted = found.st_mode, shlex.quote(here)
        if stat.S_ISCHR(mode):
            continue  # /dev/null is everybody's, and empty
        what = path if here == path else f"{here}, which leads to {path},"
        if str(found.st_uid) not in trusted:
            faults.append(f"{what} belongs to user {found.st_uid}, not to root: chown -h root {quoted}")
        # With an ACL, the group's mode is that of whoever the ACL names.
        group = mode & stat.S_IWGRP and (found.st_gid != 0 or "system.posix_acl_access" in os.listxattr(here))
        safe = stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)
        if not safe and (mode & stat.S_IWOTH or group):
            faults.append(f"others may write {what}: chmod go-w {quoted}")
    return faults
