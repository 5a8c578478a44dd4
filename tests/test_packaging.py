"""What is installed beside the code: the one-file archive, logrotate's stanza, systemd's units."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import bin_proxy
from tests.conftest import require
from tests.host import Host, eventually, good, md5, running_host
from tests.server import Handler

REPOSITORY = Path(__file__).parent.parent
PACKAGING = REPOSITORY / "packaging"
STORES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")
# Nothing of this Python's site-packages: all that is imported comes from the archive, or from Python itself.
BARE_PYTHON = [sys.executable, "-I", "-S"]


def build(output: Path, *options: str, **environment: str) -> Path:
    command = [sys.executable, str(PACKAGING / "build-pyz"), "--output", str(output), *options]
    subprocess.run(command, check=True, cwd=output.parent, env=os.environ | environment, timeout=200)
    return output


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, as packaging/build-pyz makes it."""
    return build(tmp_path_factory.mktemp("pyz") / "bin-proxy.pyz")


@pytest.fixture
def pyz_host(pyz: Path) -> Iterator[Host]:
    """A host with the service "manager" (v1), on which bin-proxy is the archive; its TMPDIR is `root/tmp`."""
    with running_host("manager") as host:
        host.install("bin-proxy", pyz.read_bytes())
        (host.root / "tmp").mkdir()
        host.settings["TMPDIR"] = str(host.root / "tmp")
        yield host


def run(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*BARE_PYTHON, str(host.bin / "bin-proxy"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=host.environment(), stdin=subprocess.DEVNULL, cwd="/"
    )


def test_pyz_is_one_executable_file_of_pure_python(pyz: Path) -> None:
    """No machine code, so that it runs on every architecture; an executable with a shebang; licences are in it."""
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
    assert {Path(name).suffix for name in names} & {".so", ".pyd", ".pem", ".pyc"} == set()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "__main__.py", "bin_proxy", "certifi", "charset_normalizer", "click", "filelock", "idna", "requests", "urllib3",
    }  # fmt: skip
    assert [name for name in names if name.startswith("urllib3-") and "LICENSE" in name]
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(pyz, os.X_OK)


def test_pyz_runs_without_anything_installed(pyz: Path) -> None:
    """It needs a Python, and no package of it."""
    done = subprocess.run([*BARE_PYTHON, str(pyz), "--version"], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert bin_proxy.__version__ in done.stdout


def test_pyz_is_the_same_for_whoever_builds_it(pyz: Path, tmp_path: Path) -> None:
    """Another day, folder, time zone and umask: the same bytes; with byte code in it, too, and that runs as well."""
    old = os.umask(0o077)
    try:
        again = build(tmp_path / "again.pyz", TZ="Pacific/Kiritimati")
        compiled = build(tmp_path / "compiled.pyz", "--compile")
    finally:
        os.umask(old)
    assert again.read_bytes() == pyz.read_bytes()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import click; print(click.command.__code__.co_filename)"
    told = subprocess.check_output([*BARE_PYTHON, "-c", code, str(compiled)], text=True)
    assert told == "bin-proxy.pyz/click/decorators.py\n"  # what the builder wrote into the byte code


def test_pyz_uses_the_host_s_certificates(pyz: Path) -> None:
    """requests finds the store that the host keeps, not one that lies in the archive."""
    code = f"import sys; sys.path.insert(0, {str(pyz)!r}); import requests.certs; print(requests.certs.where())"
    done = subprocess.run([*BARE_PYTHON, "-c", code], capture_output=True, text=True, check=True)
    store = Path(done.stdout.strip())
    assert str(pyz) not in str(store)
    assert store.exists() or not any(map(os.path.exists, STORES))


def test_pyz_updates_a_service_and_leaves_tmpdir_empty(pyz_host: Host) -> None:
    """A real update; nothing is unpacked into TMPDIR, also where a run is killed."""
    host = pyz_host
    latest = host.server.publish("manager", good("v2"))
    done = run(host, "sync")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.running_md5("manager") == host.reported("manager") == latest

    def never(handler: Handler) -> bool:
        time.sleep(5)
        return False

    host.server.always["*"] = never
    asked = len(host.server.requests)
    killed = subprocess.Popen([*BARE_PYTHON, str(host.bin / "bin-proxy"), "sync"], env=host.environment(), cwd="/")
    eventually(lambda: len(host.server.requests) > asked)
    killed.kill()
    killed.wait()
    assert os.listdir(host.root / "tmp") == []


def shifted(pyz: Path, output: Path) -> bytes:
    """Another release of the archive, in which nothing lies where it lay."""
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(output, "w") as new:
        new.writestr("a", os.urandom(54321))
        for entry in reversed(old.infolist()):
            new.writestr(entry, old.read(entry))
    return b"#!/usr/bin/env python3\n" + output.read_bytes()


@pytest.mark.parametrize("fails", [False, True])
def test_pyz_updates_itself_and_goes_on(pyz_host: Host, pyz: Path, fails: bool) -> None:
    """As an entry of its own manifest it is replaced while it runs; what comes after it is done all the same,
    be it an update or one that is rolled back; and so is the next run."""
    host = pyz_host
    own = host.server.publish("bin-proxy", shifted(pyz, host.root / "new.zip"))
    latest = host.server.publish("manager", b"#!/bin/sh\nexit 1\n" if fails else good("v2"))
    host.write_manifest({"name": "bin-proxy", "service": False, "currentMd5": ""}, "manager")

    def after_bin_proxy(handler: Handler) -> bool:
        eventually(lambda: host.disk_md5("bin-proxy") == own)
        return True

    host.server.always[host.server.download_path("manager")] = after_bin_proxy
    done = run(host, "sync")
    assert "Traceback" not in done.stderr
    assert done.returncode == int(fails), done.stderr
    assert host.disk_md5("bin-proxy") == host.reported("bin-proxy") == own
    assert host.running_md5("manager") == (md5(good("v1")) if fails else latest)
    assert host.strays() == []

    again = run(host, "sync")
    assert (again.returncode, again.stderr) == (int(fails), "")


LATE_IMPORT = """
import os, runpy, sys
archive, other = sys.argv[1:]
sys.argv[1:] = ["--version"]
os._exit = sys.exit  # or nothing would be left that could import
try:
    runpy.run_path(archive, run_name="__main__")
except SystemExit:
    os.replace(other, archive)
from bin_proxy.commands import doctor
"""


def test_pyz_imports_to_its_end_from_the_archive_that_was_started(pyz: Path, tmp_path: Path) -> None:
    """A module that is first needed when the file has been replaced is the one that belongs to what runs."""
    archive, other = tmp_path / "bin-proxy", tmp_path / "other"
    archive.write_bytes(pyz.read_bytes())
    other.write_bytes(shifted(pyz, tmp_path / "new.zip"))
    code = [*BARE_PYTHON, "-c", LATE_IMPORT, str(archive), str(other)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not other.exists()


def test_logrotate_s_stanza_moves_the_log_and_the_next_run_writes_a_new_one(manager_host: Host) -> None:
    """Nothing has to be told that the log was rotated; the new one has the owner and mode of the old one."""
    require("logrotate", "gzip")
    host = manager_host
    stanza = (PACKAGING / "logrotate").read_text()
    assert "\n/var/log/bin-proxy.log {" in stanza
    config = host.root / "logrotate"
    config.write_text(stanza.replace("/var/log/bin-proxy.log", str(host.log_path)))
    config.chmod(0o644)
    rotated = Path(f"{host.log_path}.1")

    for number in (2, 3, 4):
        host.server.publish("manager", good(f"v{number}"))
        assert host.sync().returncode == 0
        assert host.log().count("updated") == 1
        mode = host.log_path.stat().st_mode
        before = host.log()
        subprocess.run(["logrotate", "-f", "-s", str(host.root / "rotated"), str(config)], check=True, timeout=60)
        assert rotated.read_text() == before
        assert host.log_path.stat().st_mode == mode and host.log() == ""
    assert Path(f"{host.log_path}.2.gz").exists()


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((PACKAGING / name).read_text())
    return parser


def test_systemd_s_units_run_sync_every_minute() -> None:
    """A oneshot service, for which "another is at work" is no failure and whose stop reaches bin-proxy alone."""
    service = unit("bin-proxy.service")["Service"]
    assert service["Type"] == "oneshot"
    assert service["ExecStart"] == "/usr/local/bin/bin-proxy sync"
    assert service["SuccessExitStatus"] == "75"
    assert service["KillMode"] == "mixed"
    assert unit("bin-proxy.timer")["Timer"]["OnCalendar"] == "minutely"
    assert unit("bin-proxy.timer")["Install"]["WantedBy"] == "timers.target"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """systemd itself finds nothing to complain of, where it is here to be asked."""
    for name in ("bin-proxy.service", "bin-proxy.timer"):
        text = (PACKAGING / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/bin-proxy", shutil.which("true") or "/bin/true"))
    if not shutil.which("systemd-analyze"):
        return
    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    about_ours = [line for line in (done.stdout + done.stderr).splitlines() if "bin-proxy" in line]
    assert about_ours == []
    assert done.returncode == 0
