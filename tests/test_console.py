"""What an operator meets at the console: status, rollback, pause, doctor, metrics, splay, help."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bin_proxy.cli import cli
from bin_proxy.policy.plan import splay_delay
from tests.conftest import require, require_root
from tests.faults import answering
from tests.host import Host, dies_at_once, eventually, good, md5, running, running_host
from tests.server import BinManagerServer, Handler

REPOSITORY = Path(__file__).parent.parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
KEYS = {"name", "path", "version", "state", "installedMd5", "latestMd5", "currentMd5", "service"}
KEYS |= {"held", "paused", "retryAt", "updatedAt", "backups", "error"}
FILE = {"version": "latest", "currentMd5": "", "service": False}


def status(host: Host, *arguments: str, **settings: str) -> dict[str, dict[str, Any]]:
    """The rows of `status --json`, by name."""
    done = host.run("status", "--json", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["binaries"]}


def table(host: Host, *arguments: str) -> str:
    done = host.run("status", *arguments)
    assert done.returncode == 0 and not done.stderr
    return done.stdout


def well(host: Host, *arguments: str) -> bool:
    """What `status --check` says by its exit code."""
    code = host.run("status", "--check", *arguments).returncode
    assert code in (0, 1)
    return code == 0


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder, with its content and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path)] = (about.st_mode, about.st_uid, about.st_ino, about.st_mtime_ns, content)
    return found


def on_terminal(host: Host, *arguments: str, columns: int = 80, until: str = "", **settings: str) -> tuple[int, str]:
    """Run bin-proxy on a terminal; returns its exit code and all that it sent there. Ctrl-C comes after `until`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = host.environment(**{"TERM": "xterm-256color", **settings})
    command = host.command(*arguments)
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # EIO: nobody holds the terminal any more
        while chunk := os.read(ours, 65536):
            seen += chunk
            if until and until.encode() in seen:
                process.send_signal(signal.SIGINT)
                until = ""
    os.close(ours)
    text = seen.decode()
    assert "Traceback" not in text, text
    return process.wait(30), text


def screen(raw: str) -> list[str]:
    """What stands on a wide terminal in the end: the last of what was written over each line."""
    lines = CONTROL.sub("", raw).replace("\r\n", "\n").split("\n")
    return [line.rsplit("\r", 1)[-1].rstrip() for line in lines]


def drip(seconds: float, steps: int = 20) -> Any:
    """A behaviour that sends a release slowly."""

    def behave(handler: Handler) -> bool:
        name = handler.path.split("/")[-2]
        release = handler.server.owner.releases["latest", name]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(release)))
        handler.end_headers()
        size = -(-len(release) // steps)
        for at in range(0, len(release), size):
            handler.wfile.write(release[at : at + size])
            time.sleep(seconds / steps)
        return False

    return behave


def stubborn(tag: str) -> bytes:
    """A release that ignores SIGTERM, so that its restart takes stopwaitsecs."""
    return f"#!/bin/sh\n# {tag}\ntrap '' TERM\nwhile :; do sleep 0.2; done\n".encode()


def exchange(host: Host, name: str, data: bytes) -> None:
    """Put another file in the place of a running one, by hand, and restart its service."""
    host.install("fresh", data)
    (host.bin / "fresh").rename(host.bin / name)
    host.ctl("restart", name)
    host.await_running(name)


# status


@pytest.fixture(scope="module")
def zoo() -> Iterator[Host]:
    """A host that has a binary in each state that needs no service; tests may only look at it."""
    host = Host()
    try:
        names = ("current", "outdated", "missing", "unknown", "paused", "held", "left")
        for name in names:
            host.install(name, good("v1"))
            host.server.publish(name, good("v1"))
        host.write_manifest(*({"name": name, **FILE} for name in names))
        assert host.sync().returncode == 0
        host.server.publish("left", good("v2"))
        assert host.sync().returncode == 0
        assert host.run("rollback", "left").returncode == 0
        entries = json.loads(host.manifest_path.read_text())
        entries["binaries"][5]["verifyCommand"] = ["/bin/false"]
        host.manifest_path.write_text(json.dumps(entries))
        host.server.publish("held", good("v2"))
        assert host.sync().returncode == 1
        assert host.run("pause", "paused", "--reason", "INC-42, ask \x1b[31mWei").returncode == 0
        for name in ("outdated", "paused"):
            host.server.publish(name, good("v3"))
        (host.bin / "missing").unlink()
        del host.server.releases["latest", "unknown"]
        yield host
    finally:
        host.close()


STATES = {
    "current": ("current", "current", True),
    "outdated": ("outdated", "outdated", False),
    "missing": ("missing", "missing", False),
    "unknown": ("unknown", "unknown", False),
    "paused": ("paused", "paused", True),
    "held": ("held", "held", False),
    "left": ("held", "held by operator", True),
}


def test_states_in_json(zoo: Host) -> None:
    """Each binary has its state, and each row the promised keys, with null for what is not known."""
    done = zoo.run("status", "--json")
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["binaries"]}
    assert {name: row["state"] for name, row in rows.items()} == {name: state for name, (state, _, _) in STATES.items()}
    assert all(row.keys() == KEYS for row in rows.values()) and found.keys() == {"binaries", "lastSync"}
    assert found["lastSync"].keys() == {"at", "exitCode"} and found["lastSync"]["exitCode"] == 1
    assert all(row["service"] is None for row in rows.values())
    assert rows["unknown"]["latestMd5"] is None and "404" in rows["unknown"]["error"]
    assert rows["missing"]["installedMd5"] is None and rows["missing"]["latestMd5"] == md5(good("v1"))
    assert rows["left"]["backups"] == [md5(good("v2"))] and rows["left"]["installedMd5"] == md5(good("v1"))
    held = rows["held"]["held"]
    assert held.keys() == {"md5", "reason", "since"} and held["md5"] == md5(good("v2"))
    assert "/bin/false" in held["reason"] and rows["current"]["held"] is None
    paused = rows["paused"]["paused"]
    assert paused.keys() == {"reason", "since", "until"} and paused["until"] is None
    times = [held["since"], paused["since"], rows["left"]["updatedAt"], found["lastSync"]["at"]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", at) for at in times), times


def test_states_in_the_table(zoo: Host) -> None:
    """One row a binary tells its state in words and short MD5s; why, and what to type, stands below."""
    text = table(zoo)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for name, (_, words, _) in STATES.items():
        assert re.search(rf"^{name} +{words} +([0-9a-f]{{8}}|-) ", lines[name]), lines[name]
    assert not re.search(r"[0-9a-f]{9}", re.sub(r"/[\w./]+", "", text))
    assert re.search(r"^held: .*/bin/false", text, re.M)
    assert re.search(r"^held: .*bin-proxy sync --only held --retry-held", text, re.M)
    assert re.search(r"^left: .*bin-proxy sync --only left --retry-held", text, re.M)
    assert re.search(r"^paused: .*INC-42, ask .*Wei.*bin-proxy resume paused", text, re.M)
    assert re.search(r"^unknown: .*404", text, re.M)
    assert not re.search("^current:", text, re.M)
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ("outdated", "missing"))
def test_status_says_what_to_type(zoo: Host, name: str) -> None:
    """A binary that waits for its sync says how to have it now."""
    assert f"bin-proxy sync --only {name}" in table(zoo, "--only", name)


def test_check(zoo: Host) -> None:
    """--check takes an operator's decision for well, and a failure not."""
    assert {name: well(zoo, "--only", name) for name in STATES} == {name: fine for name, (_, _, fine) in STATES.items()}
    assert not well(zoo)
    unknown = zoo.run("status", "--only", "nobody")
    assert unknown.returncode == 2 and "nobody" in unknown.stderr and "current" in unknown.stderr


def test_status_writes_nothing(zoo: Host) -> None:
    """status, its variants and doctor leave everything on the host as it is."""
    before = tree(zoo.root)
    for arguments in (("status",), ("status", "--json", "--check"), ("status", "--offline"), ("doctor",)):
        zoo.run(*arguments)
    assert tree(zoo.root) == before


@pytest.mark.parametrize("columns", (200, 80, 40, 30))
def test_status_fits_its_terminal(zoo: Host, columns: int) -> None:
    """The rows of the table are as wide as the terminal at the most, and every binary is there with its state."""
    code, raw = on_terminal(zoo, "status", columns=columns)
    lines = screen(raw)
    rows = [line for line in lines if not re.match(r"(\w+: (?!\w+( by operator)?$)|last sync|  [^ ])", line)]
    assert code == 0 and max(map(len, rows)) <= max(columns, 60)
    for name, (_, words, _) in STATES.items():
        assert any(re.match(rf"{name}:? +{words}\b", line) for line in lines), (name, lines)
    assert COLOUR.search(raw)


@pytest.mark.parametrize("setting", ({"NO_COLOR": "1"}, {"TERM": "dumb", "NO_COLOR": "1"}))
def test_no_colour(zoo: Host, setting: dict[str, str]) -> None:
    """Nobody is shown colours who does not want them."""
    for arguments in (("status",), ("doctor",), ("sync", "--dry-run"), ("--help",)):
        code, raw = on_terminal(zoo, *arguments, **setting)
        assert code in (0, 1) and not COLOUR.search(raw), raw


def test_offline(zoo: Host) -> None:
    """--offline asks nobody, compares with the last known answer, and tells how old that is."""
    asked = len(zoo.server.requests)
    rows = status(zoo, "--offline")
    text = table(zoo, "--offline")
    assert len(zoo.server.requests) == asked
    assert rows["current"]["state"] == "current" and rows["unknown"]["latestMd5"] == md5(good("v1"))
    assert re.search(r"^current +current +\w{8} +\w{8} \(0:\d\d:\d\d ago\)", text, re.M), text


def status_for_nobody(host: Host) -> list[dict[str, Any]]:
    """The rows of `status --json` that a user without rights gets."""
    require_root()
    require("setpriv")
    host.root.chmod(0o755)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    probe = subprocess.run([*nobody, sys.executable, "-c", "import bin_proxy"], cwd=REPOSITORY, capture_output=True)
    assert probe.returncode == 0, "nobody must be able to read this repository and Python"
    done = subprocess.run(
        [*nobody, *host.command("status", "--json")],
        env=host.environment(SUPERVISORCTL=""),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["binaries"]
    return rows


def test_status_without_root(zoo: Host) -> None:
    """Who may read the files may see the status, too."""
    rows = {row["name"]: row["state"] for row in status_for_nobody(zoo)}
    assert rows == {name: state for name, (state, _, _) in STATES.items()}


def test_a_file_that_may_not_be_looked_at_is_not_missing(host: Host) -> None:
    """What is not known is not told as absent."""
    host.install("manager", good("v1"))
    (host.bin / "manager").chmod(0o700)
    host.server.publish("manager", good("v1"))
    host.write_manifest({"name": "manager", **FILE})
    [row] = status_for_nobody(host)
    assert row["state"] == "unknown" and row["installedMd5"] is None and "Permission denied" in row["error"]


def test_status_believes_the_answer_it_has_rather_than_the_last_sync(host: Host) -> None:
    """That bin-manager was down a minute ago is no error of a binary for which it answers now."""
    host.write_manifest({"name": "manager", **FILE})
    host.server.publish("manager", good("v1"))
    host.server.stop()
    assert host.sync().returncode == 1
    assert "cannot be reached" in status(host, "--offline")["manager"]["error"]
    host.server.start()
    row = status(host)["manager"]
    assert row["state"] == "missing" and row["error"] is None
    assert "the next sync installs" in table(host)


def test_offline_before_the_first_sync(host: Host) -> None:
    """Where nothing is known, that is said; no state folder is made."""
    host.install("manager", good("v1"))
    host.write_manifest({"name": "manager", **FILE})
    row = status(host, "--offline")["manager"]
    assert row["state"] == "unknown" and row["latestMd5"] is None and row["updatedAt"] is None
    assert "none yet" in table(host, "--offline") and not host.state.exists()


def test_updating_and_interrupted() -> None:
    """An update under way is `updating` and well; one that was cut off is `interrupted`, and its way out is told."""
    with running_host("manager", stopwaitsecs="3") as host:
        exchange(host, "manager", stubborn("v1"))
        host.server.publish("manager", good("v2"))
        with running(host, "sync", MIN_HEALTHY_SECONDS="100") as sync:
            eventually(lambda: host.service_state("manager") == "STOPPING")
            row = status(host)["manager"]
            assert row["state"] == "updating" and row["service"]["name"] == "manager"
            assert well(host) and re.search(r"^manager +updating ", table(host), re.M)
            assert " restart manager" not in table(host), "which would cut in"
            busy = host.sync()
            assert (busy.returncode, busy.stdout, busy.stderr) == (75, "", "")
            code, raw = on_terminal(host, "sync")
            assert code == 75 and re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", raw), raw
            sync.send_signal(signal.SIGKILL)
            sync.wait()
            row = status(host)["manager"]
            assert row["state"] == "interrupted" and not well(host)
            assert re.search(r"^manager: .*bin-proxy sync --only manager", table(host), re.M)
            doctor = host.run("doctor")
            assert doctor.returncode == 1 and re.search(r"^WRONG.*bin-proxy sync --only manager", doctor.stdout, re.M)
        assert host.sync().returncode == 0
        assert host.running_md5("manager") == host.disk_md5("manager") == host.reported("manager")
        assert status(host)["manager"]["state"] == "current"


def test_restart_pending(manager_host: Host) -> None:
    """A service that executes another file than the installed one is said to, with what to type; not so a wrapper."""
    host = manager_host
    assert well(host)
    host.install("fresh", good("v1"))
    (host.bin / "fresh").rename(host.bin / "manager")
    row = status(host)["manager"]
    assert row["state"] == "current" and row["service"]["restartPending"] is True and not well(host)
    text = table(host)
    typed = f": {host.settings['SUPERVISORCTL']} restart manager"
    assert "restart pending" in text and typed in text
    assert typed in host.run("doctor").stdout
    (host.bin / "manager").rename(host.bin / "kept")
    assert " restart manager" not in table(host), "which would stop it for want of a file"
    assert "bin-proxy sync --only manager" in table(host)
    (host.bin / "kept").rename(host.bin / "manager")
    host.ctl("restart", "manager")
    service = status(host)["manager"]["service"]
    assert service == {"name": "manager", "state": "RUNNING", "pid": host.pid("manager"), "restartPending": False}
    assert well(host) and re.search(rf"RUNNING {service['pid']} 0:00:\d\d", table(host))


def test_a_dead_service_is_not_well(manager_host: Host) -> None:
    """A current binary whose service is dead is not well; one that an operator stopped is."""
    host = manager_host
    host.ctl("stop", "manager")
    assert status(host)["manager"]["service"]["state"] == "STOPPED" and well(host)
    host.install("manager", dies_at_once("bad"))
    host.server.publish("manager", dies_at_once("bad"))
    host.ctl("start", "manager")
    eventually(lambda: host.service_state("manager") == "FATAL")
    row = status(host)["manager"]
    assert row["state"] == "current" and row["service"]["state"] == "FATAL" and not well(host)
    assert "FATAL" in table(host) and "FATAL" in host.run("doctor").stdout
    host.stop_supervisord()
    row = status(host)["manager"]
    assert row["state"] == "current" and row["error"] and not well(host)


# rollback


def test_rollback_to_the_previous_release(manager_host: Host) -> None:
    """rollback needs no bin-manager, keeps owner and mode, leaves a hold that it tells, and syncs respect it."""
    host = manager_host
    path = host.bin / "manager"
    path.chmod(0o750)
    if os.geteuid() == 0:
        os.chown(path, 1, 2)
    host.server.publish("manager", good("v2"))
    assert host.sync().returncode == 0
    before = path.stat()
    host.server.stop()
    done = host.run("rollback", "manager")
    assert done.returncode == 0 and not done.stderr
    assert md5(good("v1"))[:8] in done.stdout and f"{md5(good('v2'))[:8]} is held" in done.stdout
    assert "bin-proxy sync --only manager --retry-held" in done.stdout
    assert host.disk_md5("manager") == host.running_md5("manager") == host.reported("manager") == md5(good("v1"))
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    host.server.start()
    pid = host.pid("manager")
    assert host.outcomes() == {"manager": "held"} and host.sync().returncode == 0
    assert host.pid("manager") == pid and well(host) and not host.strays()
    row = status(host)["manager"]
    assert row["held"]["md5"] == md5(good("v2")) and row["backups"] == [md5(good("v2"))]
    assert host.sync("--only", "manager", "--retry-held").returncode == 0
    assert host.running_md5("manager") == md5(good("v2")) and status(host)["manager"]["held"] is None


def test_rollback_to_a_kept_release(host: Host) -> None:
    """--to takes a kept MD5 or its beginning; what is not kept is exit 2 with what there is, and nothing is touched."""
    releases = [good(f"v{at}") for at in range(1, 4)]
    host.write_manifest({"name": "tool", **FILE}, {"name": "other", **FILE})
    host.server.publish("other", good("x"))
    for release in releases:
        host.server.publish("tool", release)
        assert host.sync().returncode == 0
    first, second, third = map(md5, releases)
    assert status(host)["tool"]["backups"] == [second, first]
    before = tree(host.root)
    for arguments in (("tool", "--to", "f" * 32), ("tool", "--to", third), ("tool", "--to", "../../x")):
        done = host.run("rollback", *arguments)
        assert done.returncode == 2 and first in done.stderr and second in done.stderr, done.stderr
    assert host.run("rollback", "other").returncode == 2
    assert host.run("rollback", "nobody").returncode == 2
    assert host.run("rollback").returncode == 2
    changed = {path for path, was in tree(host.root).items() if before.get(path) != was}
    assert {Path(path).name for path in changed} <= {"lock", "state"}
    assert host.run("rollback", "tool", "--to", first[:6].upper()).returncode == 0
    assert host.disk_md5("tool") == host.reported("tool") == first and status(host)["tool"]["held"]["md5"] == third


def test_a_rollback_that_fails_is_undone() -> None:
    """Where the previous release does not run any more, the present one comes back and runs; exit 1, and why."""
    with running_host("manager") as host:
        flag = host.root / "flag"
        flag.touch()
        exchange(host, "manager", f"#!/bin/sh\n[ -e {flag} ] || exit 1\nexec sleep 100000\n".encode())
        host.server.publish("manager", good("v2"))
        assert host.sync().returncode == 0
        flag.unlink()
        done = host.run("rollback", "manager")
        assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
        assert "failed" in done.stderr and md5(good("v2"))[:8] in done.stderr
        assert host.running_md5("manager") == host.reported("manager") == md5(good("v2")) and not host.strays()
        assert "bin-proxy rollback manager --to" in done.stderr, "no sync would try that one again"
        assert re.search(r"manager: rolled back .*, pid \d+ -> \d+, [\d.]+ s: ", host.log())
        assert host.outcomes() == {"manager": "current"} and status(host)["manager"]["held"] is None


def test_a_rollback_that_cannot_begin_is_logged(manager_host: Host) -> None:
    """LOG_FILE gets a line for it; nothing is changed."""
    host = manager_host
    host.server.publish("manager", good("v2"))
    assert host.sync().returncode == 0
    done = host.run("rollback", "manager", SUPERVISORCTL="/bin/false")
    assert done.returncode == 1
    last = host.log().splitlines()[-1]
    assert "manager: not rolled back" in last and "supervisorctl" in last
    assert host.running_md5("manager") == md5(good("v2")) and not host.strays()


def test_a_rollback_whose_log_cannot_be_written_says_so(host: Host) -> None:
    """It is done all the same."""
    host.write_manifest({"name": "tool", **FILE})
    for tag in ("v1", "v2"):
        host.server.publish("tool", good(tag))
        assert host.sync().returncode == 0
    done = host.run("--log-file", str(host.bin), "rollback", "tool")
    assert done.returncode == 0 and host.disk_md5("tool") == md5(good("v1"))
    assert len(done.stderr.splitlines()) == 1 and f"LOG_FILE {host.bin}" in done.stderr


# pause and resume


def test_pause_one_binary(host: Host) -> None:
    """A paused binary stays as it is, others do not; it is no failure anywhere, and resume says what it did."""
    for name in ("a", "b"):
        host.install(name, good("v1"))
        host.server.publish(name, good("v2"))
    host.write_manifest({"name": "a", **FILE}, {"name": "b", **FILE})
    done = host.run("pause", "a", "--reason", "INC-42")
    assert done.returncode == 0 and "bin-proxy resume a" in done.stdout
    assert host.outcomes() == {"a": "paused", "b": "updated"}
    quiet = host.sync()
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert host.disk_md5("a") == md5(good("v1")) and status(host)["a"]["paused"]["reason"] == "INC-42" and well(host)
    assert host.outcomes("--retry-held") == {"a": "paused", "b": "current"}
    told = host.sync("--dry-run").stdout
    assert "INC-42" in told and "bin-proxy resume a" in told
    done = host.run("resume", "b")
    assert done.returncode == 0 and "paused now: a" in done.stdout
    done = host.run("resume", "a")
    assert done.returncode == 0 and "paused now: nothing" in done.stdout
    assert host.outcomes() == {"a": "updated", "b": "current"}


def test_pause_the_host(host: Host) -> None:
    """Without a name the whole host is paused; only its own resume ends that, which is told."""
    host.install("a", good("v1"))
    host.server.publish("a", good("v2"))
    host.write_manifest({"name": "a", **FILE})
    assert host.run("pause").returncode == 0
    assert host.outcomes() == {"a": "paused"} and status(host)["a"]["state"] == "paused"
    assert "host" in host.run("resume", "a").stdout and host.outcomes() == {"a": "paused"}
    line = next(line for line in table(host).splitlines() if line.startswith("a: "))
    assert re.search(r"bin-proxy resume(?! \w*a\b)", line), line
    assert host.run("resume").returncode == 0
    assert host.outcomes() == {"a": "updated"}


def test_pause_of_a_duration(host: Host) -> None:
    """--for ends by itself; what is no duration, and an unknown name, are exit 2 and pause nothing."""
    host.install("a", good("v1"))
    host.server.publish("a", good("v2"))
    host.write_manifest({"name": "a", **FILE})
    for arguments in (("--for", "soon"), ("--for", "2"), ("--for", "-2h"), ("--for", ""), ("nobody",)):
        done = host.run("pause", *arguments)
        assert done.returncode == 2 and done.stderr, arguments
    assert status(host)["a"]["paused"] is None
    assert "until" in host.run("pause", "a", "--for", "1h30m").stdout
    row = status(host)["a"]["paused"]
    assert row["since"] < row["until"]
    assert "until" in table(host)
    assert host.run("pause", "a", "--for", "4s").returncode == 0
    assert host.outcomes() == {"a": "paused"}
    eventually(lambda: host.outcomes() == {"a": "updated"})
    assert status(host)["a"]["paused"] is None
    assert "paused now: nothing" in host.run("resume", "b").stdout


def test_pause_and_resume_overwrite_nothing_that_they_cannot_read(host: Host) -> None:
    """What is paused may be an incident's: the file stays, and the next sync keeps it aside and pauses the host."""
    host.write_manifest({"name": "a", **FILE})
    host.server.publish("a", good("v1"))
    assert host.run("pause", "a").returncode == 0
    file = host.state / "pauses.json"
    file.write_bytes(raw := file.read_bytes()[:-1])
    for command in (("pause", "a"), ("resume",)):
        done = host.run(*command)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and str(file) in done.stderr
        assert file.read_bytes() == raw
    assert host.outcomes() == {"a": "paused"}
    assert [aside.read_bytes() for aside in host.state.glob("pauses.json.unreadable*")] == [raw]
    assert host.run("resume").returncode == 0
    assert host.outcomes() == {"a": "updated"}


def test_pause_during_a_sync(host: Host) -> None:
    """A pause that comes while a release is being downloaded keeps it from being swapped in."""
    host.install("a", good("v1"))
    host.server.publish("a", good("v2", 200_000))
    host.server.always[BinManagerServer.download_path("a")] = drip(3)
    host.write_manifest({"name": "a", **FILE})
    with running(host, "sync", "--json") as sync:
        eventually(lambda: any("download" in path for path, _ in host.server.requests))
        done = host.run("pause", "a", "--reason", "not now")
        assert done.returncode == 0
        out, err = sync.communicate(timeout=30)
    assert sync.returncode == 0 and not err
    assert json.loads(out)["results"][0]["outcome"] == "paused" and host.disk_md5("a") == md5(good("v1"))
    assert host.run("resume", "a").returncode == 0
    assert host.outcomes() == {"a": "updated"} and not host.strays()


# doctor


def findings(host: Host, *arguments: str, **settings: str) -> list[str]:
    """What doctor finds wrong; its exit code must say the same."""
    done = host.run(*arguments, "doctor", **settings)
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == bool(wrong) and not done.stderr, done.stdout + done.stderr
    assert all(line.startswith("WRONG ") for line in wrong)
    return wrong


def test_doctor() -> None:
    """A healthy host is well; each fault is found, alone, in one line that says what it is and what to do."""
    with running_host("manager") as host:
        assert any("last sync" in line and "cron" in line for line in findings(host))
        assert host.sync().returncode == 0
        assert findings(host) == []
        told = host.run("doctor").stdout
        for word in ("config", "manifest", "state", "last sync", "LOG_FILE", "folder", "bin-manager", "service"):
            assert re.search(rf"^ok +{word}", told, re.M), word

        [line] = findings(host, HTTP_TIMEOUT="soon")
        assert "HTTP_TIMEOUT" in line and "soon" in line
        (host.root / "config").write_text("JOBS=$MANY\n")
        [line] = findings(host)
        assert f"{host.root}/config:1" in line and "JOBS" in line
        (host.root / "token").write_text("s3cret")
        (host.root / "config").write_text(f"BIN_MANAGER_TOKEN_FILE={host.root}/token\n")
        assert findings(host) == []
        (host.root / "config").write_text("BIN_MANAGER_TOKEN=s3cret\n")
        (host.root / "config").chmod(0o644)
        [line] = findings(host)
        assert "token" in line and f"chmod o-r {host.root}/config" in line
        (host.root / "config").write_text("")

        [line] = findings(host, "--manifest", str(host.root / "absent.json"))
        assert "absent.json" in line and "BIN_MANIFESTS" in line
        (host.root / "broken.json").write_text("{")
        [line] = findings(host, "--manifest", str(host.root / "broken.json"))
        assert "broken.json" in line
        if os.geteuid() == 0:
            (host.root / "open.json").write_text('{"binaries": []}')
            (host.root / "open.json").chmod(0o666)
            [line] = findings(host, "--manifest", str(host.root / "open.json"))
            assert "chmod go-w" in line and "open.json" in line

        [line] = findings(host, "--log-file", str(host.root / "absent" / "log"))
        assert "LOG_FILE" in line and f"mkdir -p {host.root}/absent" in line

        text = host.manifest_path.read_text()
        host.manifest_path.write_text(text.replace('"name"', '"service": "nobody", "name"'))
        [line] = findings(host)
        assert "nobody" in line and "supervisorctl" in line
        host.manifest_path.write_text(text)

        host.server.stop()
        [line] = findings(host)
        assert "bin-manager" in line and str(host.server.port) in line and "correct BIN_MANAGER_API" in line
        assert host.sync().returncode == 1
        assert findings(host) == [line], "the same, though the last sync met it, too"
        host.server.start()
        assert host.sync().returncode == 0

        cache = json.loads((host.state / "cache.json").read_text())
        (host.state / "cache.json").write_text(json.dumps({**cache, "last_sync": [time.time() - 7200, 0]}))
        [line] = findings(host)
        assert "last sync" in line and "cron" in line
        (host.state / "cache.json").write_text(json.dumps(cache))

        host.ctl("stop", "manager")
        assert findings(host) == []
        host.stop_supervisord()
        [line] = findings(host)
        assert "supervisor" in line


def test_doctor_tells_what_to_do_about_a_held_release(zoo: Host) -> None:
    """A failure's hold is a finding with its way out; an operator's hold and pause are none."""
    wrong = findings(zoo)
    assert [line for line in wrong if "held" in line and "bin-proxy sync --only held --retry-held" in line]
    assert not [line for line in wrong if re.search(r"\b(left|paused|current)\b", line)], wrong


@pytest.mark.parametrize("kind", ["a folder", "no folder"])
@pytest.mark.parametrize("name", ["LOG_FILE", "METRICS_FILE"])
def test_doctor_looks_at_what_a_sync_will_write(host: Host, name: str, kind: str) -> None:
    """A file that could not be written is found before a sync stumbles over it."""
    host.write_manifest()
    assert host.sync().returncode == 0 and findings(host) == []
    path = host.bin if kind == "a folder" else host.root / "absent" / "x.prom"
    [line] = findings(host, **{name: str(path)})
    assert str(path if kind == "a folder" else path.parent) in line


def test_doctor_names_all_that_one_fault_strikes(host: Host) -> None:
    """One line, which names them all, also after a sync that met the same."""
    names = ("a", "b", "c")
    for name in names:
        host.install(name, good("v1"))
    host.write_manifest(*({"name": name, **FILE} for name in names))
    host.server.stop()
    for _ in range(2):
        [line] = [line for line in findings(host) if "cannot be reached" in line]
        assert "a, b, c: " in line
        assert host.sync().returncode == 1


def test_doctor_is_content_with_a_state_folder_that_the_first_sync_makes(host: Host) -> None:
    """With those above it, if need be."""
    host.write_manifest()
    state = str(host.root / "not" / "yet")
    assert [line for line in findings(host, "--state-dir", state) if "state" in line] == []
    assert host.run("--state-dir", state, "sync").returncode == 0


def test_one_fault_does_not_hide_another_from_doctor(host: Host) -> None:
    """A folder in the way, a metrics file without one, and a bin-manager that anyone could speak for are all told."""
    host.write_manifest({"name": "a", **FILE})
    (host.bin / "a").mkdir()
    metrics_file = host.root / "absent" / "m.prom"
    told = "\n".join(findings(host, METRICS_FILE=str(metrics_file), BIN_MANAGER_API="http://127.0.0.2:1/api/v1"))
    assert f"{host.bin}/a is not a regular file" in told and str(metrics_file) in told and "use https" in told, told
    (host.root / "ca.pem").write_text("no certificate")
    told = "\n".join(findings(host, BIN_MANAGER_CA_BUNDLE=str(host.root / "ca.pem")))
    assert "ca.pem" in told and f"{host.bin}/a is not a regular file" in told and "last sync" in told, told


def test_doctor_says_one_thing_once(host: Host) -> None:
    """One missing folder of two binaries is not told again and again."""
    host.write_manifest(*({"name": name, **FILE, "path": f"{host.root}/gone/{name}"} for name in ("a", "b")))
    for name in ("a", "b"):
        host.server.publish(name, good("v1"))
    told = [line for line in findings(host) if f"{host.root}/gone" in line]
    assert len(told) == len({re.sub(r"^WRONG +", "", line) for line in told}) and 1 <= len(told) <= 3, told


# metrics


def metrics(path: Path) -> dict[tuple[str, str], float]:
    """What a Prometheus parser reads, by metric and binary."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.documentation and family.type == "gauge"
        for sample in family.samples:
            found[sample.name.removeprefix("bin_proxy_"), sample.labels.get("binary", "")] = sample.value
    return found


def test_metrics(zoo: Host) -> None:
    """METRICS_FILE is valid, 0644 and replaced as a whole; an operator's decision and a failure differ in it."""
    folder = zoo.root / "metrics"
    folder.mkdir()
    path = folder / "bin-proxy.prom"
    assert zoo.sync("--only", "current", METRICS_FILE=str(path)).returncode == 0
    assert path.stat().st_mode & 0o7777 == 0o644
    assert zoo.sync("--only", "paused", METRICS_FILE=str(path)).returncode == 0
    with path.open() as before:
        began = time.time()
        assert zoo.sync("--only", "held", METRICS_FILE=str(path)).returncode == 1
        assert len(before.read()) > 500 and os.fstat(before.fileno()).st_nlink == 0
    assert [file.name for file in folder.iterdir()] == ["bin-proxy.prom"]
    found = metrics(path)
    assert (
        began - 1 <= found["last_sync_timestamp_seconds", ""] <= time.time() and found["last_sync_exit_code", ""] == 1
    )
    expected = {
        "current": {"binary_current"},
        "held": {"binary_held"},
        "left": {"binary_held_by_operator"},
        "paused": {"binary_paused"},
    }
    for name, kinds in expected.items():
        ones = {kind for (kind, binary), value in found.items() if binary == name and value == 1}
        assert ones - {"binary_current"} == kinds - {"binary_current"}, (name, ones)
        assert name != "current" or "binary_current" in ones
    assert {value for (kind, _), value in found.items() if kind.startswith("binary")} == {0.0, 1.0}


def test_metrics_of_a_release_that_does_not_come_whole(host: Host) -> None:
    """While it waits to be fetched again, too: an alert sees it."""
    host.install("a", good("v1"))
    host.write_manifest({"name": "a", **FILE})
    host.server.publish("a", good("v2"))
    host.server.always[host.server.download_path("a")] = answering(200, b"wrong")
    path = host.root / "m.prom"
    for _ in range(2):
        assert host.sync(METRICS_FILE=str(path)).returncode == 1
        assert metrics(path)["binary_failed", "a"] == 1


def test_the_metrics_know_a_hold_while_bin_manager_is_down_and_while_it_is_paused(zoo: Host) -> None:
    """Else an alert would be over, and new, with each outage."""
    path = zoo.root / "m.prom"
    zoo.server.stop()
    assert zoo.sync(METRICS_FILE=str(path)).returncode == 1
    found = metrics(path)
    assert (
        found["binary_held", "held"] == found["binary_failed", "held"] == found["binary_held_by_operator", "left"] == 1
    )
    zoo.server.start()
    assert zoo.run("pause", "held").returncode == 0
    assert zoo.sync("--only", "held", METRICS_FILE=str(path)).returncode == 0
    assert metrics(path)["binary_held", "held"] == metrics(path)["binary_paused", "held"] == 1
    assert zoo.run("resume", "held").returncode == 0


def test_metrics_of_a_failure(host: Host) -> None:
    """What could not be done is `failed`; a metrics file that cannot be written is told, and exit 1."""
    host.write_manifest({"name": "a+b.c", **FILE})
    path = host.root / "m.prom"
    assert host.sync(METRICS_FILE=str(path)).returncode == 1
    assert metrics(path)["binary_failed", "a+b.c"] == 1 and metrics(path)["binary_held", "a+b.c"] == 0
    host.server.publish("a+b.c", good("v1"))
    done = host.sync(METRICS_FILE=str(host.root / "absent" / "m.prom"))
    assert done.returncode == 1 and "METRICS_FILE" in done.stderr and host.disk_md5("a+b.c") == md5(good("v1"))
    again = host.sync(METRICS_FILE=str(host.root / "absent" / "m.prom"))
    assert (again.returncode, again.stderr) == (1, ""), "it is told once, not every minute"


# splay


def delay_of(host: Host, *prefix: str) -> float:
    """The delay that a new host of this name logs."""
    shutil.rmtree(host.state, ignore_errors=True)
    host.log_path.unlink(missing_ok=True)
    command = [*prefix, *host.command("sync", "--splay", "10000")]
    done = subprocess.run(command, env=host.environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = re.search(r"due in (\d+) s \(splay\)", host.log())
    assert found, host.log()
    return float(found[1])


def test_status_tells_an_update_that_waits_for_its_time_from_one_that_fails(host: Host) -> None:
    """While it waits, also for a first install, all is well; once it is due and fails, it is not."""
    host.write_manifest({"name": "a", **FILE})
    host.server.publish("a", good("v1"))
    assert host.sync("--splay", "604800").returncode == 0
    done = host.run("status", "--json", "--check")
    [row] = json.loads(done.stdout)["binaries"]
    assert (done.returncode, row["state"]) == (0, "missing") and row["retryAt"]
    shutil.rmtree(host.state)
    host.server.always[host.server.download_path("a")] = answering(404, b"")
    host.sync("--splay", "1")
    eventually(lambda: host.sync("--splay", "1").returncode == 1)
    done = host.run("status", "--json", "--check")
    [row] = json.loads(done.stdout)["binaries"]
    assert done.returncode == 1 and "404" in row["error"]


def test_splay(host: Host) -> None:
    """An update waits for its host's own moment, silently and well; the same each time; others hosts have others."""
    require_root()
    require("unshare")
    host.install("a", good("v1"))
    host.write_manifest({"name": "a", **FILE})
    host.server.publish("a", good("v2"))
    delays = set()
    for name in ("one", "two", "three"):
        prefix = ("unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")
        first = delay_of(host, *prefix)
        assert delay_of(host, *prefix) == first and 0 <= first <= 10000
        delays.add(first)
    assert len(delays) == 3
    assert delay_of(host) == delay_of(host)
    assert host.server.downloads == 0 and host.disk_md5("a") == md5(good("v1"))
    assert host.outcomes("--splay", "10000") == {"a": "waiting"} and well(host)
    lines = host.log().count("\n")
    assert host.sync("--splay", "10000").returncode == 0 and host.log().count("\n") == lines
    code, raw = on_terminal(host, "sync", "--splay", "10000")
    assert code == 0 and "updated" in raw and host.disk_md5("a") == md5(good("v2"))


def test_a_release_that_is_held_is_not_said_to_be_due(host: Host) -> None:
    """The splay is not what it waits for."""
    host.write_manifest({"name": "a", **FILE})
    for tag in ("v1", "v2"):
        host.server.publish("a", good(tag))
        assert host.sync().returncode == 0
    assert host.run("rollback", "a").returncode == 0
    assert host.outcomes("--splay", "10000") == {"a": "held"}
    assert "due in" not in host.log()


def test_splay_ends(host: Host) -> None:
    """When its moment has come, the update is done; the delay counts from when it was first seen."""
    host.install("a", good("v1"))
    host.write_manifest({"name": "a", **FILE})
    host.server.publish("a", good("v2"))
    eventually(lambda: host.outcomes("--splay", "3") == {"a": "updated"})
    assert host.disk_md5("a") == md5(good("v2"))


def test_splay_is_even() -> None:
    """A fleet is spread evenly: of 10,000 hosts, each tenth of the time gets about a tenth."""
    counts = [0] * 10
    for at in range(10_000):
        counts[int(splay_delay(f"{socket.gethostname()}-{at:05}", 300) // 30)] += 1
    assert all(850 < count < 1150 for count in counts), counts
    assert splay_delay("a", 300) == pytest.approx(10 * splay_delay("a", 30))


# what is printed


COMMANDS = ("", *sorted(cli.commands))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(host: Host, command: str) -> None:
    """Every --help teaches by example, names its options, and lays itself out for the terminal it is on."""
    words = [command, "--help"] if command else ["--help"]
    done = host.run(*words)
    assert done.returncode == 0 and not done.stderr
    assert re.search(rf"^ *Examples?:\n( +bin-proxy {command}.*\n)+", done.stdout, re.M), done.stdout
    parameters = cli.commands[command].params if command else cli.params
    for parameter in parameters:
        if isinstance(parameter, click.Option):
            assert all(flag in done.stdout for flag in parameter.opts) and parameter.help
    code, raw = on_terminal(host, *words, columns=80)
    assert code == 0 and max(map(len, screen(raw))) <= 80, [line for line in screen(raw) if len(line) > 80]
    for setting in ({"TERM": "dumb"}, {"COLUMNS": "40"}, {"COLUMNS": "1"}, {"COLUMNS": "x"}, {"TERM": ""}):
        code, _ = on_terminal(host, *words, columns=40, **setting)
        assert code == 0


def test_the_list_of_commands_is_not_cut(host: Host) -> None:
    """At 80 columns, each command's line in --help is a whole sentence."""
    _, raw = on_terminal(host, "--help", columns=80)
    assert not [line for line in screen(raw) if line.endswith("...") and "Usage:" not in line]


def test_help_names_every_setting(host: Host) -> None:
    """--help shows each environment variable that counts."""
    from bin_proxy.config.settings import TABLE

    text = host.run("--help").stdout
    assert all(name in text for name in (*TABLE, "BIN_PROXY_CONFIG"))


@pytest.mark.parametrize(
    "words", (["nonsense"], ["sync", "--nonsense"], ["rollback"], ["sync", "--wait", "x"], ["status", "x"])
)
def test_bad_usage(host: Host, words: list[str]) -> None:
    """A slip on the command line is exit 2 with a hint where help is, and touches nothing."""
    done = host.run(*words)
    assert done.returncode == 2 and not done.stdout and "--help" in done.stderr
    assert not host.state.exists()


@pytest.mark.parametrize("setting", ({}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}))
def test_progress_on_a_terminal(host: Host, setting: dict[str, str]) -> None:
    """On a terminal a download shows a bar that never spoils a line; what is said stands on lines of its own."""
    host.install("a", good("v1"))
    host.write_manifest({"name": "a", **FILE}, {"name": "b", **FILE})
    host.server.publish("a", good("v2", 2_000_000))
    host.server.publish("b", good("v1"))
    host.server.always[BinManagerServer.download_path("a")] = drip(1.5)
    code, raw = on_terminal(host, "sync", **setting)
    assert code == 0 and "downloading" in raw and "%" in raw
    for line in screen(raw):
        assert re.fullmatch(r"(downloading +\[.*\] .*|[ab]: .*|)", line), screen(raw)
    assert sum("downloading" in line for line in screen(raw)) <= 2, screen(raw)
    assert raw.rfind("\x1b[?25l") <= raw.rfind("\x1b[?25h")  # a cursor that was hidden is shown again
    code, raw = on_terminal(host, "-q", "sync", "--retry-held")
    assert code == 0 and not raw


def test_the_cursor_comes_back(host: Host) -> None:
    """Ctrl-C in the middle of a download leaves a terminal as one wants it: with a cursor, and a free line."""
    host.write_manifest({"name": "a", **FILE})
    host.server.publish("a", good("v2", 2_000_000))
    host.server.always[BinManagerServer.download_path("a")] = drip(60, 200)
    code, raw = on_terminal(host, "sync", until="downloading")
    assert code == 128 + signal.SIGINT and "Traceback" not in raw
    assert raw.rfind("\x1b[?25l") <= raw.rfind("\x1b[?25h"), raw


def test_ctrl_c_during_an_update_is_answered(manager_host: Host) -> None:
    """Whoever presses it while a service is watched is told what is waited for."""
    new = manager_host.server.publish("manager", good("v2"))
    code, raw = on_terminal(manager_host, "sync", until=f"-> {new[:8]}", MIN_HEALTHY_SECONDS="2")
    assert code == 128 + signal.SIGINT and "this ends once the update is finished or undone" in raw
    assert manager_host.running_md5("manager") == manager_host.reported("manager") == new


def test_no_progress_off_a_terminal(host: Host) -> None:
    """Piped, an update says nothing at all; with -v, lines only."""
    host.write_manifest({"name": "a", **FILE})
    for tag, words in (("v1", ("sync",)), ("v2", ("-v", "sync"))):
        host.server.publish("a", good(tag, 2_000_000))
        host.server.scripts[BinManagerServer.download_path("a")] = [drip(0.6)]
        done = host.run(*words)
        assert (
            done.returncode == 0 and "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
        )
        assert bool(done.stdout + done.stderr) == ("-v" in words)


@pytest.mark.parametrize("columns", (80, 40))
def test_in_a_real_terminal(host: Host, columns: int) -> None:
    """In tmux, a sync with a bar, a table and a prompt after them stand where they belong."""
    require("tmux")
    host.install("a", good("v1"))
    host.write_manifest({"name": "a", **FILE}, {"name": "b", **FILE})
    host.server.publish("a", good("v2", 2_000_000))
    host.server.always[BinManagerServer.download_path("a")] = drip(2)
    tmux = ["tmux", "-S", f"{host.root}/tmux", "-f", "/dev/null"]
    script = host.root / "session"
    tool = shlex.join(host.command())
    script.write_text(f"cd {REPOSITORY}\n{tool} sync\n{tool} status\necho END\nsleep 100\n")
    subprocess.run(
        [*tmux, "new-session", "-d", "-x", str(columns), "-y", "40", f"sh {script}"], env=host.environment(), check=True
    )

    def shown() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p", "-J"], capture_output=True, text=True).stdout

    try:
        eventually(lambda: re.search(r"downloading .*\d+%", shown()))
        bars = [line for line in shown().splitlines() if "downloading" in line]
        assert len(bars) == 1 and len(bars[0]) <= columns
        eventually(lambda: "END" in shown())
        lines = [line for line in shown().splitlines() if line]
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    told = lines[: next(at for at, line in enumerate(lines) if re.match(r"NAME|[ab]: (current|unknown)$", line))]
    for line in told:
        assert re.fullmatch(
            r"downloading .*\]( +\d+%.*)?|a: \w+ -> \w+|a: updated to \w+ in .*|(bin-proxy: b:|   ) .*", line
        ), told
    assert sum(line.startswith("downloading") for line in told) <= 1, told
    assert any(line.startswith("a: updated to ") for line in lines)
    assert any(re.match(r"a:? +current\b", line) for line in lines) and any(
        re.match(r"b:? +unknown\b", line) for line in lines
    )


def test_a_reader_that_goes_away(zoo: Host) -> None:
    """`bin-proxy status | head -1` ends without noise."""
    tool = shlex.join(zoo.command("status"))
    done = subprocess.run(
        ["sh", "-c", f"{tool} | head -n 1"], cwd=REPOSITORY, env=zoo.environment(), capture_output=True, text=True
    )
    assert done.stdout.startswith("NAME") and not done.stderr


def test_dry_run(zoo: Host) -> None:
    """--dry-run says for each binary what would happen and why, once, needs no lock and writes nothing."""
    before = tree(zoo.root)
    done = zoo.run("sync", "--dry-run")
    assert tree(zoo.root) == before and done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(STATES)
    told = dict(line.split(": ", 1) for line in lines)
    assert told["outdated"].startswith("would be updated") and told["missing"].startswith("would be updated")
    assert told["current"].startswith("current") and "INC-42" in told["paused"] and "404" in told["unknown"]
    assert told["held"].startswith("held") and told["held"].count("held") == 1 and "/bin/false" in told["held"]


def test_a_bad_release_at_the_console(manager_host: Host) -> None:
    """What is said of a roll-back names what happened, what runs now and what to type; and again when asked again."""
    host = manager_host
    host.server.publish("manager", dies_at_once("bad"))
    code, raw = on_terminal(host, "sync", columns=300)
    assert code == 1
    last = [line for line in screen(raw) if line.startswith("bin-proxy: manager: ")]
    assert len(last) == 1 and md5(good("v1"))[:8] in last[0] and md5(dies_at_once("bad"))[:8] in last[0]
    assert "bin-proxy sync --only manager --retry-held" in last[0]
    assert "supervisorctl" not in raw
    code, raw = on_terminal(host, "sync", columns=300)
    assert code == 1 and "bin-proxy sync --only manager --retry-held" in raw, raw
