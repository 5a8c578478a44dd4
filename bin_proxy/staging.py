"""A release on its way to the host: downloaded beside its target, verified, durable; nothing else is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from bin_proxy.atomic import opened
from bin_proxy.bin_manager import BinManager, Release
from bin_proxy.errors import BinProxyError, CorruptDownload, HostError, ReleaseError, host_errors
from bin_proxy.manifest import Binary
from bin_proxy.part import Part, Space
from bin_proxy.process import run
from bin_proxy.settings import Settings
from bin_proxy.slot import Slot, discard, inspect, part_path


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
        if slot.status and os.stat(settings.state_dir).st_dev != slot.status.st_dev:
            # The backup is a copy there, and going back needs another here.
            space.claim(f"{path}:backup", settings.state_dir, slot.status.st_size)
            space.claim(f"{path}:restore", slot.folder, slot.status.st_size)
        try:
            _fill(part, binary, release, api)
        except CorruptDownload:
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
    if os.path.islink(path) or inspect(path).md5 != md5:
        discard(path)
        raise ReleaseError(f"{what} changed the file that it was to verify")
    if done.code is None:
        raise HostError(f"{what} did not end within {limit:g} s")
    if done.code != 0:
        discard(path)
        raise ReleaseError(f"{what} exited {done.code}: {done.last_words}")
