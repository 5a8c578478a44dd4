"""What is remembered of each binary, as frozen values. `rules` has the only ways to change one.

state.json holds a `StateFile`. Every word in it is explained here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

HoldBy = Literal["failure", "operator"]
RetryKind = Literal["answer", "corrupt", "host", "hook", "restart", "stop"]


@dataclass(frozen=True)
class Hold:
    """A release that is not installed again by itself.

    Args:
        md5: of the release.
        reason: why, for people.
        since: Unix time.
        by: "failure" (it failed by its own fault) or "operator" (who went back from it).
        last_words: what its service said before it died.
    """

    md5: str
    reason: str
    since: float
    by: HoldBy
    last_words: str = ""


@dataclass(frozen=True)
class Retry:
    """A release that waits under growing pauses.

    Args:
        count: how often it failed in this way.
        until: Unix time of the next try.
        kind: of the failure.
        reason: why, for people.
    """

    count: int
    until: float
    kind: RetryKind
    reason: str


@dataclass(frozen=True)
class ServiceDown:
    """The previous release, restored after `md5` failed, did not come up: its restart is tried again.

    Args:
        md5: the release that failed before.
        count: how often the previous one was started in vain.
        until: Unix time of the next try.
        reason: why the release failed, for people.
    """

    md5: str
    count: int
    until: float
    reason: str


@dataclass(frozen=True)
class BinaryState:
    """All that is remembered of one binary.

    Args:
        holds: releases not to install, oldest first; the last 20.
        retries: by MD5, releases that wait.
        departures: by MD5, the Unix times within the last hour at which that release was left for another.
        strikes: by MD5, how often it and the previous release both failed.
        slow_stops: by MD5, how often a stop outlasted RESTART_TIMEOUT when it was to be started.
        service_down: set while the service is down and the host is at fault.
        stopped_by_us: processes that bin-proxy left not running, which the next release is to start.
        processes: supervisor's names of the processes that were restarted last.
        restarts: Unix times at which bin-proxy restarted the service, within the last day.
        downloads: by MD5, the Unix times within the last hour at which its download began.
        tried: the MD5s that were activated, newest last; the last 40.
        corrupt_in_a_row: how many downloads of whatever MD5 came corrupt since the last one that did not.
        backups: MD5s of the kept releases, newest first.
        parts: paths of unfinished downloads.
        due: by MD5, the Unix time at which its update is due, for --splay.
        updated_at: Unix time of the last change of the installed file.
        resolved: Unix time at which the last resolved journal entry began; it is not counted again.
        other_file: the path that the service executes in the installed one's place; empty where it does not.
    """

    holds: tuple[Hold, ...] = ()
    retries: dict[str, Retry] = field(default_factory=dict)
    departures: dict[str, tuple[float, ...]] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    slow_stops: dict[str, int] = field(default_factory=dict)
    service_down: ServiceDown | None = None
    stopped_by_us: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()
    restarts: tuple[float, ...] = ()
    downloads: dict[str, tuple[float, ...]] = field(default_factory=dict)
    tried: tuple[str, ...] = ()
    corrupt_in_a_row: int = 0
    backups: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    due: dict[str, float] = field(default_factory=dict)
    updated_at: float | None = None
    resolved: float = 0.0
    other_file: str = ""

    def hold_on(self, md5: str | None) -> Hold | None:
        """The hold that keeps `md5` away, if there is one."""
        for hold in self.holds:
            if hold.md5 == md5:
                return hold
        return None


@dataclass(frozen=True)
class StateFile:
    """What state.json holds.

    Args:
        binaries: by name.
        lost: names whose state an earlier, unreadable file held; whatever is offered to them first is held.
        left_manifest: by name, the Unix time at which a binary was first seen to be gone from the manifest.
        manifest: path of the manifest that this STATE_DIR belongs to; empty until the first sync.
    """

    binaries: dict[str, BinaryState] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    left_manifest: dict[str, float] = field(default_factory=dict)
    manifest: str = ""
