"""A power loss at any instant of an update: in what order things reach the disk, and what becomes of what did not."""

from __future__ import annotations

import os
import random

import pytest

from tests.power import Disk, Event, Model, faults, record, try_disk
from tests.sweep import NAME, SCENARIOS, Bench, Goal, sample

# What a loss only makes slower; reading them bears that.
NOT_KEPT = ("cache.json", "lock", "log", "trace")
SEED = 20


def _is_minor(path: str) -> bool:
    name = os.path.basename(path)
    return name in NOT_KEPT or any(name.startswith(f".{minor}.") for minor in NOT_KEPT)


def _is_swap(event: Event, bench: Bench, goal: Goal) -> bool:
    return event.name == "rename" and event.paths == [
        str(bench.host.bin / f".{NAME}.{goal.new}.part"),
        str(bench.target),
    ]


@pytest.mark.parametrize("bench", sorted(SCENARIOS), indirect=True)
def test_everything_reaches_the_disk_before_what_relies_on_it(bench: Bench) -> None:
    """Bytes before their name, record and backup before the swap, the swap before the restart, all before the end."""
    goal, model, events = record(bench)
    host = bench.host
    journal, state = str(host.state / "journal" / f"{NAME}.json"), str(host.state / "state.json")
    backup = str(host.state / "backups" / NAME / goal.old)
    swaps = restarts = ends = 0
    for event in events:
        if event.name == "rename" and not _is_minor(event.paths[1]):
            source = model.names[event.paths[0]]
            assert source.safe == source.now, f"{event.paths} is renamed before its bytes are on the disk"
        if event.name == "rename" and event.paths[1] == str(bench.target):
            assert journal in model.names and model.safe(journal), "the swap comes before the record"
        if _is_swap(event, bench, goal):
            swaps += 1
            if goal.old != "absent":
                assert backup in model.names and model.safe(backup), "the swap comes before the backup"
        if event.name == "execve" and b"restart" in event.strings:
            restarts += 1
            assert model.safe(str(bench.target)), "the restart comes before the swap is on the disk"
        if event.name == "unlink" and event.paths == [journal]:
            ends += 1
            for path in (str(bench.target), str(host.manifest_path), state):
                assert model.safe(path), f"the record goes before {path} is on the disk"
        model.apply(event)
    assert (swaps, ends) == (1, 1) and restarts == (2 if goal.held and goal.old != "absent" else 1)
    for path in [*model.names, journal, *(path for changes in model.pending.values() for c in changes for path in c)]:
        if not _is_minor(path):
            assert model.safe(path), f"{path} is not on the disk in the end"


def _disks(bench: Bench, goal: Goal, model: Model, events: list[Event]) -> list[tuple[Disk, bool]]:
    """Every different disk that a power loss at some instant of the run may leave, and whether the swap came before."""
    chance, swapped = random.Random(SEED), False
    found: dict[object, tuple[Disk, bool]] = {}
    log = str(bench.host.log_path)
    for event in events:
        swapped = swapped or _is_swap(event, bench, goal)
        model.apply(event)
        for disk in model.disks(chance):
            files = frozenset((path, file) for path, file in disk.items() if path != log)
            found.setdefault((files, swapped), (disk, swapped))
    return list(found.values())


@pytest.mark.parametrize("bench", sorted(SCENARIOS), indirect=True)
def test_no_power_loss_leaves_a_disk_from_which_there_is_no_way(bench: Bench) -> None:
    """Whole files, and with a new release its record and its backup, on each disk that a power loss may leave."""
    goal, model, events = record(bench)
    disks = _disks(bench, goal, model, events)
    assert len(disks) > 30
    for disk, swapped in disks:
        wrong = faults(bench, goal, disk, swapped=swapped)
        assert not wrong, (wrong, {path: file.content[:300] for path, file in disk.items() if "/s." not in path})


@pytest.mark.parametrize("bench", ["good", "bad", "elsewhere", "first-bad"], indirect=True)
def test_a_host_that_lost_power_converges(bench: Bench) -> None:
    """The first sync after such a start brings file, service and manifest to one release and leaves nothing behind."""
    goal, model, events = record(bench)
    disks = [disk for disk, _ in _disks(bench, goal, model, events)]
    for disk in sample(disks, int(os.environ.get("BIN_PROXY_DISKS", "6")), SEED):
        wrong = try_disk(bench, goal, disk)
        assert not wrong, (wrong, {path: file.content[:300] for path, file in disk.items() if "/s." not in path})
