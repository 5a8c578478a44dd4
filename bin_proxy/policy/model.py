"""What is remembered, as plain values: releases, updates in progress, and the last run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

HOLDS_KEPT = 20


@dataclass(frozen=True)
class HealthCheck:
    """`kind` is "tcp", "http" or "command"; `target` is "HOST:PORT", the URL or the argument list."""

    kind: str
    target: str | tuple[str, ...]


@dataclass(frozen=True)
class Binary:
    """One entry. Times are in seconds; `services` is None where the service is found by the binary's name."""

    name: str
    path: str
    min_healthy: float
    health_timeout: float
    version: str = "latest"
    services: tuple[str, ...] | None = None
    health: HealthCheck | None = None
    verify: tuple[str, ...] | None = None
    reported: str | None = None


@dataclass(frozen=True)
class Release:
    """What bin-manager says a binary should be; sha256 and size (in bytes) where it tells them."""

    md5: str
    sha256: str | None = None
    size: int | None = None


@dataclass
class Hold:
    """A release that is not installed again; `by` is "failure" or "operator". `since` is Unix time."""

    md5: str
    reason: str
    since: float
    by: str


@dataclass
class Retry:
    """A release that waits under growing pauses: how often it failed, until when (Unix time), of which kind, why."""

    count: int
    until: float
    kind: str
    reason: str


@dataclass
class Unwell:
    """The previous release, restored after `md5` failed, did not come up: its restart is tried again."""

    md5: str
    count: int
    until: float
    reason: str


@dataclass
class Memory:
    """All that is remembered of one binary.

    Args:
        holds: releases not to install, oldest first.
        retries: by MD5.
        left: by MD5, the Unix times at which that release was left for another.
        strikes: by MD5, how often it and the previous release both failed.
        unwell: set while the service is down and the host is at fault.
        down: processes that bin-proxy left not running, which the next release is to start.
        backups: MD5s of the kept releases, newest first.
        parts: files of unfinished downloads.
        due: by MD5, the Unix time at which its update is due, for --splay.
        updated_at: Unix time of the last change of the installed file.
    """

    holds: list[Hold] = field(default_factory=list)
    retries: dict[str, Retry] = field(default_factory=dict)
    left: dict[str, list[float]] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    unwell: Unwell | None = None
    down: list[str] = field(default_factory=list)
    backups: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    due: dict[str, float] = field(default_factory=dict)
    updated_at: float | None = None

    def hold_on(self, md5: str | None) -> Hold | None:
        """What keeps `md5` away, if something does."""
        return next((hold for hold in self.holds if hold.md5 == md5), None)

    def hold(self, md5: str, reason: str, now: float, by: str = "failure") -> None:
        """Hold `md5`; the last `HOLDS_KEPT` are kept."""
        self.release(md5)
        self.holds = [*self.holds, Hold(md5, reason, now, by)][-HOLDS_KEPT:]

    def release(self, md5: str) -> None:
        """Forget whatever stands against `md5`."""
        self.holds = [hold for hold in self.holds if hold.md5 != md5]
        self.retries.pop(md5, None)
        self.strikes.pop(md5, None)


@dataclass
class Pause:
    """An operator's decision; Unix times, `until` None for no end."""

    reason: str
    since: float
    until: float | None


@dataclass
class Record:
    """One update that has begun. `phase`: "activating", then perhaps "rolling-back".

    Args:
        name: of the binary.
        target: the file that is replaced, links resolved.
        old: MD5 before; None where there was no file.
        new: MD5 to be.
        inode: of the old file, to tell "not swapped yet" from "swapped back".
        processes: supervisor's names of what must run afterwards, with the pid before (0: it did not run).
        healthy: the service was well before.
        probed: its health check applies (it does not where all its processes are stopped).
        by: "sync" or "operator".
        since: Unix time of the beginning.
        fault: "release" or "host" once it failed, with the reason.
    """

    name: str
    target: str
    old: str | None
    new: str
    inode: int
    processes: dict[str, int]
    healthy: bool
    probed: bool
    by: str
    since: float
    phase: str = "activating"
    fault: str = ""
    reason: str = ""


@dataclass
class Memories:
    """What state.json holds: by binary; and of which binaries an earlier one was lost, until their release is known."""

    memories: dict[str, Memory]
    blind: list[str] = field(default_factory=list)


@dataclass
class Pauses:
    """What pauses.json holds: by binary, or "*" for the host."""

    pauses: dict[str, Pause]


class Answer(NamedTuple):
    """What bin-manager named for a version, and when (Unix time)."""

    version: str
    md5: str
    at: float


class Trouble(NamedTuple):
    """What was told of a binary ("": of the host); Unix times of its beginning and of its last line in LOG_FILE."""

    name: str
    text: str
    since: float
    logged: float


class LastSync(NamedTuple):
    """When it ended (Unix time), and its exit code."""

    at: float
    code: int


@dataclass
class Cache:
    """What a loss only makes slower.

    Args:
        digests: by path: device, inode, size, mtime_ns, ctime_ns and the MD5.
        answers: by binary.
        troubles: by what makes one the same as the minute before: binary, kind, release.
        outcomes: by binary, of the last sync that looked at it.
        last_sync: None before the first.
    """

    digests: dict[str, list[int | str]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    last_sync: LastSync | None = None
