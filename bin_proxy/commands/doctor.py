"""Everything an operator would check by hand when it does not work: a line each, what is wrong and what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bin_proxy.commands.status import judge_last_sync, survey
from bin_proxy.config.manifest import load_manifest
from bin_proxy.config.settings import Settings
from bin_proxy.config.trust import untrusted
from bin_proxy.errors import BinProxyError, UsageError
from bin_proxy.host.supervisor import DEAD
from bin_proxy.output.report import merge
from bin_proxy.policy.model import Binary


def examine(load: Callable[[], Settings]) -> Iterator[tuple[bool, str]]:
    """Check config, manifest, permissions, space, bin-manager, TLS, supervisor and the age of the last sync.

    Args:
        load: works out the settings; UsageError where they are at fault.

    Yields:
        whether it is well, and one line that says what it is, or what is wrong and what to do.
    """
    try:
        yield from _check(load())
    except BinProxyError as error:  # without which no more can be found out
        yield from ((False, fault) for fault in (error.faults if isinstance(error, UsageError) else [str(error)]))


def _check(settings: Settings) -> Iterator[tuple[bool, str]]:
    config, found = settings.config, settings.config_found
    yield True, f"config: {config} {'read' if found else 'absent, so defaults and the environment count'}"
    public = found and os.stat(config).st_mode & 0o004
    if public and settings.token and settings.token in Path(config).read_text("utf-8"):
        yield False, f"config: everybody may read the token in {config}: chmod o-r {config}"
    binaries: tuple[Binary, ...] = ()
    try:
        binaries = load_manifest(settings)
        names = ", ".join(binary.name for binary in binaries) or "no binary"
        yield True, f"manifest: {settings.manifest} names {names}"
    except UsageError as error:
        yield from ((False, fault) for fault in error.faults)
    for name, path in (("LOG_FILE", settings.log_file), ("METRICS_FILE", settings.metrics_file)):
        folder = os.path.dirname(path)
        fine = not os.path.isdir(path) and os.access(path if os.path.exists(path) else folder, os.W_OK)
        way_out = f" cannot be written: mkdir -p {folder}, or correct the setting, or who may write there"
        if path:
            yield fine, f"{name}: {path}{'' if fine else way_out}"
    folders = {("folder", os.path.dirname(os.path.realpath(binary.path))) for binary in binaries}
    for what, folder in (*sorted(folders), ("state", settings.state_dir)):
        if os.path.isdir(folder):
            free = shutil.disk_usage(folder).free >> 20
            fine = os.access(folder, os.W_OK | os.X_OK)
            text = f"has {free:,} MiB free" if fine else "cannot be written: run as root, or correct its owner"
            yield fine and free >= 64, f"{what}: {folder} {text}{'' if free >= 64 else ': make room'}"
        elif what == "folder":  # the first sync makes the other
            yield False, f"folder: {folder} is absent: mkdir -p {folder}"
    if os.path.isdir(settings.state_dir):
        yield from ((False, f"state: {fault}") for fault in untrusted(settings.state_dir))
    api = urlsplit(settings.api)
    if api.scheme == "http" and api.hostname not in ("localhost", "127.0.0.1", "::1"):
        yield False, "bin-manager: asked over plain http, so anyone on the way may alter a release: use https"
    if not settings.supervisorctl:
        yield True, "supervisor: no supervisorctl on this host: install it where a service is to be restarted"
    try:
        views, state = survey(settings, binaries, offline=False)
    except UsageError as error:
        yield False, f"bin-manager: {error}"
        views, state = survey(settings, binaries, offline=True)
    for row in (view.row for view in views):
        if row["latestMd5"]:
            yield True, f"bin-manager: {row['name']}: {row['version']} is {row['latestMd5']}"
        if row["service"] and row["service"]["state"] not in DEAD:
            yield True, f"service: {row['service']['name']} is {row['service']['state']}"
    yield from merge(finding for view in views for finding in view.findings)
    for trouble in state.cache.troubles.values():
        if not trouble.name:
            yield False, f"last sync: {trouble.text}"
    yield judge_last_sync(state.cache.last_sync)
