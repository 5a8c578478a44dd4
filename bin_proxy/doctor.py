"""Everything an operator would check by hand when it does not work: a line each, what is wrong and what to do."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bin_proxy.errors import BinProxyError, HostError, UsageError
from bin_proxy.manifest import load_manifest
from bin_proxy.settings import Settings, untrusted
from bin_proxy.slot import check_writable
from bin_proxy.state import State
from bin_proxy.status import DEAD, judge_last_sync, survey

_TOKEN = re.compile(r"^\s*(export\s+)?BIN_MANAGER_TOKEN=", re.MULTILINE)
_THIS_HOST = re.compile(r"(.+\.)?localhost|127(\.\d+){3}|::1")


def examine(load: Callable[[], Settings]) -> Iterator[tuple[bool, str]]:
    """Check config, manifest, permissions, space, bin-manager, TLS, supervisor and the age of the last sync.

    Args:
        load: works out the settings; UsageError where they are at fault.

    Yields:
        whether it is well, and one line that says what it is, or what is wrong and what to do.
    """
    told = set()
    try:
        for well, what, text in _check(load()):
            if text not in told:  # what strikes many is told once
                told.add(text)
                yield well, f"{what}: {text}"
    except BinProxyError as error:  # without which no more can be found out
        yield from ((False, fault) for fault in (error.faults if isinstance(error, UsageError) else [str(error)]))


def _check(settings: Settings) -> Iterator[tuple[bool, str, str]]:
    """Whether it is well, what was looked at, and what is to be said of it."""
    here = "read" if settings.config_found else "absent, so defaults and the environment count"
    yield True, "config", f"{settings.config} {here}"
    public = settings.config_found and os.stat(settings.config).st_mode & 0o004
    if public and _TOKEN.search(Path(settings.config).read_text("utf-8")):
        yield False, "config", f"everybody may read the token in {settings.config}: chmod o-r {settings.config}"
    if os.geteuid() != 0:
        yield True, "user", "not root, so what only root may see is not checked"
    binaries = load_manifest(settings)
    names = ", ".join(binary.name for binary in binaries) or "no binary"
    yield True, "manifest", f"{settings.manifest} names {names}"
    for name, path in (("LOG_FILE", settings.log_file), ("METRICS_FILE", settings.metrics_file)):
        if path:
            yield _try(name, _writable, path)
    for folder in sorted({os.path.dirname(os.path.realpath(binary.path)) for binary in binaries}):
        if os.path.isdir(folder):  # what is wrong with one that is none is found with its binaries
            yield _try("folder", _space, folder)
    parts = urlsplit(settings.api)
    if parts.scheme == "http" and not _THIS_HOST.fullmatch(parts.hostname or ""):
        yield False, "bin-manager", "asked over plain http, so anyone on the way may alter a release: use https"
    if not settings.supervisorctl:
        yield True, "supervisor", "no supervisorctl on this host: install it where a service is to be restarted"
    try:
        views, _ = survey(settings, binaries, offline=False)
    except UsageError as error:
        yield False, "bin-manager", str(error)
        views, _ = survey(settings, binaries, offline=True)
    struck: dict[tuple[bool, str], list[str]] = {}
    for view in views:
        row, service = view.row, view.row["service"]
        if row["latestMd5"]:
            yield True, "bin-manager", f"{row['name']}: {row['version']} is {row['latestMd5']}"
        if service and service["state"] and service["state"] not in DEAD:
            yield True, "service", f"{service['name']} is {service['state']}"
        for well, text in view.findings:
            way_out = "; correct BIN_MANAGER_API or the manifest, or mend bin-manager"
            told = text + (way_out if text.startswith("bin-manager") else "")
            struck.setdefault((well, told), []).append(row["name"])
    yield from ((well, ", ".join(names), text) for (well, text), names in struck.items())
    wrong = {name for (well, _), names in struck.items() for name in names if not well}
    yield from _state(settings.state_dir, {binary.name for binary in binaries}, wrong)


def _state(folder: str, binaries: set[str], wrong: set[str]) -> Iterator[tuple[bool, str, str]]:
    """`wrong`: those of the binaries whose trouble is known by now."""
    if os.path.isdir(folder):
        yield from ((False, "state", fault) for fault in untrusted(folder, folder=True))
        yield _try("state", _space, folder)
    else:
        above = next(str(path) for path in Path(folder).parents if path.is_dir())
        yield os.access(above, os.W_OK), "state", f"{folder} is made by the first sync"
    state = State(folder, ())
    for file, why in state.unreadable:
        yield False, "state", f"{file} cannot be read ({why}): the next sync sets it aside"
    for name in sorted(state.records.keys() - binaries):
        yield False, name, "an update was cut off, and it has left the manifest: the next sync finishes or undoes it"
    recent, text = judge_last_sync(state.cache.last_sync)
    yield recent, "last sync", text
    for trouble in state.cache.troubles.values():
        if trouble.name not in wrong:
            yield False, f"last sync: {trouble.name or 'bin-proxy'}", trouble.text


def _try(what: str, check: Callable[[str], str], path: str) -> tuple[bool, str, str]:
    try:
        return True, what, check(path)
    except (HostError, OSError) as error:
        return False, what, str(error)


def _writable(path: str) -> str:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise HostError(f"the folder of {path} does not exist: mkdir -p {folder}")
    if not os.path.exists(path):
        check_writable(folder)
    elif os.path.isdir(path) or not os.access(path, os.W_OK):
        raise HostError(f"{path} cannot be written: correct the setting, or its owner")
    return path


def _space(folder: str) -> str:
    check_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < 64 << 20:
        raise HostError(f"{folder} has only {free >> 20} MiB free: make room")
    return f"{folder} has {free >> 20:,} MiB free"
