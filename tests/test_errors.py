"""Any single system call that fails (disk full, I/O error, read-only, no permission) never breaks a host.

What is drawn here with a fixed seed, `python -m tests.sweep --full --kind errors` does at every point.
"""

from __future__ import annotations

import pytest

from tests.sweep import SCENARIOS, Bench, plan, try_some, try_task


@pytest.mark.parametrize("bench", sorted(SCENARIOS), indirect=True)
def test_a_system_call_that_fails_once_is_told_and_mended(bench: Bench) -> None:
    """The path is whole, the line names the error, nothing good is held, and the next syncs converge."""
    assert try_some(bench, "errors", 5) == 5


@pytest.mark.parametrize("bench", ["rollback"], indirect=True)
def test_an_error_while_cleaning_up_after_a_rollback_by_hand_hides_nothing(bench: Bench) -> None:
    """The staged file cannot be removed either: what is told is why it could not be put in its place."""
    tasks = plan("errors", bench, 9, 7, r"(fsync|rename) \S*\.part and in cleaning up")
    verdicts = [try_task(bench, task) for task in tasks]
    assert len(verdicts) == 2 and all(verdict.reached and not verdict.wrong for verdict in verdicts), verdicts


@pytest.mark.parametrize("bench", sorted(SCENARIOS), indirect=True)
def test_a_file_that_cannot_be_read_once_harms_nothing(bench: Bench) -> None:
    """EIO where bin-proxy only looks: the path is whole, no backup or attribute is lost, the next syncs converge."""
    assert try_some(bench, "reads", 4) == 4
