"""The journal: one entry for each update that has begun, and what to do with one that was cut off.

An entry is frozen; a phase is entered by writing a new one. Each phase is durable before what it announces begins.

    preparing     beforeCommand is about to run; the host is untouched
    activating    the staged file is about to be put in place
    watching      the service is about to be restarted on the new release, and then watched
    rolling-back  the previous release is about to come back
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["preparing", "activating", "watching", "rolling-back"]
Blame = Literal["", "release", "host", "slow-stop"]


@dataclass(frozen=True)
class JournalEntry:
    """One update, or rollback by hand, that has begun.

    Args:
        name: of the binary.
        target: the file that is replaced, links resolved.
        old_md5: before; None where there was no file.
        new_md5: to be.
        old_inode: of the old file, to tell "not replaced yet" from "put back"; 0 where there was none.
        processes: supervisor's names of what must run afterwards, with the pid before (0: it did not run).
        exited: those of `processes` that had run to their end (EXITED) before.
        healthy_before: the service was well before.
        health_applies: its health check is to pass (not where all its processes are stopped).
        by: "sync", or the operator's login name.
        started_at: Unix time of the beginning; with the name, it tells this entry from every other.
        phase: see the module.
        blame: whose fault it was, once it failed.
        reason: why it failed, for people.
        last_words: what the failed service said at last.
        cut_offs: how often a run that was watching it was cut off.
        hook_ran: beforeCommand has begun, so afterCommand is owed.
        foreign: somebody else put another file in place meanwhile; it stays.
    """

    name: str
    target: str
    old_md5: str | None
    new_md5: str
    old_inode: int
    processes: dict[str, int] = field(default_factory=dict)
    exited: tuple[str, ...] = ()
    healthy_before: bool = True
    health_applies: bool = False
    by: str = "sync"
    started_at: float = 0.0
    phase: Phase = "activating"
    blame: Blame = ""
    reason: str = ""
    last_words: str = ""
    cut_offs: int = 0
    hook_ran: bool = False
    foreign: bool = False
