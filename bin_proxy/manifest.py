"""What a valid manifest is, and how to record the MD5 of one binary in it and change nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from json import JSONDecoder
from typing import Any
from urllib.parse import urlsplit

from bin_proxy.atomic import write_atomically
from bin_proxy.errors import HostError, UsageError, host_error
from bin_proxy.settings import Settings, untrusted

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_SERVICE = re.compile(r"[^\s:*]+(?::(?:\*|[^\s:*]+))?")
_LARGEST = 16 * 1024 * 1024


@dataclass(frozen=True)
class HealthCheck:
    """`kind` is "tcp", "http" or "command"; `target` is "HOST:PORT", the URL or the argument list."""

    kind: str
    target: str | tuple[str, ...]


@dataclass(frozen=True)
class Binary:
    """One entry. Times are in seconds; `services` is None where the service is found by the binary's name."""

    name: str
    version: str
    path: str
    services: tuple[str, ...] | None
    health: HealthCheck | None
    min_healthy: float
    health_timeout: float
    verify: tuple[str, ...] | None
    reported: str | None


def parse_json(text: str) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN, no nesting that exhausts the stack.

    Raises:
        ValueError: with what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key[:40]!r} occurs twice")
            found[key] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_manifest(settings: Settings) -> tuple[Binary, ...]:
    """Read and check the whole manifest.

    Raises:
        UsageError: with every fault; a manifest with one is refused whole.
    """
    path = settings.manifest
    try:
        faults = untrusted(path)
        if faults:
            raise UsageError(*faults)
        data = _parse(_read(path))
    except OSError as error:
        raise UsageError(f"manifest {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"manifest {path}: {error}") from None
    binaries: list[Binary] = []
    seen: dict[str, str] = {}  # names, and files by the name that has them
    for at, entry in enumerate(data["binaries"]):
        where = f"manifest {path}: binaries[{at}]"
        if not isinstance(entry, dict):
            faults.append(f"{where} is not an object")
            continue
        name = entry.get("name")
        where += f" ({name[:130]!r})" if isinstance(name, str) else ""
        found = _faults(entry)
        if isinstance(name, str) and _WORD.fullmatch(name):
            file = entry.get("path", os.path.join(settings.bin_dir, name))
            real = os.path.realpath(file) if _is_text(file) else ""
            found += ["its name stands twice"] if name in seen else []
            found += [f"it shares the file {real} with {seen[real]}"] if seen.get(real, name) != name else []
            seen |= {name: name, real: name} if real else {name: name}
        if found:
            faults += [f"{where}: {fault}" for fault in found]
        else:
            binaries.append(_binary(entry, settings))
    if faults:
        raise UsageError(*faults)
    return tuple(binaries)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def _parse(text: str) -> dict[str, Any]:
    data = parse_json(text)
    if not isinstance(data, dict) or not isinstance(data.get("binaries"), list):
        raise ValueError('it must be an object with a list "binaries"')
    return data


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_arguments(value: object) -> bool:
    words = value if isinstance(value, list) and value and value[0] else [None]
    return all(isinstance(word, str) and "\0" not in word and _is_unicode(word) for word in words)


def _is_unicode(word: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in word)


def _faults(entry: dict[str, Any]) -> list[str]:
    faults = []
    for key in ("name", "version"):
        value = entry.get(key, "latest" if key == "version" else None)
        if not isinstance(value, str) or not _WORD.fullmatch(value):
            faults.append(
                f"{key} must match [A-Za-z0-9][A-Za-z0-9._+-]*, at most 128 characters, not {str(value)[:140]!r}"
            )
    path = entry.get("path", "/default")
    if not _is_text(path) or not os.path.isabs(path) or path.endswith("/"):
        faults.append(f"path must be the absolute path of a file, not {str(path)[:140]!r}")
    service = entry.get("service", False)
    names = service if isinstance(service, list) and service else [service]
    if service is not False and not all(_is_text(name) and _SERVICE.fullmatch(name) for name in names):
        faults.append('service must be "program", "group:program", "group:*", a list of these, or false')
    for key in ("minHealthySeconds", "healthTimeout"):
        value = entry.get(key, 0)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= 86400:
            faults.append(f"{key} must be a number of seconds from 0 to 86400, not {str(value)[:40]!r}")
    if "healthCheck" in entry and _health(entry["healthCheck"]) is None:
        faults.append(
            'healthCheck must be {"tcp": "host:port"}, {"http": "http://…"} or {"command": ["/path", "argument"]}'
        )
    if "verifyCommand" in entry and not _is_arguments(entry["verifyCommand"]):
        faults.append('verifyCommand must be a list of arguments, such as ["{file}", "--version"]')
    if not isinstance(entry.get("currentMd5", ""), (str, type(None))):
        faults.append("currentMd5 must be a string")
    return faults


def _health(check: object) -> HealthCheck | None:
    if not isinstance(check, dict) or len(check) != 1:
        return None
    [(kind, target)] = check.items()
    if kind == "command" and _is_arguments(target):
        return HealthCheck(kind, tuple(target))
    if not _is_text(target) or " " in target:
        return None
    try:
        parts = urlsplit(target if kind == "http" else f"//{target}")
        if kind == "tcp" and parts.hostname and parts.port and parts.netloc == target and not parts.username:
            return HealthCheck(kind, target)
        if kind == "http" and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return HealthCheck(kind, target)
    except ValueError:
        pass  # a port that is none
    return None


def _binary(entry: dict[str, Any], settings: Settings) -> Binary:
    service = entry.get("service")
    services = () if service is False else tuple(service) if isinstance(service, list) else (service,)
    return Binary(
        name=entry["name"],
        version=entry.get("version", "latest"),
        path=os.path.normpath(entry.get("path") or os.path.join(settings.bin_dir, entry["name"])),
        services=services if "service" in entry else None,
        health=_health(entry.get("healthCheck")),
        min_healthy=float(entry.get("minHealthySeconds", settings.min_healthy)),
        health_timeout=float(entry.get("healthTimeout", settings.health_timeout)),
        verify=tuple(entry["verifyCommand"]) if "verifyCommand" in entry else None,
        reported=(entry["currentMd5"] or "") if "currentMd5" in entry else None,
    )


def record_md5s(path: str, digests: Mapping[str, str]) -> None:
    """Write the MD5 of binaries into the `currentMd5` that their entries have; every other byte stays.

    The manifest is read anew, and looked at again right before it is replaced, so an edit made meanwhile stays.

    Args:
        path: the manifest; where it is a symbolic link, the link stays.
        digests: by binary name. An entry without `currentMd5`, or a name that has gone, is passed over.

    Raises:
        HostError: it cannot be read, understood or written; it is as it was.
    """
    real = os.path.realpath(path)
    try:
        for _ in range(5):
            seen = _identity(real)
            old = _read(real)
            new = _with_md5s(old, digests)
            if new == old:
                return
            if write_atomically(real, new.encode(), like=real, still=partial(_is_still, real, seen)):
                return
    except OSError as error:
        raise host_error(f"record the new MD5 in manifest {path}", error) from error
    except ValueError as error:
        raise HostError(f"cannot record the new MD5 in manifest {path}: {error}") from None
    raise HostError(f"cannot record the new MD5 in manifest {path}: it keeps changing")


def _is_still(path: str, seen: tuple[int, int, int, int]) -> bool:
    return _identity(path) == seen


def _identity(path: str) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _with_md5s(text: str, digests: Mapping[str, str]) -> str:
    data = _parse(text)
    [at] = [start for key, start, _ in _values(text, _skip(text, 0)) if key == "binaries"]
    pieces, copied = [], 0
    for entry, (_, start, _) in zip(data["binaries"], _values(text, at), strict=True):
        if not isinstance(entry, dict) or "currentMd5" not in entry:
            continue
        md5 = digests.get(str(entry.get("name")))
        if md5 is not None and entry["currentMd5"] != md5:
            [(begin, end)] = [span for key, *span in _values(text, start) if key == "currentMd5"]
            pieces += [text[copied:begin], json.dumps(md5)]
            copied = end
    return "".join([*pieces, text[copied:]])


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _values(text: str, at: int) -> Iterator[tuple[str, int, int]]:
    """The key (of an object), begin and end of each value of the object or array at `at`, in text known to be JSON."""
    scan, of_object, key = JSONDecoder().raw_decode, text[at] == "{", ""
    at = _skip(text, at + 1)
    while text[at] not in "]}":
        if of_object:
            key, at = scan(text, at)
            at = _skip(text, _skip(text, at) + 1)
        _, end = scan(text, at)
        yield key, at, end
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at
