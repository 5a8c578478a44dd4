"""The words in which a run speaks of a binary: outcomes, kinds of trouble, results, changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["current", "updated", "rolled-back", "held", "paused", "waiting", "failed"]
"""What became of a binary, as `sync --json` prints it."""

Kind = Literal[
    "",
    "answer",
    "corrupt",
    "host",
    "hook",
    "other-file",
    "recovery",
    "release",
    "restart",
    "roll-back",
    "settings",
    "supervisor",
    "tidy",
    "unreachable",
    "unsafe",
]
"""What tells one trouble of a binary from another; empty where there is no trouble."""

SYNC = "sync"
"""The actor of everything that bin-proxy does by itself; an operator acts under a login name."""


@dataclass(frozen=True)
class Result:
    """What became of one binary in this run.

    Args:
        name: of the binary; empty for the host.
        outcome: see `Outcome`.
        ok: the binary is where it should be, or where an operator put it.
        from_md5: what was on the disk.
        to_md5: what is on offer.
        seconds: how long its activation took.
        error: what is wrong and what to do, for people; None where all is well.
        kind: of the trouble.
        note: why, for a person who watches.
        at: Unix time at which a waiting binary is looked at again; None where that is not known.
        last_words: what the failed service said at last.
    """

    name: str
    outcome: Outcome
    ok: bool
    from_md5: str | None = None
    to_md5: str | None = None
    seconds: float = 0.0
    error: str | None = None
    kind: Kind = ""
    note: str = ""
    at: float | None = None
    last_words: str = ""


@dataclass(frozen=True)
class Change:
    """One change of a binary's file, as `history` tells it.

    Args:
        at: Unix time of its end.
        name: of the binary.
        from_md5: the release that was left; None where there was no file.
        to_md5: the release that was tried.
        outcome: "updated" where `to_md5` stayed, "rolled-back" where `from_md5` came back.
        by: "sync", or the operator's login name.
        seconds: how long it took.
        reason: why it failed; empty where it did not.
        last_words: what the failed service said at last.
        entry: Unix time at which its journal entry began, by which a change is told only once.
    """

    at: float
    name: str
    from_md5: str | None
    to_md5: str | None
    outcome: Outcome
    by: str
    seconds: float
    reason: str = ""
    last_words: str = ""
    entry: float = 0.0


def short(md5: str | None) -> str:
    """An MD5 as people read it."""
    return md5[:8] if md5 else "nothing"
