"""Every decision, row by row: whose fault a failure is, what is held, what waits and for how long, how to recover."""

from __future__ import annotations

import time
from itertools import product

import pytest

from bin_proxy.policy import plan
from bin_proxy.policy.model import HOLDS_KEPT, Hold, Memory, Record, Retry, Unwell
from bin_proxy.policy.plan import Result, after_failure, decide_recovery, growing_pause, is_due, judge, leave

NOW = 1_700_000_000.0
HOUR = 3600.0
OLD, NEW, OTHER = "0" * 32, "1" * 32, "2" * 32
STRIKES = (0, 1, 2, 3, 20)


def decided(
    memory: Memory, offered: str = NEW, installed: str | None = OLD, now: float = NOW, **more: object
) -> Result:
    return plan.decide("manager", offered, installed, memory, now, **more)  # type: ignore[arg-type]


def until(at: float) -> str:
    return time.strftime("; until %H:%M:%S", time.localtime(at))


# Whose fault a failure is


@pytest.mark.parametrize("strikes", STRIKES)
def test_a_release_that_fails_where_the_previous_one_runs_is_held(strikes: int) -> None:
    """The new release fails, the previous one, restored, comes up healthy: the release's fault, held at once."""
    assert judge("release", had_previous=True, healthy_before=True, came_back=True, strikes=strikes) == "hold"


@pytest.mark.parametrize(("had_previous", "healthy_before"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("came_back", [None, True, False])
@pytest.mark.parametrize("strikes", STRIKES)
def test_a_release_that_fails_with_nothing_to_compare_with_is_held(
    had_previous: bool, healthy_before: bool, came_back: bool | None, strikes: int
) -> None:
    """A first install, or a service that was already unhealthy: the release is held, not tried every minute."""
    verdict = judge(
        "release", had_previous=had_previous, healthy_before=healthy_before, came_back=came_back, strikes=strikes
    )
    assert verdict == "hold"


@pytest.mark.parametrize(("strikes", "verdict"), [(0, "strike"), (1, "strike"), (2, "hold"), (3, "hold"), (20, "hold")])
def test_both_releases_failing_is_the_hosts_fault_until_the_third_time(strikes: int, verdict: str) -> None:
    """The previous release, healthy before, does not come up either: the host's fault; the third time holds."""
    assert judge("release", had_previous=True, healthy_before=True, came_back=False, strikes=strikes) == verdict


@pytest.mark.parametrize("count", range(1, 9))
def test_bytes_that_do_not_match_wait_under_growing_pauses(count: int) -> None:
    """A corrupt download is never held, only fetched again after a pause that grows with each failure."""
    memory = Memory()
    for _ in range(count):
        memory.retries[NEW] = after_failure(memory, NEW, "corrupt", "bytes differ", NOW)
    pause = min(60.0 * 2 ** (count - 1), HOUR)
    assert memory.retries[NEW] == Retry(count, NOW + pause, "corrupt", "bytes differ")
    found = decided(memory)
    assert (found.outcome, found.well, found.kind) == ("waiting", False, "corrupt")
    assert found.note == f"bytes differ{until(NOW + pause)}" and found.note in str(found.error)
    assert decided(memory, now=NOW + pause).outcome == "update"
    assert memory.holds == []


def test_a_release_that_its_verification_refuses_is_held() -> None:
    """verifyCommand exits non-zero: the hold alone keeps the release away, whatever happened before."""
    memory = Memory()
    memory.hold(NEW, "verifyCommand said no", NOW, "failure")
    found = decided(memory)
    assert (found.outcome, found.well, found.note, found.kind) == ("held", False, "verifyCommand said no", "release")


@pytest.mark.parametrize(
    ("had_previous", "healthy_before", "came_back", "strikes"),
    list(product([True, False], [True, False], [True, False, None], STRIKES)),
)
def test_a_release_that_never_ran_is_never_held(
    had_previous: bool, healthy_before: bool, came_back: bool | None, strikes: int
) -> None:
    """A system call, supervisorctl or supervisord that fails is the host's fault alone, in every circumstance."""
    verdict = judge(
        "host", had_previous=had_previous, healthy_before=healthy_before, came_back=came_back, strikes=strikes
    )
    assert verdict == "forgive"


# What a sync does with one binary


@pytest.mark.parametrize("retry_held", [False, True])
def test_the_release_that_is_installed_is_current_whatever_is_remembered(retry_held: bool) -> None:
    """What is on disk is compared first: no hold, pause or splay makes the offered release anything but current."""
    memory = Memory(due={NEW: NOW + 100})
    memory.hold(NEW, "bad", NOW, "failure")
    memory.retries[NEW] = Retry(1, NOW + 60, "corrupt", "bytes differ")
    found = decided(memory, installed=NEW, retry_held=retry_held, splay=200.0)
    assert (found.outcome, found.well, found.error) == ("current", True, None)


@pytest.mark.parametrize("retry_held", [False, True])
def test_the_release_that_is_installed_is_not_well_while_its_service_is_down(retry_held: bool) -> None:
    """The file alone does not make a binary current."""
    found = decided(Memory(unwell=Unwell(NEW, 1, NOW + 60, "down")), installed=NEW, retry_held=retry_held)
    assert (found.outcome, found.well, found.kind, found.note) == ("failed", False, "restart", "down")


@pytest.mark.parametrize("installed", [OLD, None])
def test_another_release_is_an_update(installed: str | None) -> None:
    """A release that differs from the disk, or a file that is absent, is updated at once."""
    found = decided(Memory(), installed=installed)
    assert (found.outcome, found.well, found.kind, found.error) == ("update", True, "", None)


@pytest.mark.parametrize(("by", "well"), [("failure", False), ("operator", True)])
def test_a_held_release_is_not_tried(by: str, well: bool) -> None:
    """A hold for a failure is trouble; a hold by an operator's rollback is where the operator wants the host to be."""
    memory = Memory()
    memory.hold(NEW, "why", NOW - 365 * 86400, by)
    found = decided(memory)
    assert (found.outcome, found.well, found.note) == ("held", well, "why")


def test_an_operators_hold_does_not_make_an_absent_file_well() -> None:
    """A rollback is where the operator wants the host to be; that the file was deleted since is not."""
    memory = Memory()
    memory.hold(NEW, "why", NOW, "operator")
    found = decided(memory, installed=None)
    assert (found.outcome, found.well) == ("held", False)


def test_a_hold_wins_over_a_pause() -> None:
    """A release that is both held and waits is held: its pause's end does not bring it back."""
    memory = Memory(retries={NEW: Retry(1, NOW + 30, "corrupt", "bytes differ")})
    memory.holds.append(Hold(NEW, "bad", NOW, "failure"))
    assert decided(memory).outcome == "held"


@pytest.mark.parametrize("installed", [OLD, None])
def test_an_operator_overrides_holds_and_pauses(installed: str | None) -> None:
    """--retry-held tries a release again whatever stands against it."""
    memory = Memory(unwell=Unwell(NEW, 3, NOW + 600, "down"))
    memory.hold(NEW, "bad", NOW, "failure")
    memory.retries[NEW] = Retry(4, NOW + 480, "flapping", "left often")
    assert decided(memory, installed=installed).outcome == "held"
    assert decided(memory, installed=installed, retry_held=True).outcome == "update"


def test_another_md5_may_always_be_tried_at_once() -> None:
    """Whatever is held, waits or is down because of other releases, the way forward is never blocked."""
    memory = Memory(unwell=Unwell(NEW, 3, NOW + 600, "down"), strikes={NEW: 2, OTHER: 2}, down=["manager"])
    memory.left = {OLD: [NOW - 10, NOW - 5], OTHER: [NOW - 3]}
    for at in range(HOLDS_KEPT):
        memory.hold(f"{at:032x}", "bad", NOW, "failure")
    memory.retries = {f"{at:032x}": Retry(9, NOW + HOUR, "corrupt", "bytes differ") for at in range(5)}
    assert decided(memory, "f" * 32).outcome == "update"


def test_a_release_that_left_both_down_waits_until_the_service_is_healthy() -> None:
    """While the previous release does not run either, the release is not tried again, even after its pause."""
    memory = Memory(unwell=Unwell(NEW, 2, NOW - 600, "nothing listens"))
    found = decided(memory)
    assert (found.outcome, found.well, found.kind) == ("waiting", False, "restart")
    memory.unwell = None
    assert decided(memory).outcome == "update"


# Holds


def test_a_hold_outlives_the_releases_after_it_and_the_last_twenty_are_kept() -> None:
    """Each of the last 20 held releases stays held while others come and go; the 21st drops the oldest."""
    assert HOLDS_KEPT == 20
    memory = Memory()
    names = [f"{at:032x}" for at in range(100, 125)]
    for at, name in enumerate(names):
        memory.hold(name, f"reason {at}", NOW + at, "failure")
    assert [hold.md5 for hold in memory.holds] == names[-20:]
    assert all(decided(memory, name).outcome == "held" for name in names[-20:])
    assert all(decided(memory, name).outcome == "update" for name in names[:5])


def test_a_release_that_is_held_again_stands_once() -> None:
    """Holding a release anew replaces its hold and makes it the youngest, so it is not the next to be forgotten."""
    memory = Memory()
    for name in ("a", "b", "a"):
        memory.hold(name, "again", NOW, "failure")
    assert [hold.md5 for hold in memory.holds] == ["b", "a"]


def test_releasing_forgets_whatever_stands_against_a_release_and_nothing_else() -> None:
    """After a release was accepted, none of its holds, pauses and strikes is left; those of others are."""
    memory = Memory(strikes={NEW: 2, OTHER: 1}, retries={OTHER: Retry(1, NOW + 60, "corrupt", "x")})
    memory.hold(OTHER, "bad", NOW, "failure")
    memory.hold(NEW, "bad", NOW, "failure")
    memory.strikes[NEW] = 2
    memory.release(NEW)
    assert [hold.md5 for hold in memory.holds] == [OTHER]
    assert NEW not in memory.strikes and NEW not in memory.retries
    assert decided(memory).outcome == "update"
    assert decided(memory, OTHER).outcome == "held"


# Pauses, and clocks that jump


def test_pauses_grow_from_a_minute_to_an_hour() -> None:
    """1, 2, 4 … minutes, never more than 1 hour, whatever the count."""
    assert [growing_pause(count) for count in range(1, 9)] == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert {growing_pause(count) for count in (7, 50, 10**6, 10**30)} == {3600.0}
    assert growing_pause(0) == growing_pause(-5) == 60.0


@pytest.mark.parametrize(
    ("ahead", "due"),
    [(-10 * 365 * 86400, True), (-1, True), (0, True), (0.5, False), (60, False), (HOUR, False), (HOUR + 1, True)],
)
def test_a_pause_survives_a_clock_that_jumps(ahead: float, due: bool) -> None:
    """A date more than an hour ahead was written by a clock that has jumped back since: it counts as due."""
    assert is_due(NOW + ahead, NOW) is due


@pytest.mark.parametrize("count", [1, 3, 7, 50])
@pytest.mark.parametrize("jump", [-10 * 365 * 86400, -2 * HOUR, 2 * HOUR, 10 * 365 * 86400])
def test_no_jump_of_the_clock_makes_a_release_wait_for_ever(count: int, jump: float) -> None:
    """Whatever pause is running, a clock that jumps by more than an hour ends it rather than stretches it."""
    memory = Memory(retries={NEW: Retry(count, NOW + growing_pause(count), "corrupt", "x")})
    assert decided(memory, now=NOW + jump).outcome == "update"


def test_a_release_left_twice_within_the_hour_waits_under_growing_pauses() -> None:
    """Two bin-managers that disagree do not restart a service every minute: from the second time on, it waits."""
    memory = Memory()
    leave(memory, NEW, NOW)
    assert decided(memory).outcome == "update"
    for at, (again, pause) in enumerate([(600, 60), (1200, 120), (1800, 240)]):
        leave(memory, NEW, NOW + again)
        found = decided(memory, now=NOW + again)
        assert (found.outcome, found.well) == ("waiting", False), at
        assert found.note.endswith(until(NOW + again + pause)), at
        assert decided(memory, now=NOW + again + pause).outcome == "update"


def test_leaving_one_release_says_nothing_about_another() -> None:
    """Each MD5 is counted by itself."""
    memory = Memory()
    for at, name in enumerate([OLD, NEW, OTHER]):
        leave(memory, name, NOW + at)
    assert not memory.retries


@pytest.mark.parametrize("later", [HOUR, HOUR + 1, 86400])
def test_a_release_left_an_hour_ago_does_not_count(later: float) -> None:
    """Only what was left within the hour counts, and nothing older is remembered."""
    memory = Memory()
    leave(memory, NEW, NOW)
    leave(memory, NEW, NOW + later)
    assert not memory.retries
    assert memory.left == {NEW: [NOW + later]}


def test_a_clock_that_jumped_back_does_not_count_what_it_left_in_the_future() -> None:
    """Times that lie more than an hour ahead are forgotten, not counted for years."""
    memory = Memory(left={NEW: [NOW + 400 * 86400], OTHER: [NOW + 400 * 86400]})
    leave(memory, NEW, NOW)
    assert not memory.retries
    assert memory.left == {NEW: [NOW]}


def test_what_is_left_a_thousand_times_stays_small() -> None:
    """What was left is forgotten after the hour, so the memory does not grow."""
    memory = Memory()
    for minute in range(1000):
        leave(memory, f"{minute:032x}", NOW + 60 * minute)
    assert len(memory.left) <= 61
    for minute in range(1000):
        leave(memory, NEW, NOW + 60 * minute)
    assert memory.retries[NEW].until <= NOW + 60 * 999 + HOUR


# The splay


def test_the_splay_is_the_same_every_time_and_lies_within_its_bounds() -> None:
    """A host's delay depends on the host alone, and scales with what is asked for."""
    for at in range(200):
        once = plan.splay_delay(f"host{at}", 600.0)
        assert once == plan.splay_delay(f"host{at}", 600.0)
        assert 0 <= once < 600
        assert plan.splay_delay(f"host{at}", 1200.0) == pytest.approx(2 * once)
    assert plan.splay_delay("host", 0.0) == 0.0


def test_the_splay_spreads_a_fleet_evenly() -> None:
    """Of 10,000 hosts each tenth of the time gets about a tenth (chi-square over 10 bins, p > 0.0001)."""
    bins = [0] * 10
    for at in range(10_000):
        bins[int(plan.splay_delay(f"web-{at}.example", 600.0) // 60)] += 1
    assert sum((found - 1000) ** 2 / 1000 for found in bins) < 33.7, bins


@pytest.mark.parametrize(
    ("due", "outcome"), [(NOW + 1, "waiting"), (NOW, "update"), (NOW - 86400, "update"), (NOW + 300, "waiting")]
)
def test_an_update_waits_until_it_is_due(due: float, outcome: str) -> None:
    """Before that it waits, which is no trouble."""
    found = decided(Memory(due={NEW: due}), splay=600.0)
    assert found.outcome == outcome
    assert found.well
    assert outcome == "update" or found.note.endswith(until(due))


def test_an_update_is_due_at_a_delay_after_it_was_first_seen() -> None:
    """Seen again, it is due when it was, also where others were offered, or installed, in between."""
    memory = Memory()
    assert plan.note_due(memory, NEW, OLD, NOW, 900.0, 140.0)
    assert memory.due == {NEW: NOW + 140}
    for minute in range(1, 30):
        offered, installed = [(OTHER, OLD), (NEW, OLD), (OLD, OLD)][minute % 3]
        assert plan.note_due(memory, offered, installed, NOW + 60 * minute, 900.0, 140.0) == (minute == 3)
    assert memory.due == {NEW: NOW + 140, OTHER: NOW + 180 + 140}


def test_a_release_that_comes_back_much_later_is_spread_anew() -> None:
    """Else a fleet that goes back to an earlier release would restart in step; one that is still offered is not."""
    memory = Memory()
    plan.note_due(memory, NEW, OLD, NOW, 900.0, 140.0)
    plan.note_due(memory, NEW, OLD, NOW + 86400, 900.0, 140.0)
    assert memory.due == {NEW: NOW + 140}
    plan.note_due(memory, NEW, NEW, NOW + 86400, 900.0, 140.0)
    assert memory.due == {}


def test_without_a_splay_nothing_is_noted() -> None:
    """A run by hand neither waits nor begins anybody's time."""
    memory = Memory()
    assert not plan.note_due(memory, NEW, OLD, NOW, 0.0, 0.0) and memory.due == {}
    assert decided(Memory(due={NEW: NOW + 100})).outcome == "update"


def test_a_splay_survives_a_clock_that_jumped_back() -> None:
    """A date in the far future does not put the update off until then."""
    assert decided(Memory(due={NEW: NOW + 400 * 86400}), splay=600.0).outcome == "update"


def test_the_splay_waits_only_for_what_would_be_tried() -> None:
    """A held release is held, not waiting, and what waits for its pause says so."""
    memory = Memory(retries={OTHER: Retry(1, NOW + 60, "corrupt", "bytes differ")})
    memory.due = {NEW: NOW + 300, OTHER: NOW + 300}
    memory.hold(NEW, "bad", NOW, "failure")
    assert decided(memory, splay=600.0).outcome == "held"
    assert decided(memory, OTHER, splay=600.0).note.startswith("bytes differ")


# Recovery

STEPS = {
    # (phase, what lies on the disk, untouched): step
    ("activating", "old", True): "forget",
    ("activating", "old", False): "undo",
    ("activating", "new", True): "finish",
    ("activating", "new", False): "finish",
    ("activating", "nothing", True): "undo",
    ("activating", "nothing", False): "undo",
    ("activating", "another", True): "check",
    ("activating", "another", False): "check",
    ("rolling-back", "old", True): "undo",
    ("rolling-back", "old", False): "undo",
    ("rolling-back", "new", True): "undo",
    ("rolling-back", "new", False): "undo",
    ("rolling-back", "nothing", True): "undo",
    ("rolling-back", "nothing", False): "undo",
    ("rolling-back", "another", True): "check",
    ("rolling-back", "another", False): "check",
}


def interrupted(phase: str, old: str | None) -> Record:
    return Record("manager", "/bin/manager", old, NEW, 1, {"manager": 7}, True, True, "sync", NOW, phase)


@pytest.mark.parametrize(("phase", "on_disk", "untouched"), list(STEPS))
def test_every_interruption_has_its_way_back(phase: str, on_disk: str, untouched: bool) -> None:
    """Decided by the phase and what lies on the disk: forget, finish, undo, or leave somebody else's file alone."""
    digest = {"old": OLD, "new": NEW, "nothing": None, "another": OTHER}[on_disk]
    assert decide_recovery(interrupted(phase, OLD), digest, untouched=untouched) == STEPS[phase, on_disk, untouched]


@pytest.mark.parametrize(("phase", "on_disk", "untouched"), [key for key in STEPS if key[1] != "old"])
def test_every_interrupted_first_install_has_its_way_back(phase: str, on_disk: str, untouched: bool) -> None:
    """Where there was no file before, an absent file is the old state."""
    digest = {"new": NEW, "nothing": None, "another": OTHER}[on_disk]
    key = "old" if on_disk == "nothing" else on_disk
    assert decide_recovery(interrupted(phase, None), digest, untouched=untouched) == STEPS[phase, key, untouched]


@pytest.mark.parametrize("old", [OLD, None])
@pytest.mark.parametrize("untouched", [True, False])
def test_a_release_given_up_is_never_finished(old: str | None, untouched: bool) -> None:
    """Once the roll-back has begun, the failed release is not accepted after all, whatever lies on the disk."""
    for digest in (OLD, NEW, OTHER, None):
        assert decide_recovery(interrupted("rolling-back", old), digest, untouched=untouched) in ("undo", "check")
