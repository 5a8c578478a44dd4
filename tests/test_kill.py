"""SIGKILL at any system call, to bin-proxy, to supervisorctl or to both, never breaks a host.

What is drawn here with a fixed seed, `python -m tests.sweep --full` does at every point.
"""

from __future__ import annotations

import pytest

from tests.sweep import SCENARIOS, Bench, try_some


@pytest.mark.parametrize("bench", sorted(SCENARIOS), indirect=True)
def test_a_kill_at_any_system_call_is_mended_by_the_next_sync(bench: Bench) -> None:
    """The path is whole all the time, and afterwards file, service and manifest agree, with nothing left behind."""
    assert try_some(bench, "kill", 4) == 4


@pytest.mark.parametrize("bench", ["good", "bad"], indirect=True)
def test_a_kill_of_bin_proxy_and_its_supervisorctl_is_mended(bench: Bench) -> None:
    """Also where supervisorctl died between the stop and the start of a restart."""
    assert try_some(bench, "kill-group", 4) == 4


@pytest.mark.parametrize("bench", ["good", "bad"], indirect=True)
def test_a_kill_of_supervisorctl_alone_stops_no_service(bench: Bench) -> None:
    """bin-proxy, which lives, sees to it that the service runs before it ends."""
    assert try_some(bench, "kill-child", 4) == 4


@pytest.mark.parametrize("bench", ["good", "bad"], indirect=True)
def test_a_kill_at_a_random_moment_is_mended(bench: Bench) -> None:
    """From the first moment of a run to a little after its end."""
    assert try_some(bench, "random", 10) >= 3


@pytest.mark.parametrize("bench", ["good", "bad"], indirect=True)
def test_a_kill_of_the_run_that_cleans_up_after_a_kill_is_mended(bench: Bench) -> None:
    """Recovery can be killed at any system call, too."""
    assert try_some(bench, "recovery", 4) == 4
