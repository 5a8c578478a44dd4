"""An operator's decision to go back to a kept release."""

from __future__ import annotations

from bin_proxy.config.settings import Settings
from bin_proxy.errors import HostError, UsageError, host_errors
from bin_proxy.host.backups import Backups
from bin_proxy.host.installed import inspect, part_path
from bin_proxy.host.lock import locked
from bin_proxy.host.signals import Signals
from bin_proxy.output.report import Report
from bin_proxy.policy.model import Binary
from bin_proxy.policy.plan import short
from bin_proxy.store.state import State
from bin_proxy.update.transaction import Updater


def roll_back(
    settings: Settings, binaries: tuple[Binary, ...], name: str, to: str | None, report: Report, signals: Signals
) -> str:
    """Go back to the previous release, or a kept one, with the care of an update; the one that is left is held.

    Args:
        settings: every setting.
        binaries: the whole manifest.
        name: of the binary.
        to: the MD5, or its beginning; None for the newest that is kept.
        report: who is told.
        signals: held back meanwhile.

    Returns:
        what was done, with the hold that it leaves and the way to lift it.

    Raises:
        UsageError: nothing is kept, or not that.
        Busy: another run is at work for more than 60 s.
        HostError: nothing was changed, it was undone, or not all of it could be done.
    """
    with locked(settings.state_dir, 60), signals.held():
        binary = next(binary for binary in binaries if binary.name == name)
        state = State(settings.state_dir, tuple(binary.name for binary in binaries))
        state.prepare()
        report.notes += state.set_aside()
        updater = Updater(settings, state, report)
        recovered = updater.recover(name, state.records[name], binary) if name in state.records else None
        if recovered and name in state.records:
            raise HostError(f"{name}: {recovered.error}")
        slot = inspect(binary.path)
        backups, memory = Backups(settings.state_dir), state.memory(name)
        kept = [md5 for md5 in backups.listed(name, memory.backups) if md5 != slot.md5]
        matching = kept[:1] if to is None else [md5 for md5 in kept if to and md5.startswith(to.lower())]
        if len(matching) != 1:
            raise UsageError(f"{name} cannot go back to {to or 'another release'}; kept: {', '.join(kept) or 'none'}")
        [md5] = matching
        try:
            updater.preflight(binary, slot)
            part = part_path(slot.target, name, md5)
            memory.parts.append(part)  # removed by the next sync if need be
            state.save()
            with host_errors(f"stage the backup of {name}"):
                backups.stage(name, md5, part)
            result = updater.activate(binary, slot, md5, "operator")
        except HostError as error:
            report.log(f"{name}: not rolled back to {md5}: {error}")
            raise
    if report.notes or not result.well:
        words = [result.error or f"it is back at {short(md5)}, but", *report.notes]
        raise HostError(f"{name}: {'; '.join(words)}")
    left = f"{short(result.from_md5)} is held until bin-proxy sync --only {name} --retry-held"
    return f"{name}: back at {short(md5)} in {result.seconds:.1f} s" + (f"; {left}" if result.from_md5 else "")
