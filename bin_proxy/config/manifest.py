"""What a valid manifest is, and how to record the MD5 of one binary in it and change nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from bin_proxy.config.settings import Settings, is_url
from bin_proxy.config.trust import read_trusted
from bin_proxy.errors import UsageError
from bin_proxy.policy.model import Binary, HealthCheck

_NO_ARGUMENT = re.compile(r"[\0\ud800-\udfff]")  # what execve(2) cannot be given


def parse_json(text: str) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN, no nesting that exhausts the stack.

    Raises:
        ValueError: with what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key occurs twice in {str(found)[:80]!r}")
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
        listed = entries_of(read_trusted("BIN_MANIFESTS", path))
    except ValueError as error:
        raise UsageError(f"manifest {path} cannot be read: {error}; correct it, or BIN_MANIFESTS") from None
    faults: list[str] = []
    entries: list[dict[str, Any]] = []
    seen: dict[str, int] = {}  # the names and files there are, and the first entry that has each
    for at, entry in enumerate(listed):
        fields, wrong = _fields(entry, settings)
        if name := fields["name"]:
            file = os.path.realpath(fields["path"]) if fields["path"] else name
            for thing in (name, file):
                if seen.setdefault(thing, at) != at:
                    wrong.append(f"it shares {thing} with binaries[{seen[thing]}]")
        faults += [f"manifest {path}: binaries[{at}] ({name!r}): {fault}" for fault in wrong]
        entries.append(fields)
    if faults:
        raise UsageError(*faults)
    return tuple(Binary(**fields) for fields in entries)


def entries_of(text: str) -> list[Any]:
    data = parse_json(text)
    if not isinstance(data, dict) or not isinstance(data.get("binaries"), list):
        raise ValueError('it must be an object with a list "binaries"')
    return list(data["binaries"])


def _fields(entry: Any, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """The fields of a `Binary`, None where the entry breaks a rule, and each rule that it breaks."""
    if not isinstance(entry, dict):
        return {"name": None}, ["it is not an object"]
    fields: dict[str, Any] = {
        "path": os.path.join(settings.bin_dir, str(entry.get("name"))),
        "min_healthy": settings.min_healthy,
        "health_timeout": settings.health_timeout,
    }
    faults = []
    for key, (field, convert, rule) in _KEYS.items():
        if key in entry or key == "name":
            fields[field] = convert(entry.get(key))
            if fields[field] is None:
                faults.append(f"{key} must be {rule}, not {str(entry.get(key))[:140]!r}")
    return fields, faults


# What follows takes any JSON value and gives what `Binary` holds of it, or None where it breaks the rule.


def _words(pattern: str) -> Callable[[Any], str | None]:
    """A converter of printable strings that match."""

    def convert(value: Any) -> str | None:
        fits = isinstance(value, str) and value.isprintable() and re.fullmatch(pattern, value)
        return value if fits else None

    return convert


_word = _words(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_path = _words(r"/.*[^/]")
_service = _words(r"[^\s:*]+(:(\*|[^\s:*]+))?")


def _services(value: Any) -> tuple[str, ...] | None:
    if value is False:
        return ()
    names = value if isinstance(value, list) else [value]
    return tuple(names) if names and all(map(_service, names)) else None


def _seconds(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value <= 86400 else None


def _arguments(value: Any) -> tuple[str, ...] | None:
    fits = isinstance(value, list) and all(isinstance(word, str) and not _NO_ARGUMENT.search(word) for word in value)
    return tuple(value) if fits and value and value[0] else None


def _health(check: Any) -> HealthCheck | None:
    known = {"tcp", "http", "command"}.intersection(check) if isinstance(check, dict) else set()
    if len(known) != 1:
        return None
    kind = known.pop()
    target = check[kind]
    if kind == "command":
        words = _arguments(target)
        return HealthCheck(kind, words) if words else None
    fits = isinstance(target, str) and is_url(target if kind == "http" else f"http://{target}")
    if fits and kind == "tcp":
        fits = re.fullmatch(r".+:[0-9]+", target) is not None
    return HealthCheck(kind, target) if fits else None


def _reported(value: Any) -> str | None:
    return value or "" if isinstance(value, (str, type(None))) else None


_WORDS = "[A-Za-z0-9][A-Za-z0-9._+-]*, at most 128 characters"
_TIME = "a number of seconds from 0 to 86400"
_CHECKS = '{"tcp": "host:port"}, {"http": "http://…"} or {"command": ["/path", "argument"]}'
# key: (field of Binary, converter, what a value must be)
_KEYS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "name": ("name", _word, _WORDS),
    "version": ("version", _word, _WORDS),
    "path": ("path", _path, "the absolute path of a file"),
    "service": ("services", _services, '"program", "group:program", "group:*", a list of these, or false'),
    "minHealthySeconds": ("min_healthy", _seconds, _TIME),
    "healthTimeout": ("health_timeout", _seconds, _TIME),
    "healthCheck": ("health", _health, _CHECKS),
    "verifyCommand": ("verify", _arguments, 'a list of arguments, such as ["{file}", "--version"]'),
    "currentMd5": ("reported", _reported, "a string"),
}
