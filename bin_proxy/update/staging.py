"""A release on its way to the host: downloaded beside its target, verified, durable; nothing else is touched."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

from bin_proxy.config.settings import Settings
from bin_proxy.errors import BinProxyError, CorruptDownload, HostError, ReleaseError, host_errors
from bin_proxy.host.files import opened
from bin_proxy.host.installed import Slot, discard, inspect, part_path
from bin_proxy.host.part import Part
from bin_proxy.host.process import run
from bin_proxy.host.space import Space
from bin_proxy.policy.model import Binary, Release
from bin_proxy.server.client import BinManager

_CHUNK = 1024 * 1024


class Staging:
    """Brings releases to the host. Threads may share one.

    Args:
        settings: the limits, and where a backup goes.
        api: where releases come from.
    """

    def __init__(self, settings: Settings, api: BinManager) -> None:
        self._settings, self._api, self._space = settings, api, Space()

    def stage(self, binary: Binary, slot: Slot, release: Release, watch: Callable[[Part], None]) -> Release:
        """Download, verify and make durable, beside the target; nothing else is touched.

        Args:
            binary, slot, release: what goes where.
            watch: called with the file under way, for a progress bar.

        Returns:
            the release that is staged, or another one, not staged, that bin-manager names meanwhile.

        Raises:
            BinManagerError: it did not come, or not whole.
            HostError: it cannot be written, or verifyCommand cannot be run.
            ReleaseError: verifyCommand refuses it.
        """
        path, folder = part_path(slot.target, binary.name, release.md5), self._settings.state_dir
        with host_errors(f"look at {folder}"):
            if slot.status and os.stat(folder).st_dev != slot.status.st_dev:  # the backup is a copy there
                self._space.take(folder, slot.status.st_size)
        part = Part(path, release, self._settings.max_download_mib << 20, self._space)
        try:
            watch(part)
            self._fill(part, binary, release)
            part.finish()
        except BinProxyError as error:
            if not part.offset or isinstance(error, (CorruptDownload, HostError)):  # else what came is worth keeping
                with suppress(HostError):
                    discard(path)
                    part.offset = 0  # so that all its room is given back
            if isinstance(error, CorruptDownload):
                newest = self._api.latest(binary)
                if newest.md5 != release.md5:
                    return newest
            raise
        finally:
            part.close()
        if binary.verify:
            _verify(binary.verify, binary.health_timeout, path, release.md5)
        return release

    def _fill(self, part: Part, binary: Binary, release: Release) -> None:
        part.load()
        begun = part.offset > 0
        if begun and not part.fault():
            return
        if release.size is not None:
            part.expect(release.size)
        self._api.download(binary, release, part)
        if begun and part.fault():  # the beginning was another release's
            part.restart()
            self._api.download(binary, release, part)
        if fault := part.fault():
            raise CorruptDownload(fault)


def _verify(command: tuple[str, ...], limit: float, path: str, md5: str) -> None:
    what = f"verifyCommand {command[0]}"
    # By its descriptor, as the command may put a link in its place.
    with host_errors(f"verify {path}"), opened(path) as fd:
        try:
            os.fchmod(fd, 0o700)
            done = run([word.replace("{file}", path) for word in command], limit)
        finally:
            os.fchmod(fd, 0o600)
    if done.code in (None, -signal.SIGKILL):  # the latter, where memory was short
        raise HostError(f"{what} {done.ending}")
    changed = inspect(path).md5 != md5
    if done.code != 0 or changed:
        with suppress(HostError):  # the next sync removes it; that it was refused is what counts
            discard(path)
        words = "changed the file that it was to verify" if changed else done.ending
        raise ReleaseError(f"{what} {words}")
