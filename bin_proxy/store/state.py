"""The durable memory: the files of STATE_DIR, read and written.

journal/NAME.json   one update (or rollback) of NAME has begun and is not resolved; fsynced before the host changes
state.json          holds, growing pauses: what must survive; fsynced, written when it changes
pauses.json         operators' pauses; fsynced, written without the lock
cache.json          digests, last answers, troubles told: what a loss only makes slower; written every run
backups/NAME/MD5    previous releases (see slot)
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from bin_proxy.config.manifest import parse_json
from bin_proxy.errors import host_errors
from bin_proxy.host.files import fsync_folder, make_folder, temporary_of, write_atomically
from bin_proxy.policy.model import Cache, Memories, Memory, Pause, Pauses, Record

VERSION = 1
_LARGEST = 64 * 1024 * 1024
_END_OF_TIME = 1e11  # in the year 5138; no clock of ours wrote it, and no calendar can show what is far beyond


_hints = cache(get_type_hints)  # they are parsed anew at each call, and a thousand binaries have as many


def decode(kind: Any, value: Any) -> Any:
    """Build a value of the type `kind`, dataclasses and named tuples included, from what JSON gave.

    Raises:
        ValueError: it is of another shape.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        for choice in arguments:
            with suppress(ValueError):
                return decode(choice, value)
    elif origin is list and isinstance(value, list):
        return [decode(arguments[0], item) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item) for key, item in value.items()}
    elif isinstance(kind, type) and issubclass(kind, tuple) and isinstance(value, list):
        hints = _hints(kind)
        if len(value) == len(hints):
            return kind(*map(decode, hints.values(), value))
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        with suppress(TypeError):  # one without a default is absent; what is unknown is of a later version
            return kind(**{key: decode(hint, value[key]) for key, hint in hints.items() if key in value})
    elif kind is float and type(value) in (int, float):
        if 0 <= value < _END_OF_TIME:
            return value
    elif type(value) is kind:
        return value
    raise ValueError("it is not what bin-proxy writes")


class State:
    """STATE_DIR, read once. Only the holder of the lock may call what writes.

    Args:
        folder: STATE_DIR.
        known: the binaries of the manifest, which are the ones concerned where the memory cannot be read.
    """

    def __init__(self, folder: str, known: tuple[str, ...]) -> None:
        self.folder = folder
        self.unreadable: list[tuple[str, str]] = []
        self._content: dict[str, bytes] = {}  # of the files, as far as it is known
        self.cache: Cache = self._load("cache.json", Cache) or Cache()
        found = self._load("state.json", Memories) or Memories({})
        self.memories: dict[str, Memory] = found.memories
        self.blind: list[str] = list(known) if "state.json" in dict(self.unreadable) else found.blind
        for name in set(self.blind) & self.cache.answers.keys():
            self.hold_blindly(name, self.cache.answers[name].md5)
        self.load_pauses()
        self.records: dict[str, Record | None] = {}
        with suppress(FileNotFoundError):
            for file in sorted(os.listdir(self._path("journal"))):
                if file.endswith(".json"):
                    self.records[file.removesuffix(".json")] = self._load(f"journal/{file}", Record)

    def hold_blindly(self, name: str, md5: str) -> None:
        """Hold what was on offer when the memory was lost: it may have been held before."""
        self.blind.remove(name)
        self.memory(name).hold(md5, "the state file could not be read, so it may have been held before", time.time())

    def _path(self, file: str) -> str:
        return os.path.join(self.folder, file)

    def _load(self, file: str, kind: Any) -> Any:
        """The file's content; None where it is absent, or unreadable, which is noted."""
        path = self._path(file)
        try:
            with host_errors(f"read {path}"), suppress(FileNotFoundError), open(path, "rb") as opened:
                raw = opened.read(_LARGEST)
                if not raw and kind is Cache:  # nobody waited for the disk to have it, and the power failed
                    return None
                data = parse_json(raw.decode())
                if not isinstance(data, dict) or data.pop("version", None) != VERSION:
                    raise ValueError("it is of another version of bin-proxy")
                found = decode(kind, data)
                if kind is Record and file != f"journal/{found.name}.json":
                    raise ValueError(f"it is of {found.name[:140]!r}")
                self._content[file] = raw
                return found
            if os.path.islink(path):
                raise ValueError("it is a link that leads nowhere")
        except ValueError as error:
            self.unreadable.append((file, str(error)))
        return None

    def set_aside(self) -> list[str]:
        """Keep each unreadable file under a second name, told once; the first is free to be written.

        A record stays as it is until it is resolved: that something was begun is all that is known of it.

        Returns:
            one line for each that was not told before.

        Raises:
            HostError: one cannot be kept.
        """
        lines = []
        for file, why in self.unreadable:
            path = self._path(file)
            with host_errors(f"set the unreadable {path} aside"):
                aside = f"{path}.unreadable-{os.lstat(path).st_ino}"
                if os.path.lexists(aside):
                    continue
                os.link(path, aside, follow_symlinks=False)
            lines.append(f"{path} cannot be read ({why}); kept as {aside}")
            if file == "pauses.json":
                lines[-1] += "; all binaries are paused until bin-proxy resume"
                self.pauses["*"] = Pause("what was paused could not be read", time.time(), None)
                self.save_pauses()
        return lines

    def prepare(self) -> None:
        """Make what must exist, and remove what a killed run left half-written.

        Raises:
            HostError: STATE_DIR is not to be had.
        """
        with host_errors(f"use the state folder {self.folder}"):
            make_folder(self._path("journal"), 0o755)
            make_folder(self._path("backups"), 0o700)
            os.chmod(self._path("backups"), 0o700)
            strays = [self._path(file) for file in os.listdir(self.folder)]
            strays += [self._path(f"journal/{file}") for file in os.listdir(self._path("journal"))]
            being_written = temporary_of(self._path("pauses.json"))  # by an operator, right now
            for stray in strays:
                if stray.endswith(".tmp") and stray != being_written:
                    os.unlink(stray)

    def memory(self, name: str) -> Memory:
        """What is remembered of a binary; changes to it are kept by `save`."""
        return self.memories.setdefault(name, Memory())

    def load_pauses(self) -> None:
        """Read the operator's pauses in force, which may have come while a sync was at work."""
        found = self._load("pauses.json", Pauses)
        kept = found.pauses.items() if found else ()
        self.pauses = {key: pause for key, pause in kept if pause.until is None or time.time() < pause.until}

    def save_pauses(self) -> None:
        """Make the operator's pauses durable.

        Raises:
            HostError: they are as they were.
        """
        self._write("pauses.json", Pauses(self.pauses))

    def pause_of(self, name: str) -> tuple[Pause | None, str]:
        """The operator's pause of a binary, or of the whole host, and what ends it."""
        if pause := self.pauses.get(name):
            return pause, f"bin-proxy resume {name} ends it"
        return self.pauses.get("*"), "bin-proxy resume ends it"

    def save(self) -> None:
        """Make the memories durable, if they changed.

        Raises:
            HostError: they are as they were.
        """
        kept = {name: memory for name, memory in self.memories.items() if memory != Memory()}
        self._write("state.json", Memories(kept, self.blind))

    def save_cache(self, *, durable: bool) -> None:
        """Write the cache.

        Args:
            durable: wait for the disk, which a minute in which nothing changed need not.

        Raises:
            HostError: it is as it was.
        """
        self._write("cache.json", self.cache, durable=durable)

    def write_record(self, record: Record) -> None:
        """Make an update's record durable, new or changed.

        Raises:
            HostError: it is as it was.
        """
        self._write(f"journal/{record.name}.json", record)
        self.records[record.name] = record

    def close_record(self, name: str) -> None:
        """The update is resolved: forget its record, durably.

        Raises:
            HostError: it may still be there.
        """
        path = self._path(f"journal/{name}.json")
        with host_errors(f"close the record {path}"):
            with suppress(FileNotFoundError):
                os.unlink(path)
            fsync_folder(os.path.dirname(path))
        self.records.pop(name, None)

    def _write(self, file: str, content: Memories | Pauses | Cache | Record, *, durable: bool = True) -> None:
        path, data = self._path(file), json.dumps({"version": VERSION, **vars(content)}, default=vars).encode()
        if data != self._content.get(file):
            with host_errors(f"write {path}"):
                write_atomically(path, data, durable=durable)
            self._content[file] = data
