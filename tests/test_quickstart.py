"""The quickstart does what it tells, on a fresh clone, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require, require_root
from tests.host import eventually

REPOSITORY = Path(__file__).parent.parent
NOT_IN_A_CLONE = shutil.ignore_patterns(".git", ".venv", "*cache*", "*.egg-info", "build", ".hypothesis")


class Clone:
    """A copy of the repository, and a quickstart that runs from it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        self.temporary = folder / "t"
        self.home = folder / "home"
        shutil.copytree(REPOSITORY, self.root, ignore=NOT_IN_A_CLONE)
        for made in (self.temporary, self.home):
            made.mkdir()
        self.path = os.environ["PATH"]
        self.prefix: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def start(self) -> subprocess.Popen[str]:
        pip = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}
        pip |= {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, str(self.root / "examples" / "quickstart")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**pip, "PATH": self.path, "TMPDIR": str(self.temporary), "HOME": str(self.home)},
        )
        return self.process

    def run(self) -> tuple[int, str]:
        process = self.start()
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def left(self) -> list[str]:
        """Files and processes of a quickstart that has ended."""
        found = [str(path) for path in self.temporary.iterdir()]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if os.fsencode(self.temporary) in path.read_bytes():
                    found.append(path.read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                pass
        return found


@pytest.fixture
def clone() -> Iterator[Clone]:
    """A fresh clone in a folder with a short path."""
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/qXXXXXX"], text=True).strip())
    folder.chmod(0o755)
    made = Clone(folder)
    try:
        yield made
    finally:
        if made.process and made.process.poll() is None:
            made.process.terminate()
            made.process.communicate(timeout=60)
        shutil.rmtree(folder)


def went_well(code: int, output: str) -> None:
    """Everything that a reader is shown is there, and the figures agree with each other."""
    assert code == 0, output
    assert "All went as it should" in output
    assert "Everything that was started is stopped, and the folder is removed." in output
    published = re.findall(r"^published: release (\d).* \(MD5 ([0-9a-f]{32})\)$", output, re.M)
    assert [number for number, _ in published] == ["1", "2", "3", "4"]
    assert len({md5 for _, md5 in published}) == 4
    first, second, _, fourth = (md5 for _, md5 in published)
    update = re.search(r"^before: pid (\d+) executed MD5 (\w+)\nafter:  pid (\d+) executes MD5 (\w+)$", output, re.M)
    assert update and update[1] != update[3] and (update[2], update[4]) == (first, second)
    runs = re.findall(r"^hello: (\w+), (?:no process|pid \d+, executes MD5 (\w+))$", output, re.M)
    assert runs == [("FATAL", ""), ("RUNNING", first), ("RUNNING", second), ("RUNNING", fourth)]
    assert re.findall(r"^exit code (\d+)$", output, re.M) == ["0", "0", "1", "1", "0"]
    assert re.search(r"^downloads since: 0; pid before (\d+), after \1$", output, re.M)
    assert re.search(rf"^hello +current +{fourth[:8]} ", output, re.M)


def test_quickstart_shows_an_install_an_update_and_a_roll_back(clone: Clone) -> None:
    """One command shows what bin-proxy is for, and leaves clone and machine as they were."""
    before = clone.files()
    code, output = clone.run()
    went_well(code, output)
    assert clone.left() == []
    assert clone.files() == before


def test_quickstart_needs_neither_root_nor_a_sleep_of_its_own(clone: Clone) -> None:
    """It runs as an ordinary user, from a clone that is not theirs, where sleep is not a program of its own."""
    require("setpriv")
    require_root()
    shims = clone.root.parent / "shims"
    shims.mkdir()
    (shims / "sleep").write_text(f'#!/bin/sh\nexec {shutil.which("sleep")} "$@"\n')
    (shims / "sleep").chmod(0o755)
    clone.path = f"{shims}:{clone.path}"
    for folder in (clone.temporary, clone.home):
        os.chown(folder, 65534, 65534)
    # The Python of these tests may lie in root's home: this user may read everything, and write only what is theirs.
    capability = "+dac_read_search"
    clone.prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    clone.prefix += [f"--inh-caps=-all,{capability}", f"--ambient-caps=-all,{capability}"]
    went_well(*clone.run())
    assert clone.left() == []


def test_quickstart_tidies_up_after_ctrl_c(clone: Clone) -> None:
    """Ctrl-C, which every process of the terminal gets, in the middle of an update: nothing is left behind."""
    process = clone.start()
    eventually(lambda: list(clone.temporary.glob("bp-*/state/journal/*")), 200)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Stopped.\nEverything that was started is stopped" in output
    assert clone.left() == []


def test_quickstart_fails_where_bin_proxy_does_not_do_its_work(clone: Clone) -> None:
    """A bin-proxy that does nothing and says that all is well is found out."""
    (clone.root / "bin_proxy" / "cli.py").write_text("def main():\n    pass\n")
    code, output = clone.run()
    assert code == 1
    assert "FAILED: the service is FATAL" in output
    assert clone.left() == []
