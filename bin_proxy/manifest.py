"""What a valid manifest is, and how to record the MD5 of one binary in it and change nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from bin_proxy.atomic import write_atomically
from bin_proxy.errors import UsageError, host_error
from bin_proxy.settings import Settings, untrusted

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_SERVICE = re.compile(r"[^\s:*]+(?::(?:\*|[^\s:*]+))?")
_NO_ARGUMENT = re.compile(r"[\0\ud800-\udfff]")  # what execve(2) cannot be given
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
# In JSON, every string; with its value where it is the key of a string or null.
_MEMBER = re.compile(rf"({_STRING})(?:\s*:\s*({_STRING}|null))?")
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
        if faults := untrusted(path):
            raise UsageError(*faults)
        data = _parse(_read(path))
    except (OSError, ValueError) as error:
        why = f"{getattr(error, 'strerror', None) or error}; correct it, or BIN_MANIFESTS"
        raise UsageError(f"manifest {path} cannot be read: {why}") from None
    entries: list[dict[str, Any]] = []
    seen: dict[str, str] = {}  # names, and files by the name that has them
    for at, entry in enumerate(data["binaries"]):
        fields, wrong = _fields(entry, settings)
        where = f"manifest {path}: binaries[{at}]"
        if name := fields["name"]:
            where += f" ({name!r})"
            file = os.path.realpath(fields["path"]) if fields["path"] else name
            wrong += ["its name stands twice"] if name in seen else []
            wrong += [f"it shares the file {file} with {seen[file]}"] if seen.get(file, name) != name else []
            seen |= {name: name, file: name}
        faults += [f"{where}: {fault}" for fault in wrong]
        entries.append(fields)
    if faults:
        raise UsageError(*faults)
    return tuple(Binary(**fields) for fields in entries)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} characters")
    return text


def _parse(text: str) -> dict[str, Any]:
    data = parse_json(text)
    if not isinstance(data, dict) or not isinstance(data.get("binaries"), list):
        raise ValueError('it must be an object with a list "binaries"')
    return data


def _fields(entry: Any, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """The fields of a `Binary`, None where the entry breaks a rule, and each rule that it breaks."""
    if not isinstance(entry, dict):
        return {"name": None}, ["it is not an object"]
    fields: dict[str, Any] = {
        "version": "latest",
        "path": os.path.join(settings.bin_dir, str(entry.get("name"))),
        "min_healthy": settings.min_healthy,
        "health_timeout": settings.health_timeout,
        **dict.fromkeys(("services", "health", "verify", "reported")),
    }
    faults = []
    for key, (field, convert, rule) in _KEYS.items():
        if key in entry or key == "name":
            fields[field] = convert(entry.get(key))
            if fields[field] is None:
                faults.append(f"{key} must {rule}".replace("VALUE", repr(str(entry.get(key))[:140])))
    return fields, faults


# What follows takes any JSON value and gives what `Binary` holds of it, or None where it breaks the rule.


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _path(value: Any) -> str | None:
    fits = isinstance(value, str) and value.isprintable() and os.path.isabs(value) and not value.endswith("/")
    return os.path.normpath(value) if fits else None


def _services(value: Any) -> tuple[str, ...] | None:
    names = value if isinstance(value, list) else [value]
    if value is False:
        return ()
    fits = all(isinstance(name, str) and name.isprintable() and _SERVICE.fullmatch(name) for name in names)
    return tuple(names) if names and fits else None


def _seconds(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= 86400 else None


def _arguments(value: Any) -> tuple[str, ...] | None:
    fits = isinstance(value, list) and all(isinstance(word, str) and not _NO_ARGUMENT.search(word) for word in value)
    return tuple(value) if fits and value and value[0] else None


def _health(check: Any) -> HealthCheck | None:
    known = [pair for pair in check.items() if pair[0] in ("tcp", "http", "command")] if isinstance(check, dict) else []
    [(kind, target)] = known if len(known) == 1 else [("", "")]
    if kind == "command":
        words = _arguments(target)
        return HealthCheck(kind, words) if words else None
    if not isinstance(target, str) or not target.isprintable() or " " in target:
        return None
    try:
        parts = urlsplit(target if kind == "http" else f"//{target}")
        is_tcp = kind == "tcp" and parts.port and parts.netloc == target and "@" not in target
        is_http = kind == "http" and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # a port that is none
        return None
    return HealthCheck(kind, target) if parts.hostname and (is_tcp or is_http) else None


_WORDS = "match [A-Za-z0-9][A-Za-z0-9._+-]*, at most 128 characters, not VALUE"
_TIME = "be a number of seconds from 0 to 86400, not VALUE"
_CHECKS = 'be {"tcp": "host:port"}, {"http": "http://…"} or {"command": ["/path", "argument"]}'
# key: (field of Binary, converter, what a value must do)
_KEYS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "name": ("name", _word, _WORDS),
    "version": ("version", _word, _WORDS),
    "path": ("path", _path, "be the absolute path of a file, not VALUE"),
    "service": ("services", _services, 'be "program", "group:program", "group:*", a list of these, or false'),
    "minHealthySeconds": ("min_healthy", _seconds, _TIME),
    "healthTimeout": ("health_timeout", _seconds, _TIME),
    "healthCheck": ("health", _health, _CHECKS),
    "verifyCommand": ("verify", _arguments, 'be a list of arguments, such as ["{file}", "--version"]'),
    "currentMd5": (
        "reported",
        lambda value: (value or "") if isinstance(value, (str, type(None))) else None,
        "be a string",
    ),
}


def record_md5s(path: str, digests: Mapping[str, str]) -> None:
    """Write the MD5 of binaries into the `currentMd5` that their entries have; every other byte stays.

    The manifest is read anew, and looked at again right before it is replaced, so an edit made meanwhile stays.

    Args:
        path: the manifest; where it is a symbolic link, the link stays.
        digests: by binary name. An entry without `currentMd5`, or a name that has gone, is passed over.

    Raises:
        HostError: it cannot be read, understood or written; it is as it was.
    """
    try:
        if not any(_recorded(os.path.realpath(path, strict=True), digests) for _ in range(5)):
            raise ValueError("it keeps changing")
    except (OSError, ValueError) as error:
        raise host_error(f"record the new MD5 in manifest {path}", error) from error


def _recorded(path: str, digests: Mapping[str, str]) -> bool:
    changed, old = os.stat(path).st_ctime_ns, _read(path)
    new = _with_md5s(old, digests)

    def still() -> bool:
        return os.stat(path).st_ctime_ns == changed and _read(path) == old

    return new == old or write_atomically(path, new.encode(), like=path, still=still)


def _with_md5s(text: str, digests: Mapping[str, str]) -> str:
    values = [found.span(2) for found in _MEMBER.finditer(text) if found[2] and json.loads(found[1]) == "currentMd5"]
    # Every second piece is the value of a currentMd5. Some are not of an entry but of what is unknown to us: with its
    # number in the place of each, parsing tells which is where.
    pieces = [text[begin:end] for begin, end in pairwise([0, *(at for span in values for at in span), len(text)])]
    numbered = "".join(f'"{at}"' if at % 2 else piece for at, piece in enumerate(pieces))
    for entry in _parse(numbered)["binaries"]:
        if isinstance(entry, dict) and isinstance(entry.get("currentMd5"), str) and str(entry.get("name")) in digests:
            pieces[int(entry["currentMd5"])] = json.dumps(digests[str(entry["name"])])
    return "".join(pieces)
