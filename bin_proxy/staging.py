"""A release on its way to the host: downloaded beside its target, verified, durable; nothing else is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from bin_proxy.errors import BinProxyError, CorruptDownload, HostError, ReleaseError, host_error
from bin_proxy.manifest import Binary
from bin_proxy.part import Part, Space
from bin_proxy.process import run
from bin_proxy.settings import Settings
from bin_proxy.slot import Slot, discard, inspect, part_path

if TYPE_CHECKING:
    from bin_proxy.bin_manager import BinManager, Release


def stage(
    settings: Settings,
    space: Space,
    api: BinManager,
    binary: Binary,
    slot: Slot,
    release: Release,
    watch: Callable[[Part], None],
    whole: Callable[[], None],
) -> Release:
    """Download, verify and make durable, beside the target; nothing else is touched. Threads may call this.

    Args:
        settings, space, api: the limits, the ledger of what was promised, where it comes from.
        binary, slot, release: what goes where.
        watch: called with the file under way, for a progress bar.
        whole: called when the last byte has come.

    Returns:
        the release that is staged, or another one, not staged, that bin-manager names meanwhile.

    Raises:
        BinManagerError: it did not come, or not whole.
        HostError: it cannot be written, or verifyCommand cannot be run.
        ReleaseError: verifyCommand refuses it.
    """
    path = part_path(slot.target, binary.name, release.md5)
    part = Part(path, release, settings.max_download_mib << 20, space)
    old_size = slot.status.st_size if slot.status else 0
    elsewhere = os.stat(settings.state_dir).st_dev != os.stat(slot.folder).st_dev
    try:
        watch(part)
        if release.size is not None:
            part.expect(release.size)
        if elsewhere:  # the backup is a copy there, and going back needs another here
            space.claim(f"{path}:backup", settings.state_dir, old_size)
            space.claim(f"{path}:restore", slot.folder, old_size)
        try:
            _fill(part, binary, release, api)
        except CorruptDownload:
            discard(path)
            newest = api.latest(binary)
            if newest.md5 != release.md5:
                return newest
            raise
        whole()
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
        _verify(binary, path, release.md5)
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


def _verify(binary: Binary, path: str, md5: str) -> None:
    assert binary.verify
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # the command may put a link in its place
        try:
            os.fchmod(fd, 0o700)
            done = run([word.replace("{file}", path) for word in binary.verify], binary.health_timeout)
        finally:
            os.fchmod(fd, 0o600)
            os.close(fd)
    except OSError as error:
        raise host_error(f"verify {path}", error) from error
    if os.path.islink(path) or inspect(path, None).md5 != md5:
        discard(path)
        raise ReleaseError(f"verifyCommand {binary.verify[0]} changed the file that it was to verify")
    if done.code is None:
        raise HostError(f"verifyCommand {binary.verify[0]} did not end within {binary.health_timeout:g} s")
    if done.code != 0:
        discard(path)
        raise ReleaseError(f"verifyCommand {binary.verify[0]} exited {done.code}: {done.last_words}")
