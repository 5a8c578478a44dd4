"""Everything an operator would check by hand when it does not work: a line each, what is wrong and what to do."""

from __future__ import annotations

import ipaddress
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from urllib.parse import urlsplit

from bin_proxy.bin_manager import BinManager
from bin_proxy.errors import BinProxyError, HostError, UsageError
from bin_proxy.manifest import Binary, load_manifest
from bin_proxy.settings import Settings, untrusted
from bin_proxy.slot import check_writable, locate
from bin_proxy.state import State
from bin_proxy.status import survey

Finding = tuple[bool, str]
_QUIET_FOR = 300.0


def examine(settings: Settings) -> Iterator[Finding]:
    """Check config, manifest, permissions, space, bin-manager, TLS, supervisor and the age of the last sync.

    Args:
        settings: already loaded, hence sound.

    Yields:
        whether it is well, and one line that says what it is, or what is wrong and what to do.
    """
    here = "read" if settings.config_found else "absent, so defaults and the environment count"
    yield True, f"config: {settings.config} {here}"
    if settings.config_found and settings.token and os.stat(settings.config).st_mode & 0o004:
        yield False, f"config: everybody may read {settings.config}: chmod o-r, if the token stands in it"
    if os.geteuid() != 0:
        yield True, "user: not root, so what only root may see is not checked"
    try:
        binaries = load_manifest(settings)
    except BinProxyError as error:
        yield False, str(error)
        return
    yield True, f"manifest: {settings.manifest} names {', '.join(binary.name for binary in binaries) or 'no binary'}"
    yield from _state(settings)
    yield _try("log", lambda: _log(settings.log_file))
    told = set()
    for folder in sorted({os.path.dirname(os.path.realpath(binary.path)) for binary in binaries}):
        found = _try("folder", partial(_space, folder))
        told |= set() if found[0] else {folder}
        yield found
    for binary in binaries:
        found = _try(binary.name, partial(locate, binary.path))
        if not found[0] and os.path.dirname(os.path.realpath(binary.path)) not in told:
            told.add(found[1])
            yield found
    if _is_plain_http_elsewhere(settings.api):
        yield False, "bin-manager: asked over plain http, so anyone on the way may alter a release: use https"
    try:
        api = BinManager(settings)
    except UsageError as error:
        yield False, str(error)
        return
    for binary in binaries:
        yield _try(f"bin-manager: {binary.name}", partial(_release, api, binary))
    if not settings.supervisorctl:
        yield (
            not any(binary.services for binary in binaries),
            "supervisor: no supervisorctl on this host: install it where a service is to be restarted",
        )
    for row in survey(settings, binaries, offline=True)["binaries"]:
        service = row["service"]
        if (service and service["state"] is None) or (row["error"] and not service):
            if f"{row['name']}: {row['error']}" not in told and os.path.dirname(row["path"]) not in told:
                yield False, f"{row['name']}: {row['error']}"
        elif service:
            bad = service["state"] in ("FATAL", "BACKOFF", "EXITED", "UNKNOWN")
            hint = f": supervisorctl tail {service['name']}" if bad else ""
            yield not bad, f"service: {service['name']} is {service['state']}{hint}"
            if service["restartPending"]:
                yield False, f"service: {service['name']} runs an older file: supervisorctl restart {service['name']}"


def _try(what: str, check: Callable[[], object]) -> Finding:
    try:
        return True, f"{what}: {check()}"
    except BinProxyError as error:
        return False, f"{what}: {error}"


def _state(settings: Settings) -> Iterator[Finding]:
    folder = settings.state_dir
    if not os.path.isdir(folder):
        yield os.access(os.path.dirname(folder), os.W_OK), f"state: {folder} is made by the first sync"
        yield False, "last sync: none yet: does cron run bin-proxy sync?"
        return
    for fault in untrusted(folder, folder=True):
        yield False, f"state: {fault}"
    try:
        state = State(folder, ())
    except HostError as error:
        yield False, f"state: {error}"
        return
    yield _try("state", lambda: _space(folder))
    for file, why in state.unreadable:
        yield False, f"state: {file} cannot be read ({why}): the next sync sets it aside"
    for name in state.records:
        yield False, f"{name}: an update was cut off: bin-proxy sync --only {name} finishes or undoes it"
    for name, pause in state.pauses.items():
        yield (
            True,
            f"{'this host' if name == '*' else name}: paused by an operator: {pause.reason or 'no reason given'}",
        )
    last = state.cache.last_sync
    age = time.time() - last[0] if last else 0.0
    text = (
        f"last sync: {age:.0f} s ago, exit {last[1]:.0f}"
        if last
        else "last sync: none yet: does cron run bin-proxy sync?"
    )
    yield bool(last) and -60 < age < _QUIET_FOR, text + (": does cron run it?" if age >= _QUIET_FOR else "")
    for key, (_, _, trouble) in state.cache.troubles.items():
        yield False, f"last sync: {key.split(' ')[0]}: {trouble}"


def _release(api: BinManager, binary: Binary) -> str:
    return f"{binary.version} is {api.latest(binary).md5}"


def _log(path: str) -> str:
    target = path if os.path.exists(path) else os.path.dirname(path)
    if not os.access(target, os.W_OK):
        raise HostError(f"{path} cannot be written: mkdir -p {os.path.dirname(path)}, or correct its owner")
    return path


def _space(folder: str) -> str:
    try:
        check_writable(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise HostError(f"{folder}: {error.strerror}: mkdir -p {folder}") from error
    if free < 64 << 20:
        raise HostError(f"{folder} has only {free >> 20} MiB free: make room")
    return f"{folder} has {free >> 20:,} MiB free"


def _is_plain_http_elsewhere(api: str) -> bool:
    """Whether the API is asked over http on another host than this one, so that anyone between may alter it."""
    parts = urlsplit(api)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    return parts.scheme == "http" and not local
