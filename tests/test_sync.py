"""`sync`, end to end: the real command line against real files, a real bin-manager and a real supervisord."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require, require_root
from tests.faults import answering
from tests.host import Host, dies_at_once, eventually, good, md5, running, running_host
from tests.server import Handler

REPOSITORY = Path(__file__).parent.parent


def tool(name: str = "tool", **more: Any) -> dict[str, Any]:
    """An entry without a service, which needs no supervisord."""
    return {"name": name, "version": "latest", "currentMd5": "", "service": False, **more}


def offer(host: Host, *names: str, installed: bytes | None = b"1", offered: bytes = b"2") -> None:
    """Each name is a file without a service; the release on offer differs from it."""
    for name in names:
        if installed is not None:
            host.install(name, name.encode() + installed)
        host.server.publish(name, name.encode() + offered)
    host.write_manifest(*(tool(name) for name in names))


def content(host: Host, name: str) -> bytes:
    return (host.bin / name).read_bytes()


def listing(host: Host) -> dict[str, Any]:
    """Everything below the host's folder that a write would change."""
    found = {}
    for path in [host.root, *sorted(host.root.rglob("*"))]:
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, data)
    return found


def unread(status: os.stat_result) -> list[int]:
    """What reading a file does not change."""
    return [status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_ctime_ns]


def backups(host: Host, name: str) -> set[str]:
    folder = host.state / "backups" / name
    return set(os.listdir(folder)) if folder.is_dir() else set()


class Gate:
    """A behaviour of the server that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, handler: Handler) -> bool:
        self.reached.set()
        self.opened.wait(60)
        return True


@contextmanager
def gated(host: Host, name: str) -> Iterator[Gate]:
    """The download of `name` waits until the gate is opened, at the latest at the end."""
    gate = Gate()
    host.server.always[host.server.download_path(name)] = gate
    try:
        yield gate
    finally:
        gate.opened.set()
        host.server.always.pop(host.server.download_path(name), None)


def slowly(chunks: int, pause: float) -> Callable[[Handler], bool]:
    """A behaviour that sends the first bytes of the release one by one, and then stands still."""

    def send(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(chunks):
            handler.wfile.write(b"x" * 100)
            handler.wfile.flush()
            time.sleep(pause)
        return False

    return send


def on_terminal(
    host: Host, *arguments: str, act: Callable[[int], None] = lambda pid: None, **settings: str
) -> tuple[int, str]:
    """Run bin-proxy on a terminal of its own; returns the exit code and all that it showed."""
    environment = {"TERM": "xterm", "COLUMNS": "200", **host.environment(**settings)}
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execve(sys.executable, host.command(*arguments), environment)
    shown = b""
    thread = threading.Thread(target=act, args=(pid,))
    thread.start()
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([fd], [], [], 0.2)[0]:
                chunk = b""
                with suppress(OSError):  # EIO: the other end is closed
                    chunk = os.read(fd, 65536)
                if not chunk:
                    break
                shown += chunk
    finally:
        os.close(fd)
        thread.join()
        _, status = os.waitpid(pid, 0)
    text = shown.decode(errors="replace").replace("\r\n", "\n")
    assert "Traceback" not in text, text
    return os.waitstatus_to_exitcode(status), text


# One binary on its way


def test_a_first_install_without_a_service(host: Host) -> None:
    """An absent file is fetched, is 0755 and belongs to whoever runs bin-proxy; the manifest tells its MD5."""
    offer(host, "tool", installed=None)
    done = host.sync()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    status = (host.bin / "tool").stat()
    assert content(host, "tool") == b"tool2"
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o755, os.getuid(), os.getgid())
    assert host.reported("tool") == md5(b"tool2")
    assert host.strays() == [] and backups(host, "tool") == set()


def test_a_first_install_starts_its_service() -> None:
    """A program that supervisord could not start for want of its file runs once the file is there."""
    with running_host() as host:
        host.program("fresh", startretries="0")
        host.stop_supervisord()
        host.start_supervisord()
        host.server.publish("fresh", good("v1"))
        host.write_manifest("fresh")
        eventually(lambda: host.service_state("fresh") in ("FATAL", "BACKOFF"))
        done = host.sync()
        assert (done.returncode, done.stderr) == (0, "")
        assert host.running_md5("fresh") == md5(good("v1"))


def test_an_update_swaps_restarts_and_records(manager_host: Host) -> None:
    """File, running service and manifest agree on the new release; the old one is kept; one line says so."""
    host = manager_host
    before = host.pid("manager")
    new = host.server.publish("manager", good("v2"))
    done = host.sync()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    after = host.pid("manager")
    assert after and after != before
    assert host.disk_md5("manager") == host.running_md5("manager") == host.reported("manager") == new
    assert backups(host, "manager") == {md5(good("v1"))}
    assert host.strays() == []
    [line] = host.log().splitlines()
    assert re.fullmatch(
        rf"\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\] manager: updated {md5(good('v1'))} -> {new}, "
        rf"pid {before} -> {after}, \d+\.\d s",
        line,
    )


def test_what_is_current_is_left_alone(manager_host: Host) -> None:
    """No download, no restart, no line; the manifest is told the truth once."""
    host = manager_host
    before = host.pid("manager")
    inode = (host.bin / "manager").stat().st_ino
    for _ in range(2):
        done = host.sync()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.pid("manager") == before
    assert (host.bin / "manager").stat().st_ino == inode
    assert host.server.downloads == 0
    assert host.log() == ""
    assert host.reported("manager") == md5(good("v1"))


@pytest.mark.parametrize("claim", ["the new one", "the old one", "nonsense"])
def test_currentmd5_never_decides(host: Host, claim: str) -> None:
    """Whatever the manifest reports, only the bytes on the disk are compared."""
    offer(host, "stale", "right")
    host.server.publish("right", b"right1")
    old, new = md5(b"stale1"), md5(b"stale2")
    reported = {"the new one": new, "the old one": old, "nonsense": "x"}[claim]
    host.write_manifest(tool("stale", currentMd5=reported), tool("right", currentMd5=reported))
    assert host.outcomes() == {"stale": "updated", "right": "current"}
    assert content(host, "stale") == b"stale2"
    assert (host.reported("stale"), host.reported("right")) == (new, md5(b"right1"))


def test_a_pinned_version_asks_for_that_version(host: Host) -> None:
    """The version of the manifest is the one in the path; "latest" where it is absent."""
    host.server.publish("tool", b"tool 2.3.1", "2.3.1")
    host.server.publish("tool", b"tool latest")
    host.server.publish("other", b"other latest")
    host.write_manifest(tool(version="2.3.1"), {"name": "other", "service": False})
    assert host.sync().returncode == 0
    assert (content(host, "tool"), content(host, "other")) == (b"tool 2.3.1", b"other latest")
    paths = {path for path, _ in host.server.requests}
    assert paths == {
        host.server.md5_path("tool", "2.3.1"),
        host.server.download_path("tool", "2.3.1"),
        host.server.md5_path("other"),
        host.server.download_path("other"),
    }


def test_a_file_that_somebody_else_replaced_is_updated_again(host: Host) -> None:
    """The digest that is remembered belongs to the file as it was: another file is looked at anew."""
    offer(host, "tool")
    os.utime(host.bin / "tool", (1, 1))
    assert host.outcomes() == {"tool": "updated"}
    assert host.outcomes() == {"tool": "current"}
    (host.bin / "tool").write_bytes(b"toolX")
    os.utime(host.bin / "tool", (1, 1))
    assert host.outcomes() == {"tool": "updated"}
    assert content(host, "tool") == b"tool2"


# What belongs to the file


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o4755, 0o2751, 0o6511, 0o555])
def test_owner_and_mode_are_kept(host: Host, mode: int) -> None:
    """Owner, group and mode, set-id bits too, are those of the file that was replaced."""
    require_root()
    offer(host, "tool")
    os.chown(host.bin / "tool", 1234, 4321)
    (host.bin / "tool").chmod(mode)
    assert host.outcomes() == {"tool": "updated"}
    status = (host.bin / "tool").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 4321, mode)


def test_attributes_and_capabilities_are_kept(host: Host) -> None:
    """Extended attributes and file capabilities travel, also where the owner is given away."""
    require_root()
    require("setcap", "getcap")
    offer(host, "tool")
    path = host.bin / "tool"
    os.chown(path, 1234, 4321)
    path.chmod(0o750)
    os.setxattr(path, "user.note", b"\x00mine\xff")
    subprocess.run(["setcap", "cap_net_bind_service,cap_net_raw=ep", str(path)], check=True)
    wanted = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert set(wanted) >= {"user.note", "security.capability"}
    assert host.outcomes() == {"tool": "updated"}
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == wanted
    assert "cap_net_bind_service" in subprocess.run(["getcap", str(path)], capture_output=True, text=True).stdout


def test_a_file_whose_owner_cannot_be_given_is_not_replaced(host: Host) -> None:
    """Without the right to give the file away, the update is refused before the swap, and the next user can do it."""
    require_root()
    require("setpriv")
    offer(host, "tool")
    subprocess.run(["chown", "-R", "1234:1234", str(host.root)], check=True)
    os.chown(host.bin / "tool", 0, 0)
    before = unread((host.bin / "tool").stat())
    done = subprocess.run(
        ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", *host.command("sync")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env=host.environment(SUPERVISORCTL="/bin/true"),
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert content(host, "tool") == b"tool1" and unread((host.bin / "tool").stat()) == before
    assert [stray for stray in host.strays() if not stray.endswith(".part")] == []
    subprocess.run(["chown", "-R", "0:0", str(host.root)], check=True)
    assert host.outcomes() == {"tool": "updated"}


@pytest.mark.parametrize("link", ["../elsewhere/real", "{elsewhere}/real", "chain"])
def test_a_link_stays_and_its_target_is_replaced(host: Host, link: str) -> None:
    """Where the path is a symbolic link, the file behind it changes, beside which the download is staged, too."""
    offer(host, "tool", installed=None)
    elsewhere = host.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "real").write_bytes(b"tool1")
    (elsewhere / "real").chmod(0o711)
    (host.bin / "chain").symlink_to("../elsewhere/real")
    link = link.format(elsewhere=elsewhere)
    (host.bin / "tool").symlink_to(link)
    seen: list[list[str]] = []

    def look(handler: Handler) -> bool:
        seen.append(sorted(os.listdir(elsewhere)))
        return True

    host.server.scripts[host.server.download_path("tool")] = [look]
    assert host.outcomes() == {"tool": "updated"}
    assert os.readlink(host.bin / "tool") == link
    assert (elsewhere / "real").read_bytes() == b"tool2"
    assert stat.S_IMODE((elsewhere / "real").stat().st_mode) == 0o711
    assert os.listdir(elsewhere) == ["real"]
    assert set(seen[0]) <= {"real", f".tool.{md5(b'tool2')}.part"}


def test_what_was_at_the_path_is_never_absent(host: Host) -> None:
    """Whoever looks at the path while it is replaced again and again sees one whole release."""
    releases = [f"tool {at}".encode() * 20_000 for at in range(4)]
    host.install("tool", releases[0])
    host.write_manifest(tool())
    stop, seen = threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            seen.add(content(host, "tool"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for release in releases[1:]:
            host.server.publish("tool", release)
            assert host.sync().returncode == 0
    finally:
        stop.set()
        thread.join()
    assert seen <= set(releases) and len(seen) > 1


# Leftovers


def part_of(host: Host, name: str, release: bytes) -> Path:
    return host.bin / f".{name}.{md5(release)}.part"


def stop_in_the_middle(host: Host, name: str) -> None:
    """A download that ends before it is whole, with its part file left."""
    host.server.always[host.server.download_path(name)] = slowly(5, 0.0)
    done = host.sync(HTTP_TIMEOUT="0.3")
    assert done.returncode == 1
    host.server.always.clear()


def test_the_part_of_an_earlier_release_is_removed(host: Host) -> None:
    """A part file is kept for the release it belongs to, 0600; when another is on offer it goes."""
    offer(host, "tool")
    stop_in_the_middle(host, "tool")
    part = part_of(host, "tool", b"tool2")
    assert part.exists() and stat.S_IMODE(part.stat().st_mode) == 0o600
    host.server.publish("tool", b"tool3")
    assert host.outcomes() == {"tool": "updated"}
    assert host.strays() == []
    assert content(host, "tool") == b"tool3"


def test_the_part_of_an_earlier_release_goes_though_the_new_one_is_installed_already(host: Host) -> None:
    """A part that nobody will need any more is removed even when nothing is to be fetched."""
    offer(host, "tool")
    stop_in_the_middle(host, "tool")
    host.server.publish("tool", b"tool1")
    assert host.outcomes() == {"tool": "current"}
    assert host.strays() == []


def test_the_part_of_a_binary_that_left_the_manifest_is_removed(host: Host) -> None:
    """The file of the binary itself is left alone."""
    offer(host, "tool", "other")
    stop_in_the_middle(host, "tool")
    host.write_manifest(tool("other"))
    assert host.sync().returncode == 0
    assert host.strays() == []
    assert content(host, "tool") == b"tool1"
    requests = len(host.server.requests)
    assert host.sync().returncode == 0
    assert not any("/tool/" in path for path, _ in host.server.requests[requests:])


# Backups


@pytest.mark.parametrize(("keep", "kept"), [("0", 1), ("1", 1), ("2", 2), ("3", 3)])
def test_as_many_backups_are_kept_as_are_wanted(host: Host, keep: str, kept: int) -> None:
    """The last BACKUPS_KEEP previous releases, and never fewer than the last good one."""
    releases = [f"tool{at}".encode() for at in range(6)]
    host.install("tool", releases[0])
    host.write_manifest(tool())
    for release in releases[1:]:
        host.server.publish("tool", release)
        assert host.sync(BACKUPS_KEEP=keep).returncode == 0
    assert backups(host, "tool") == {md5(release) for release in releases[:-1][-kept:]}
    for name in backups(host, "tool"):
        assert md5((host.state / "backups" / "tool" / name).read_bytes()) == name
    (host.state / "backups").chmod(0o755)  # as an operator's mkdir -p leaves it
    assert host.sync().returncode == 0
    assert stat.S_IMODE((host.state / "backups").stat().st_mode) == 0o700
    assert stat.S_IMODE(host.state.stat().st_mode) == 0o755


def test_no_backup_shares_its_inode_with_what_is_installed(host: Host) -> None:
    """Writing onto the installed file, as `cp` does, alters no backup; also after going there and back again."""
    offer(host, "tool")
    for release in (b"tool2", b"tool1", b"tool3"):
        host.server.publish("tool", release)
        assert host.outcomes("--retry-held") == {"tool": "updated"}
        installed = (host.bin / "tool").stat().st_ino
        folder = host.state / "backups" / "tool"
        assert installed not in {path.stat().st_ino for path in folder.iterdir()}
        assert (host.bin / "tool").stat().st_nlink == 1
        for path in folder.iterdir():
            assert path.stat().st_nlink == 1
    assert host.run("rollback", "tool").returncode == 0
    installed = (host.bin / "tool").stat()
    assert installed.st_nlink == 1 and installed.st_ino not in {path.stat().st_ino for path in folder.iterdir()}
    with open(host.bin / "tool", "r+b") as file:
        file.write(b"XXXXX")
    for path in folder.iterdir():
        assert md5(path.read_bytes()) == path.name


@contextmanager
def tmpfs(folder: Path, size: str = "16m") -> Iterator[None]:
    """Another filesystem at this folder."""
    require_root()
    require("mount", "umount")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "bin-proxy-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_backups_may_lie_on_another_filesystem(host: Host) -> None:
    """Where no hard link is possible, the previous releases are kept as copies all the same."""
    offer(host, "tool")
    with tmpfs(host.state):
        assert host.outcomes() == {"tool": "updated"}
        assert backups(host, "tool") == {md5(b"tool1")}
        host.server.publish("tool", b"tool3")
        assert host.outcomes() == {"tool": "updated"}
        assert backups(host, "tool") == {md5(b"tool1"), md5(b"tool2")}
        for path in (host.state / "backups" / "tool").iterdir():
            assert md5(path.read_bytes()) == path.name
        assert host.strays() == []


def test_the_previous_release_comes_back_from_another_filesystem(manager_host: Host) -> None:
    """A release that dies is rolled back from a copy as it is from a link."""
    host = manager_host
    bad = host.server.publish("manager", dies_at_once("v2"))
    with tmpfs(host.state):
        assert host.outcomes() == {"manager": "rolled-back"}
        assert host.disk_md5("manager") == host.running_md5("manager") == md5(good("v1"))
        assert host.outcomes() == {"manager": "held"}
        assert bad not in backups(host, "manager")
        assert host.strays() == []


# Holds


def test_a_release_held_costs_one_download_and_one_restart(manager_host: Host) -> None:
    """The failure is told once; later minutes ask for nothing but the MD5; --retry-held tries it again."""
    host = manager_host
    bad = host.server.publish("manager", dies_at_once("v2"))
    done = host.sync()
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "manager" in line and bad[:8] in line
    assert host.disk_md5("manager") == host.running_md5("manager") == host.reported("manager") == md5(good("v1"))
    pid, log, downloads = host.pid("manager"), host.log(), host.server.downloads
    assert downloads == 1
    for _ in range(2):
        done = host.sync()
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (host.pid("manager"), host.log(), host.server.downloads) == (pid, log, downloads)
    assert host.outcomes("--retry-held") == {"manager": "rolled-back"}
    assert host.server.downloads == 2
    host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    host.server.publish("manager", dies_at_once("v2"))
    assert host.outcomes() == {"manager": "held"}
    assert host.server.downloads == 3


def test_a_held_release_that_works_after_all_is_held_no_longer(host: Host) -> None:
    """Once it was tried again and accepted, nothing stands against it, also when it comes back later."""
    offer(host, "tool")
    sign = host.root / "sign"
    host.write_manifest(tool(verifyCommand=["/bin/sh", "-c", f"test -e {sign}"]))
    done = host.sync("--json")
    assert (done.returncode, json.loads(done.stdout)["results"][0]["outcome"]) == (1, "held")
    assert content(host, "tool") == b"tool1" and host.strays() == []
    sign.touch()
    assert host.outcomes() == {"tool": "held"}
    assert host.outcomes("--retry-held") == {"tool": "updated"}
    for release in (b"tool3", b"tool2"):
        host.server.publish("tool", release)
        assert host.outcomes() == {"tool": "updated"}


def test_a_hold_survives_a_state_file_that_is_lost(host: Host) -> None:
    """With the state unreadable, the release that is on offer is not tried blindly; another one is."""
    offer(host, "tool")
    host.write_manifest(tool(verifyCommand=["/bin/false"]))
    assert host.outcomes() == {"tool": "held"}
    host.write_manifest(tool())
    (host.state / "state.json").write_bytes(b"\0\0\0")
    done = host.sync("--json")
    assert json.loads(done.stdout)["results"][0]["outcome"] == "held" and "state.json" in done.stderr
    assert host.outcomes() == {"tool": "held"}
    assert content(host, "tool") == b"tool1"
    host.server.publish("tool", b"tool3")
    assert host.outcomes() == {"tool": "updated"}


# Several binaries


def test_only_the_named_binaries_are_looked_at(host: Host) -> None:
    """--only may be repeated; the others are neither asked for nor touched."""
    offer(host, "a", "b", "c")
    assert host.outcomes("--only", "c", "--only", "a") == {"a": "updated", "c": "updated"}
    assert content(host, "b") == b"b1"
    assert not any("/b/" in path for path, _ in host.server.requests)


@pytest.mark.parametrize("names", [["nobody"], ["a", "nobody"], ["A"], [""], ["a/../b"], ["\x1b[31m"]])
def test_an_unknown_name_is_exit_2(host: Host, names: list[str]) -> None:
    """Nothing is asked and nothing touched, not even for those that are known."""
    offer(host, "a", "b")
    before = listing(host)
    done = host.sync(*(word for name in names for word in ("--only", name)))
    assert (done.returncode, done.stdout) == (2, "")
    assert "\x1b" not in done.stderr
    assert host.server.requests == [] and listing(host) == before


def test_an_unfinished_update_of_another_binary_is_left_alone() -> None:
    """--only leaves what a killed run began with others; a run over all of them resolves it."""
    with running_host("a", "b") as host:
        host.server.publish("a", good("v2"))
        with running(host, "sync", "--only", "a", MIN_HEALTHY_SECONDS="60") as process:
            eventually(lambda: host.disk_md5("a") == md5(good("v2")))
            process.kill()
            process.wait()
        record = (host.state / "journal" / "a.json").read_bytes()
        host.server.publish("b", good("v2"))
        assert host.outcomes("--only", "b") == {"b": "updated"}
        assert (host.state / "journal" / "a.json").read_bytes() == record
        said = host.sync("--dry-run")
        assert re.search(r"^a: .*interrupted", said.stdout, re.M), said.stdout
        assert (host.state / "journal" / "a.json").read_bytes() == record
        assert host.sync().returncode == 0
        assert host.disk_md5("a") == host.running_md5("a") == host.reported("a") == md5(good("v2"))
        assert host.strays() == []


def test_what_is_ready_does_not_wait_for_other_downloads(host: Host) -> None:
    """While the first binary's download is under way, the last one's update is done and recorded."""
    offer(host, "slow", "fast")
    with gated(host, "slow") as gate, running(host, "sync", HTTP_TIMEOUT="30") as process:
        eventually(lambda: content(host, "fast") == b"fast2")
        eventually(lambda: host.reported("fast") == md5(b"fast2"))
        eventually(gate.reached.is_set)
        assert content(host, "slow") == b"slow1" and process.poll() is None
        gate.opened.set()
        assert process.wait(30) == 0
    assert content(host, "slow") == b"slow2"


def test_those_that_are_ready_are_activated_in_the_manifests_order(host: Host) -> None:
    """With all downloads there, the log tells the updates in the order of the manifest."""
    names = ["d", "b", "e", "a", "c"]
    offer(host, "first", *names)
    # Each verification takes its time: all are under way before the first one is activated, and become ready, in any
    # order, while it is.
    first = {"verifyCommand": ["/bin/sh", "-c", "sleep 1"], "healthCheck": {"command": ["/bin/sleep", "6"]}}
    wait = {"verifyCommand": ["/bin/sh", "-c", "sleep 2"]}
    host.write_manifest(tool("first", **first), *(tool(n, **wait) for n in names))
    done = host.sync(HEALTH_TIMEOUT="20", MIN_HEALTHY_SECONDS="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"\] (\w+): updated", host.log()) == ["first", *names]


def test_trouble_with_one_does_not_keep_the_others(host: Host) -> None:
    """Missing, corrupt and unanswered releases fail alone, each with one line; the rest is updated."""
    names = ["missing", "corrupt", "broken", "fine", "folder"]
    offer(host, *names)
    host.server.releases.pop(("latest", "missing"))
    host.server.always[host.server.download_path("corrupt")] = answering(200, b"something else")
    host.server.always[host.server.md5_path("broken")] = answering(200, b"<html>")
    (host.bin / "folder").unlink()
    (host.bin / "folder").mkdir()
    done = host.sync()
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert sorted(re.findall(r"^bin-proxy: (\w+): ", done.stderr, re.M)) == ["broken", "corrupt", "folder", "missing"]
    assert len(lines) == 4
    assert content(host, "fine") == b"fine2"
    for name in ("missing", "corrupt", "broken"):
        assert content(host, name) == name.encode() + b"1"
    assert len(host.log().splitlines()) == 5


# Dry run, JSON, waiting


def test_a_dry_run_says_what_would_happen_and_writes_nothing(host: Host) -> None:
    """bin-manager is asked; neither host nor STATE_DIR nor LOG_FILE nor manifest change, and nothing is fetched."""
    offer(host, "old", "new", "same", "gone")
    (host.bin / "new").unlink()
    host.server.publish("same", b"same1")
    host.server.releases.pop(("latest", "gone"))
    before = listing(host)
    done = host.sync("--dry-run")
    assert listing(host) == before
    assert host.server.downloads == 0
    for name in ("old", "new"):
        assert re.search(rf"^{name}: .*would be updated", done.stdout, re.M)
    assert re.search(r"^same: current", done.stdout, re.M)
    assert re.search(r"^gone: failed: .*404", done.stdout, re.M)
    assert done.stderr == "" and done.returncode == 1
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    "arguments", [["--json"], ["--splay", "3600"], ["--only", "tool"], ["--retry-held"], ["--wait", "5"]]
)
def test_no_dry_run_writes_anything(host: Host, arguments: list[str]) -> None:
    """Whatever the other options, also with a state that earlier runs left."""
    offer(host, "tool", "other")
    assert host.sync("--only", "other").returncode == 0
    stop_in_the_middle(host, "tool")
    host.server.publish("tool", b"tool3")
    (host.state / "journal" / "x.tmp").write_bytes(b"")
    before = listing(host)
    host.sync("--dry-run", *arguments)
    host.run("-v", "sync", "--dry-run", *arguments)
    assert listing(host) == before


def test_a_dry_run_needs_no_lock(host: Host) -> None:
    """While a sync is at work, a dry run answers."""
    offer(host, "tool")
    with gated(host, "tool") as gate, running(host, "sync", HTTP_TIMEOUT="30") as process:
        eventually(gate.reached.is_set)
        done = host.sync("--dry-run")
        assert done.returncode in (0, 1) and "tool: " in done.stdout
        assert process.poll() is None


def test_a_dry_run_beside_a_sync_says_that_it_is_at_work(manager_host: Host) -> None:
    """What is under way was not interrupted, and is no trouble."""
    host = manager_host
    host.server.publish("manager", good("v2"))
    with running(host, "sync", MIN_HEALTHY_SECONDS="4") as process:
        eventually(lambda: host.disk_md5("manager") == md5(good("v2")))
        done = host.sync("--dry-run")
        assert done.returncode == 0 and re.search(r"^manager: .*at work", done.stdout, re.M), done.stdout
        assert process.wait(60) == 0


def test_a_dry_run_says_that_a_release_is_held_and_why(manager_host: Host) -> None:
    """A held release is told as held, with the reason, and an update that cannot be done is told as failing."""
    host = manager_host
    host.server.publish("manager", dies_at_once("v2"))
    host.sync()
    before = listing(host)
    done = host.sync("--dry-run")
    assert re.search(r"^manager: held: .*(BACKOFF|FATAL|EXITED)", done.stdout, re.M), done.stdout
    assert {path: found for path, found in listing(host).items() if "/s." not in path} == {
        path: found for path, found in before.items() if "/s." not in path
    }
    host.server.publish("manager", good("v3"))
    assert "would be updated" in host.sync("--dry-run").stdout
    host.stop_supervisord()
    assert "manager: failed: " in host.sync("--dry-run").stdout


def test_the_json_has_the_documented_shape(host: Host) -> None:
    """{"results": [{name, outcome, fromMd5, toMd5, seconds, error}]}, in the manifest's order, and nothing else."""
    offer(host, "updated", "current", "failed", "fresh")
    host.server.publish("current", b"current1")
    host.server.releases.pop(("latest", "failed"))
    (host.bin / "fresh").unlink()
    done = host.sync("--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert list(found) == ["results"]
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == ["updated", "current", "failed", "fresh"]
    for name, row in rows.items():
        assert set(row) == {"name", "outcome", "fromMd5", "toMd5", "seconds", "error"}
        assert isinstance(row["seconds"], (int, float)) and row["seconds"] >= 0
        assert (row["error"] is None) == (name != "failed")
    assert [row["outcome"] for row in found["results"]] == ["updated", "current", "failed", "updated"]
    assert (rows["updated"]["fromMd5"], rows["updated"]["toMd5"]) == (md5(b"updated1"), md5(b"updated2"))
    assert (rows["current"]["fromMd5"], rows["current"]["toMd5"]) == (md5(b"current1"), md5(b"current1"))
    assert (rows["fresh"]["fromMd5"], rows["fresh"]["toMd5"]) == (None, md5(b"fresh2"))
    assert rows["failed"]["toMd5"] is None and "404" in rows["failed"]["error"]


def test_the_json_of_a_rollback_a_hold_and_a_pause(manager_host: Host) -> None:
    """Outcomes rolled-back, held and paused are told as such."""
    host = manager_host
    bad = host.server.publish("manager", dies_at_once("v2"))
    [row] = json.loads(host.sync("--json").stdout)["results"]
    assert (row["outcome"], row["fromMd5"], row["toMd5"]) == ("rolled-back", md5(good("v1")), bad)
    assert row["error"] and row["seconds"] > 0
    [row] = json.loads(host.sync("--json").stdout)["results"]
    assert (row["outcome"], row["fromMd5"], row["toMd5"]) == ("held", md5(good("v1")), bad)
    assert row["error"]
    assert host.run("pause", "manager").returncode == 0
    done = host.sync("--json")
    [row] = json.loads(done.stdout)["results"]
    assert (done.returncode, row["outcome"]) == (0, "paused")


def test_a_corrupt_download_waits_before_it_is_fetched_again(host: Host) -> None:
    """Bytes that do not match are never installed; the next minutes do not fetch them again, another MD5 does."""
    offer(host, "tool")
    wrong = answering(200, b"tool!")
    host.server.always[host.server.download_path("tool")] = wrong
    assert host.outcomes() == {"tool": "failed"}
    asked = sum("download" in path for path, _ in host.server.requests)
    done = host.sync("--json")
    assert json.loads(done.stdout)["results"][0]["outcome"] == "waiting" and done.returncode == 1
    assert done.stderr == ""
    assert sum("download" in path for path, _ in host.server.requests) == asked
    host.server.always.clear()
    assert host.outcomes("--retry-held") == {"tool": "updated"}
    host.server.always[host.server.download_path("tool")] = wrong
    host.server.publish("tool", b"tool3")
    assert host.outcomes() == {"tool": "failed"}
    host.server.always.clear()
    host.server.publish("tool", b"tool4")
    assert host.outcomes() == {"tool": "updated"}
    assert content(host, "tool") == b"tool4"


# The splay


def test_a_splay_puts_an_update_off_without_sleeping(host: Host) -> None:
    """Before its time a run says so in the log, once, and ends: nothing is fetched, nothing printed, exit 0."""
    offer(host, "tool")
    for _ in range(2):
        begun = time.monotonic()
        done = host.sync("--splay", "604800")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert time.monotonic() - begun < 30
    assert host.server.downloads == 0 and content(host, "tool") == b"tool1"
    assert len(host.log().splitlines()) == 1 and "tool" in host.log()
    assert host.outcomes("--splay", "604800") == {"tool": "waiting"}
    assert host.outcomes() == {"tool": "updated"}


def test_an_update_that_is_due_is_not_put_off_any_more(host: Host) -> None:
    """Once the delay after the first sight has passed, the update is done."""
    offer(host, "tool")
    host.outcomes("--splay", "2")
    eventually(lambda: host.outcomes("--splay", "2") != {"tool": "waiting"})
    assert content(host, "tool") == b"tool2"


def test_a_splay_does_not_hold_on_a_terminal(host: Host) -> None:
    """A person who runs it wants it now."""
    offer(host, "tool")
    code, _ = on_terminal(host, "sync", "--splay", "604800")
    assert code == 0 and content(host, "tool") == b"tool2"


# One at a time


def test_two_syncs_never_work_at_the_same_time(host: Host) -> None:
    """The second one is exit 75, says nothing off a terminal and touches nothing."""
    offer(host, "tool", "other")
    host.server.publish("other", b"other1")
    with gated(host, "tool") as gate, running(host, "sync", HTTP_TIMEOUT="30") as process:
        eventually(gate.reached.is_set)
        requests, before = len(host.server.requests), listing(host)
        for arguments in ((), ("--json",), ("--only", "other"), ("--wait", "0.5"), ("--retry-held",)):
            done = host.sync(*arguments)
            assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
        assert len(host.server.requests) == requests
        assert listing(host) == before
        gate.opened.set()
        assert process.wait(30) == 0
    assert host.outcomes() == {"tool": "current", "other": "current"}


def test_many_syncs_at_once_do_the_work_once(manager_host: Host) -> None:
    """Six runs that start together: one download, one restart, the others are turned away or find nothing to do."""
    host = manager_host
    new = host.server.publish("manager", good("v2"))
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(host.sync().returncode)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {0, 75} and 0 in codes
    assert host.server.downloads == 1
    assert host.log().count("updated") == 1
    assert host.running_md5("manager") == new


def test_waiting_for_a_sync_that_is_under_way(host: Host) -> None:
    """--wait lets the other one end and then does its own work."""
    offer(host, "tool")
    with gated(host, "tool") as gate, running(host, "sync", HTTP_TIMEOUT="30") as first:
        eventually(gate.reached.is_set)
        with running(host, "sync", "--json", "--wait", "60") as second:
            time.sleep(0.5)  # for as long as the first is at work, the second must not get on
            assert second.poll() is None
            gate.opened.set()
            assert first.wait(30) == 0
            out, err = second.communicate(timeout=60)
            assert (second.returncode, err) == (0, "")
    assert json.loads(out)["results"][0]["outcome"] == "current"


def test_a_sync_that_takes_over_a_quarter_of_an_hour_is_told(host: Host) -> None:
    """Off a terminal 75 is silent for 15 minutes, then says since when the other one has been at work."""
    offer(host, "tool")
    with gated(host, "tool") as gate, running(host, "sync", HTTP_TIMEOUT="30"):
        eventually(gate.reached.is_set)
        for age, told in ((14 * 60, False), (16 * 60, True)):
            since = time.time() - age
            os.utime(host.state / "lock", (since, since))
            done = host.sync()
            assert (done.returncode, done.stdout) == (75, "")
            stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
            assert (stamp in done.stderr) is told and len(done.stderr.splitlines()) == int(told)


def test_on_a_terminal_a_sync_under_way_is_told(host: Host) -> None:
    """A person is told since when another one has been at work."""
    offer(host, "tool")
    with gated(host, "tool") as gate, running(host, "sync", HTTP_TIMEOUT="30"):
        eventually(gate.reached.is_set)
        code, shown = on_terminal(host, "sync")
        assert code == 75
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d", shown)


def test_a_lock_that_a_dead_run_left_is_no_lock(host: Host) -> None:
    """The lock ends with the process that holds it: files that lie about lock nobody out."""
    offer(host, "tool")
    assert host.sync("--only", "tool").returncode == 0
    host.server.publish("tool", b"tool3")
    with running(host, "sync", HTTP_TIMEOUT="30") as process, gated(host, "tool"):
        process.kill()
        process.wait()
    assert (host.state / "lock").exists()
    assert host.sync().returncode == 0
    with open(host.state / "lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert host.sync().returncode == 75
    assert host.sync().returncode == 0


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_during_a_download_ends_the_run_tidily(host: Host, signum: signal.Signals) -> None:
    """Exit 128+N at once; host and manifest as before, nothing left but the part file; the next run goes on."""
    offer(host, "tool")
    manifest = host.manifest_path.read_bytes()
    host.server.always[host.server.download_path("tool")] = slowly(400, 0.05)
    with running(host, "sync", HTTP_TIMEOUT="10") as process:
        part = part_of(host, "tool", b"tool2")
        eventually(lambda: part.exists() and part.stat().st_size)
        process.send_signal(signum)
        out, err = process.communicate(timeout=15)
    assert (process.returncode, out) == (128 + signum, "")
    assert "Traceback" not in err and len(err.splitlines()) <= 1
    assert content(host, "tool") == b"tool1" and host.manifest_path.read_bytes() == manifest
    assert host.strays() == [str(part.relative_to(host.root))]
    assert stat.S_IMODE(part.stat().st_mode) == 0o600
    host.server.always.clear()
    assert host.outcomes() == {"tool": "updated"}
    assert host.strays() == []


def test_a_signal_while_bin_manager_is_asked(host: Host) -> None:
    """Also a run that waits for an answer ends at once."""
    offer(host, "tool")
    gate = Gate()
    host.server.always["*"] = gate
    with running(host, "sync", HTTP_TIMEOUT="30") as process:
        eventually(gate.reached.is_set)
        process.terminate()
        assert process.wait(15) == 143
    gate.opened.set()
    assert content(host, "tool") == b"tool1"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_swap_lets_the_update_be_finished(manager_host: Host, signum: signal.Signals) -> None:
    """Once the swap has begun, the service is restarted, watched and recorded; only then does the run end, 128+N."""
    host = manager_host
    new = host.server.publish("manager", good("v2"))
    with running(host, "sync", MIN_HEALTHY_SECONDS="2") as process:
        eventually(lambda: host.disk_md5("manager") == new)
        process.send_signal(signum)
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
    assert host.disk_md5("manager") == host.running_md5("manager") == host.reported("manager") == new
    assert host.strays() == []
    assert "manager: updated" in host.log()


def test_a_signal_after_the_swap_of_a_bad_release_lets_it_be_undone(manager_host: Host) -> None:
    """The roll-back is completed, too, before the run ends; the others are not begun any more."""
    host = manager_host
    host.server.publish("later", b"later2")
    host.write_manifest("manager", tool("later"))
    bad = host.server.publish("manager", dies_at_once("v2"))
    with gated(host, "later") as gate, running(host, "sync", HTTP_TIMEOUT="30") as process:
        eventually(lambda: host.disk_md5("manager") == bad)
        process.terminate()
        assert process.wait(60) == 143
        assert gate.reached.is_set() or True
    assert host.disk_md5("manager") == host.running_md5("manager") == md5(good("v1"))
    assert host.strays() in ([], [f"bin/.later.{md5(b'later2')}.part"])
    assert not (host.bin / "later").exists()
    assert host.outcomes() == {"manager": "held", "later": "updated"}


def test_a_signal_is_not_forgotten_where_the_swap_fails(host: Host) -> None:
    """A signal that comes while an update is being refused ends the run after that, with 128+N."""
    offer(host, "tool", "later")
    answers = host.root / "answers"
    ctl = host.root / "ctl"
    # The first answer, before the download, is well; the second, right before the swap, is slow and then an error.
    ctl.write_text(
        f'#!/bin/sh\necho x >> {answers}\n[ $(wc -l < {answers}) = 1 ] && echo "tool RUNNING pid 1, uptime 0:00:01" '
        f"&& exit 0\nsleep 2\necho refused connection\nexit 4\n"
    )
    ctl.chmod(0o755)
    host.write_manifest({**tool(), "service": "tool"}, tool("later"))
    with gated(host, "later"), running(host, "sync", SUPERVISORCTL=str(ctl), HTTP_TIMEOUT="30") as process:
        eventually(lambda: answers.exists() and len(answers.read_text().splitlines()) == 2)
        process.terminate()
        assert process.wait(30) == 143
    assert content(host, "tool") == b"tool1"
    assert [stray for stray in host.strays() if not stray.endswith(".part")] == []


def test_ctrl_c_on_a_terminal(host: Host) -> None:
    """Exit 130, without a traceback."""
    offer(host, "tool")
    with gated(host, "tool") as gate:

        def press(pid: int) -> None:
            gate.reached.wait(20)
            os.kill(pid, signal.SIGINT)

        code, _ = on_terminal(host, "sync", act=press, HTTP_TIMEOUT="30")
    assert code == 130
    assert content(host, "tool") == b"tool1"


# What is told, and where


def down(host: Host) -> None:
    host.server.stop()


def test_new_trouble_is_one_line_then_silence_then_its_end_in_the_log(host: Host) -> None:
    """New trouble is one line on stderr; the same is silent in the following minutes; the log tells its end."""
    offer(host, "tool", "fine")
    host.server.publish("fine", b"fine1")
    host.server.releases.pop(("latest", "tool"))
    done = host.sync()
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "tool" in done.stderr and "404" in done.stderr
    assert len(host.log().splitlines()) == 1 and "404" in host.log()
    for _ in range(3):
        done = host.sync()
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert len(host.log().splitlines()) == 1
    host.server.publish("tool", b"tool1")
    done = host.sync()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(host.log().splitlines()) == 2
    assert re.search(r"tool: .*over", host.log().splitlines()[-1])
    host.server.releases.pop(("latest", "tool"))
    assert len(host.sync().stderr.splitlines()) == 1


def test_other_words_for_the_same_trouble_are_no_news(host: Host) -> None:
    """Binary, kind and release make a trouble; the wording does not."""
    offer(host, "tool")
    path = host.server.md5_path("tool")
    answers = iter(range(500, 600))
    host.server.always[path] = lambda handler: handler.answer(404, {"code": next(answers), "message": "no"})  # type: ignore[func-returns-value]
    assert len(host.sync().stderr.splitlines()) == 1
    assert host.sync().stderr == ""
    assert len(host.log().splitlines()) == 1


@pytest.mark.parametrize("between", ["bin-manager is down", "a pause"])
def test_what_comes_between_makes_no_news_of_an_old_trouble(host: Host, between: str) -> None:
    """A release that is held stays so while nobody can ask, or wants to know; it is not told again, nor as over."""
    host.write_manifest({**tool("tool"), "verifyCommand": ["/bin/false"]}, tool("fine"))
    host.server.publish("tool", b"tool1")
    host.server.publish("fine", b"fine1")
    assert "held" in host.sync().stderr
    if between == "a pause":
        assert host.run("pause", "tool").returncode == 0
        assert host.sync().stderr == ""
        assert host.run("resume", "tool").returncode == 0
    else:
        host.server.stop()
        assert len(host.sync().stderr.splitlines()) == 1
        host.server.start()
    done = host.sync()
    assert (done.returncode, done.stderr) == (1, "")
    ends = [line for line in host.log().splitlines() if "over after" in line]
    if between == "a pause":
        assert ends == []
    else:
        assert len(ends) == 2 and all("cannot be reached" in line for line in ends), "of each that it struck"
    host.server.publish("tool", b"tool2")
    host.write_manifest(tool("tool"), tool("fine"))
    assert host.sync().returncode == 0
    assert re.search("tool: over after .*held", host.log().splitlines()[-1])


def test_trouble_with_supervisor_after_trouble_with_the_folder_is_told(host: Host) -> None:
    """They are mended by different people, or commands: the second must not hide behind the first."""
    offer(host, "tool")
    host.write_manifest(tool(service="nobody"))
    host.bin.rename(host.root / "elsewhere")
    host.bin.write_bytes(b"")
    assert len(host.sync().stderr.splitlines()) == 1
    host.bin.unlink()
    (host.root / "elsewhere").rename(host.bin)
    host.start_supervisord()
    done = host.sync()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "nobody" in done.stderr
    assert host.sync().stderr == ""


def test_another_trouble_of_the_same_binary_is_told(host: Host) -> None:
    """A binary whose trouble becomes another one is new trouble."""
    offer(host, "tool")
    host.server.releases.pop(("latest", "tool"))
    assert "404" in host.sync().stderr
    host.server.publish("tool", b"tool2")
    host.server.always[host.server.download_path("tool")] = answering(200, b"wrong")
    done = host.sync()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "404" not in done.stderr


@pytest.mark.parametrize("how", ["refused", "error 500", "silent", "closed", "not found"])
def test_one_cause_that_strikes_all_is_one_line(host: Host, how: str) -> None:
    """With bin-manager down in whatever way, cron mails one line, not one for each binary."""
    names = [f"tool{at}" for at in range(12)]
    offer(host, *names)
    if how == "refused":
        host.server.stop()
    elif how == "error 500":
        host.server.always["*"] = answering(500, b"oops")
    elif how == "silent":
        host.server.always["*"] = Gate()
    elif how == "closed":

        def close(handler: Handler) -> bool:
            handler.close_connection = True
            return False

        host.server.always["*"] = close
    else:
        host.server.always["*"] = answering(404, b"no such API")
    done = host.sync(HTTP_TIMEOUT="0.5")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "tool0" in done.stderr
    assert len(host.log().splitlines()) == 1, host.log()
    assert host.sync(HTTP_TIMEOUT="0.5").stderr == ""
    for name in names:
        assert content(host, name) == name.encode() + b"1"


def later(host: Host, minutes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a sync with a clock that is ahead."""
    require("faketime")
    return subprocess.run(
        ["faketime", "-f", f"{minutes:+d}m", *host.command("sync", *arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env=host.environment(),
    )


def test_lasting_trouble_is_in_the_log_every_hour(host: Host) -> None:
    """The same trouble is silent for cron for ever, and one line an hour in the log."""
    offer(host, "tool")
    host.server.releases.pop(("latest", "tool"))
    host.sync()
    for minutes, lines in ((30, 1), (61, 2), (90, 2), (122, 3)):
        done = later(host, minutes)
        assert (done.returncode, done.stderr, done.stdout) == (1, "", "")
        assert len(host.log().splitlines()) == lines, minutes


def test_a_pause_ends_when_its_time_has_come(host: Host) -> None:
    """A corrupt download is fetched again after a minute, and after the second failure not before two more."""
    offer(host, "tool")
    host.server.always[host.server.download_path("tool")] = answering(200, b"tool!")

    def tried(minutes: int) -> bool:
        before = len(host.server.requests)
        assert later(host, minutes).returncode == 1
        return any("download" in path for path, _ in host.server.requests[before:])

    assert host.sync().returncode == 1
    assert [tried(0), tried(2), tried(3), tried(5)] == [False, True, False, True]
    assert tried(-600), "a clock that jumped back must not make it wait"


def test_a_quiet_minute_adds_no_line(host: Host) -> None:
    """Nothing changed: nothing printed, nothing logged, no file of the host touched."""
    offer(host, "tool")
    assert host.sync().returncode == 0
    log = host.log()
    host.sync()
    before = listing(host)
    done = host.sync()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.log() == log
    changed = {path for path, found in listing(host).items() if before.get(path) != found}
    assert all(path.startswith(str(host.state)) for path in changed)


@pytest.mark.parametrize("obstacle", ["a folder", "no folder", "a full disk"])
def test_a_log_that_cannot_be_written_is_said_and_the_work_goes_on(host: Host, obstacle: str) -> None:
    """The update is done all the same; one line on stderr names the log, and is not repeated every minute."""
    offer(host, "tool")
    log = {"a folder": host.bin, "no folder": host.root / "absent" / "log", "a full disk": Path("/dev/full")}[obstacle]
    done = host.sync(LOG_FILE=str(log))
    assert done.returncode in (0, 1) and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(log) in done.stderr
    assert content(host, "tool") == b"tool2" and host.reported("tool") == md5(b"tool2")
    assert host.sync(LOG_FILE=str(log)).stderr == ""


def test_trouble_is_told_with_a_log_that_cannot_be_written(host: Host) -> None:
    """Where the only line of the run is a failure, both are said: the failure and the log."""
    offer(host, "tool")
    host.server.releases.pop(("latest", "tool"))
    log = host.root / "absent" / "log"
    done = host.sync(LOG_FILE=str(log))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2 and str(log) in done.stderr and "404" in done.stderr
    assert host.sync(LOG_FILE=str(log)).stderr == ""


def test_every_run_opens_the_log_anew(host: Host) -> None:
    """After logrotate has moved the file, the next line makes a new one; an existing one is appended to."""
    offer(host, "tool")
    host.log_path.write_text("earlier\n")
    host.sync()
    assert host.log().startswith("earlier\n[") and len(host.log().splitlines()) == 2
    host.log_path.rename(host.root / "log.1")
    host.server.publish("tool", b"tool3")
    host.sync()
    assert len(host.log().splitlines()) == 1
    assert stat.S_IMODE(host.log_path.stat().st_mode) & 0o022 == 0


def test_what_bin_manager_says_cannot_forge_lines(host: Host) -> None:
    """One event is one line, on stderr and in the log; control characters are escaped wherever they are shown."""
    offer(host, "tool")
    words = "no\n[2020-01-01 00:00:00] tool: updated\r\x1b[31mred\x07\u2028\u202e\x00\ud800"
    host.server.always["*"] = answering(404, {"code": 7, "message": words})
    done = host.sync()
    assert done.returncode == 1
    for text in (done.stderr, host.log()):
        assert len(text.splitlines()) == 1 and text.endswith("\n")
        assert text.rstrip("\n").isprintable()
        assert "\\n[2020" in text and "\\x1b[31m" in text
    dry = host.sync("--dry-run").stdout
    assert len(dry.splitlines()) == 1 and dry.rstrip("\n").isprintable()
    assert "\x1b" not in host.sync("--json").stdout
    code, shown = on_terminal(host, "sync")
    assert code == 1 and "\x1b[31mred" not in shown and "\x07" not in shown


@pytest.mark.parametrize("environment", [{"LANG": "C", "LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_names_that_the_terminal_cannot_show_are_no_traceback(host: Host, environment: dict[str, str]) -> None:
    """cron's locale is C: what it cannot print is escaped."""
    offer(host, "tool")
    host.server.always["*"] = answering(404, {"code": 7, "message": "nö €"})
    done = host.sync(**environment)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


# Manifest


def test_a_manifest_that_cannot_be_written_is_told_and_undoes_nothing(host: Host) -> None:
    """On a read-only filesystem: the release is installed, the trouble is told once, and in the end it is recorded."""
    offer(host, "tool")
    folder = host.root / "etc"
    with tmpfs(folder):
        manifest = folder / "m.json"
        manifest.write_bytes(host.manifest_path.read_bytes())
        host.manifest_path = manifest
        host.settings["BIN_MANIFESTS"] = str(manifest)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        done = host.sync()
        assert len(done.stderr.splitlines()) == 1 and str(manifest) in done.stderr
        assert content(host, "tool") == b"tool2"
        for _ in range(2):
            assert host.sync().stderr == ""
        assert host.server.downloads == 1
        assert "over" not in host.log()
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        done = host.sync()
        assert (done.returncode, done.stderr) == (0, "")
        assert host.reported("tool") == md5(b"tool2")
        assert "over" in host.log()
        assert os.listdir(folder) == ["m.json"]


def test_an_entry_without_currentmd5_is_updated_and_gains_nothing(host: Host) -> None:
    """A manifest that configuration management owns stays as it was, byte for byte and inode for inode."""
    offer(host, "tool")
    host.manifest_path.write_text('{"binaries":[{"name":"tool","service":false}]}')
    before = unread(host.manifest_path.stat())
    assert host.outcomes() == {"tool": "updated"}
    assert unread(host.manifest_path.stat()) == before


def test_an_empty_manifest_is_well(host: Host) -> None:
    """No binaries: nothing to do, exit 0."""
    host.write_manifest()
    done = host.sync("--json")
    assert done.returncode == 0 and json.loads(done.stdout) == {"results": []}


# On a terminal


def test_a_terminal_is_told_what_happens(host: Host) -> None:
    """A person sees each binary's outcome; a progress bar shows a download that takes its time."""
    host.install("big", b"big1")
    host.install("same", b"same1")
    host.server.publish("same", b"same1")
    release = b"big2" * 500_000
    host.server.publish("big", release)
    host.write_manifest(tool("big"), tool("same"))

    def send(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(release)))
        handler.end_headers()
        for at in range(0, len(release), 250_000):
            handler.wfile.write(release[at : at + 250_000])
            time.sleep(0.2)
        return False

    host.server.always[host.server.download_path("big")] = send
    code, shown = on_terminal(host, "sync")
    assert code == 0
    assert re.search(r"\bbig\b.*updated", shown) and re.search(r"\bsame\b.*current", shown)
    assert re.search(r"\[#+-*\]", shown) and re.search(r"\d+%", shown)
    assert content(host, "big") == release


def test_a_terminal_is_told_trouble_every_time(host: Host) -> None:
    """What cron has heard already is told to a person again."""
    offer(host, "tool")
    host.server.releases.pop(("latest", "tool"))
    assert "404" in host.sync().stderr
    for _ in range(2):
        code, shown = on_terminal(host, "sync")
        assert code == 1 and "404" in shown
    assert host.sync().stderr == ""


def test_no_colour_where_it_is_not_wanted(host: Host) -> None:
    """With NO_COLOR, and off a terminal in any case, no escape sequence colours anything."""
    offer(host, "tool", "gone")
    host.server.releases.pop(("latest", "gone"))
    _, shown = on_terminal(host, "sync", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*m", shown)
    host.server.publish("tool", b"tool3")
    done = host.run("-v", "sync")
    assert "\x1b" not in done.stdout + done.stderr


def test_json_on_a_terminal_is_json_alone(host: Host) -> None:
    """--json prints one JSON document and no progress."""
    offer(host, "tool")
    code, shown = on_terminal(host, "sync", "--json")
    assert code == 0
    assert json.loads(shown)["results"][0]["outcome"] == "updated"


def test_quiet_and_verbose(host: Host) -> None:
    """--quiet tells a terminal trouble only; --verbose tells every request off a terminal, too, and no token."""
    offer(host, "tool")
    code, shown = on_terminal(host, "-q", "sync")
    assert (code, shown.strip()) == (0, "")
    host.server.publish("tool", b"tool3")
    done = host.run("-v", "sync", BIN_MANAGER_TOKEN="s3cr3t-token")
    assert done.returncode == 0
    told = done.stdout + done.stderr
    assert "latest/tool/md5" in told and "latest/tool/download" in told
    assert "s3cr3t" not in told + host.log()


def test_a_reader_that_has_gone_stops_nothing(host: Host) -> None:
    """`sync -v | head -1` closes the pipe in the middle: the update is finished all the same."""
    offer(host, *(f"tool{at}" for at in range(8)))
    process = subprocess.Popen(
        host.command("-v", "sync"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=REPOSITORY,
        env=host.environment(),
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (0, 1, 128 + signal.SIGPIPE, -signal.SIGPIPE)
    for at in range(8):
        assert content(host, f"tool{at}") == f"tool{at}2".encode()


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--unknown"],
            ["sync", "--unknown"],
            ["sync", "extra"],
            ["nonsense"],
            ["sync", "--wait"],
            ["sync", "--only"],
        ),
        *(["sync", "--wait", "soon"], ["sync", "--wait", "-1"], ["sync", "--splay", "-1"], ["sync", "--config", "x"]),
        *(["sync", "--wait", "nan"], ["sync", "--splay", "nan"], ["sync", "--splay", "inf"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2(host: Host, arguments: list[str]) -> None:
    """A command line that cannot be meant touches nothing and says what is wrong."""
    offer(host, "tool")
    before = listing(host)
    done = host.run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert host.server.requests == [] and listing(host) == before


def test_a_state_folder_that_cannot_be_had_is_one_line(host: Host) -> None:
    """Exit 1 before anything is asked or touched."""
    offer(host, "tool")
    (host.root / "file").write_bytes(b"")
    done = host.sync(STATE_DIR=str(host.root / "file" / "state"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert content(host, "tool") == b"tool1" and host.server.requests == []
    assert str(host.root / "file") in done.stderr
