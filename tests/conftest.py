"""Fixtures, and what a test says where a program it needs is not installed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.host import Host, running_host
from tests.sweep import SCENARIOS, Bench

# Who runs the tests in the background, or under nohup, has these ignored, and so would have every program started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def require(*programs: str) -> None:
    """Skip the test where a program is missing, saying which; in CI that is a failure."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing and os.environ.get("BIN_PROXY_CI"):
        pytest.fail(f"{', '.join(missing)} must be installed here")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def require_root() -> None:
    """Skip the test where it is not run as root; in CI that is a failure."""
    if os.geteuid() != 0:
        if os.environ.get("BIN_PROXY_CI"):
            pytest.fail("must be run as root here")
        pytest.skip("needs root")


@pytest.fixture
def host() -> Iterator[Host]:
    """A host without supervisord; the test makes of it what it needs."""
    made = Host()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def manager_host() -> Iterator[Host]:
    """A host on which supervisord runs the program "manager", release v1, which is what bin-manager has, too."""
    with running_host("manager") as made:
        yield made


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A host in the situation of that name (see tests/sweep.py) on which runs can be killed and calls fail."""
    require("strace")
    require_root()
    made = Bench(SCENARIOS[request.param])
    try:
        yield made
    finally:
        made.close()
