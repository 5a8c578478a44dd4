"""A part of a simulated day, in which more happens than on others."""

from __future__ import annotations

import pytest

from tests.day import spend


@pytest.mark.parametrize("seed", [1, 2])
def test_an_eventful_hour(seed: int) -> None:
    """Whatever happens within an hour: files whole, services up, nothing held wrongly, and a good end."""
    day = spend(60, seed, activity=4, seconds=60)
    print(f"seed {seed}: {day.minute} minutes, {dict(day.counts)}")
    assert day.minute > 5
    assert day.counts["updated"] > 2
