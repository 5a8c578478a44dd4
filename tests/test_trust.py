"""Root takes no orders from a file that others may write or swap, and none of our files leads to another's."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require, require_root
from tests.host import Host, good, md5
from tests.server import BinManagerServer, Handler

NOBODY = 65534
V1, V2 = good("v1"), good("v2", 300_000)
PART = f".tool.{md5(V2)}.part"

Attack = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def as_root() -> None:
    require_root()


@pytest.fixture
def tool(host: Host) -> Host:
    """A host with "tool" v1 and a bin-manager that has v2; nobody may look into its folders, apart from 0700 ones."""
    host.root.chmod(0o755)
    host.install("tool", V1)
    host.server.publish("tool", V2)
    host.write_manifest({"name": "tool", "currentMd5": "", "service": False})
    return host


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    require("setpriv")
    # By way of a shell, as setpriv itself keeps root's capabilities until it has executed something.
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", 'exec "$0" "$@"']
    return subprocess.run([*become, *command], capture_output=True, text=True, timeout=30, cwd="/")


# Orders: each attack gets the path of a sound file in a sound folder, spoils it, and returns the path to use.


def _move(path: Path, folder: Path) -> Path:
    return Path(shutil.move(path, folder / path.name))


def world_writable(path: Path) -> Path:
    path.chmod(0o666)
    return path


def group_writable(path: Path) -> Path:
    os.chown(path, 0, NOBODY)
    path.chmod(0o664)
    return path


def foreign_owner(path: Path) -> Path:
    os.chown(path, NOBODY, 0)
    return path


def by_acl(path: Path) -> Path:
    require("setfacl")
    subprocess.run(["setfacl", "-m", "u:nobody:rw", path], check=True)
    return path


def open_folder(path: Path) -> Path:
    path.parent.chmod(0o777)
    return path


def folder_of_a_group(path: Path) -> Path:
    os.chown(path.parent, 0, NOBODY)
    path.parent.chmod(0o775)
    return path


def folder_by_acl(path: Path) -> Path:
    require("setfacl")
    subprocess.run(["setfacl", "-m", "u:nobody:rwx", path.parent], check=True)
    return path


def folder_of_somebody(path: Path) -> Path:
    os.chown(path.parent, NOBODY, 0)
    return path


def sticky_folder_of_somebody(path: Path) -> Path:
    path.parent.chmod(0o1777)
    return folder_of_somebody(path)


def open_folder_above(path: Path) -> Path:
    below = path.parent / "below"
    below.mkdir(0o755)
    path.parent.chmod(0o777)
    return _move(path, below)


def link_of_somebody(path: Path) -> Path:
    """In a sticky folder, as /tmp is: its owner can have it lead elsewhere at any instant."""
    sticky = path.parent / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "link").symlink_to(path)
    os.lchown(sticky / "link", NOBODY, NOBODY)
    return sticky / "link"


def link_by_way_of_an_open_folder(path: Path) -> Path:
    """Ours -> a link in a folder that anyone may write -> a sound file: only the middle is rotten."""
    middle, start = path.parent / "middle", path.parent / "start"
    middle.mkdir()
    middle.chmod(0o777)
    start.mkdir(0o755)
    (middle / "link").symlink_to(path)
    (start / "link").symlink_to(middle / "link")
    return start / "link"


def folder_by_way_of_an_open_folder(path: Path) -> Path:
    """The same with a link to the folder of the file."""
    middle = path.parent / "middle"
    middle.mkdir()
    middle.chmod(0o777)
    (middle / "folder").symlink_to(path.parent)
    (path.parent / "start").symlink_to(middle / "folder")
    return path.parent / "start" / path.name


def link_by_way_of_two_dots(path: Path) -> Path:
    """`..` behind a link is the folder above the link's target, where the file that will be read is a rotten one."""
    (path.parent / "releases" / "42").mkdir(parents=True)
    (path.parent / "current").symlink_to("releases/42")
    world_writable(Path(shutil.copy2(path, path.parent / "releases")))
    (path.parent / "start").symlink_to(f"{path.parent}/current/../{path.name}")
    return path.parent / "start"


FILE_ATTACKS = [world_writable, group_writable, foreign_owner, by_acl]
WAY_ATTACKS = [
    open_folder,
    folder_of_a_group,
    folder_by_acl,
    folder_of_somebody,
    sticky_folder_of_somebody,
    open_folder_above,
    link_of_somebody,
    link_by_way_of_an_open_folder,
    folder_by_way_of_an_open_folder,
    link_by_way_of_two_dots,
]
CASES = [("config", attack) for attack in FILE_ATTACKS + WAY_ATTACKS]
CASES += [(kind, attack) for kind in ("token", "manifest") for attack in (*FILE_ATTACKS, open_folder, link_of_somebody)]


def orders(host: Host, kind: str) -> tuple[Path, str]:
    """A sound file of that kind in a sound folder of its own, and the setting that names it."""
    folder = host.root / "orders"
    folder.mkdir(0o755)
    path = folder / kind
    if kind == "manifest":
        shutil.copy(host.manifest_path, path)
        del host.settings["BIN_MANIFESTS"]
        return path, "BIN_MANIFESTS"
    path.write_text("JOBS=2\n" if kind == "config" else "a-token\n")
    path.chmod(0o644)
    return path, "BIN_PROXY_CONFIG" if kind == "config" else "BIN_MANAGER_TOKEN_FILE"


def test_a_link_that_only_looks_like_a_circle_is_followed(tool: Host) -> None:
    """`..` behind a link leads elsewhere, so `sub/../config` is not the file of that name beside `sub`."""
    real = tool.root / "real"
    (real / "sub").mkdir(parents=True)
    (real / "config").write_text("JOBS=2\n")
    (tool.root / "orders").mkdir()
    (tool.root / "orders" / "sub").symlink_to(real / "sub")
    (tool.root / "orders" / "config").symlink_to("sub/../config")
    done = tool.sync(BIN_PROXY_CONFIG=str(tool.root / "orders" / "config"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("kind", "attack"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_orders_that_others_could_change_are_refused(tool: Host, kind: str, attack: Attack) -> None:
    """Exit 2, nothing asked, nothing touched, and the commands that are told mend it."""
    path, setting = orders(tool, kind)
    path = attack(path)
    done = tool.sync(**{setting: str(path)})
    for _ in range(3):
        assert (done.returncode, done.stdout) == (2, ""), "it was accepted"
        assert tool.disk_md5("tool") == md5(V1)
        assert tool.server.requests == []
        assert str(path) in done.stderr
        for line in done.stderr.splitlines():
            subprocess.run(line.rpartition(": ")[2], shell=True, check=True)
        done = tool.sync(**{setting: str(path)})
        if done.returncode != 2:
            break
    assert done.returncode == 0, done.stderr


def of_roots_group(path: Path) -> Path:
    path.chmod(0o664)
    return path


def sticky_folder(path: Path) -> Path:
    path.parent.chmod(0o1777)
    return path


def own_link(path: Path) -> Path:
    (path.parent / "link").symlink_to(path)
    return path.parent / "link"


@pytest.mark.parametrize("kind", ["config", "manifest", "token"])
@pytest.mark.parametrize("harmless", [of_roots_group, sticky_folder, own_link], ids=lambda value: value.__name__)
def test_orders_that_only_root_can_change_are_taken(tool: Host, kind: str, harmless: Attack) -> None:
    path, setting = orders(tool, kind)
    assert tool.sync(**{setting: str(harmless(path))}).returncode == 0


@pytest.mark.parametrize("kind", ["config", "manifest", "token"])
def test_a_pipe_in_place_of_orders_is_not_waited_for(tool: Host, kind: str) -> None:
    """A named pipe would hold up a run a minute, for ever, before it has the lock."""
    path, setting = orders(tool, kind)
    path.unlink()
    os.mkfifo(path, 0o600)
    done = tool.run("sync", timeout=20, **{setting: str(path)})
    assert done.returncode == 2
    assert str(path) in done.stderr


def test_a_device_by_way_of_somebodys_link_is_refused(tool: Host) -> None:
    """/dev/null is a sound config, but not by a link that leads to somebody's terminal a moment later."""
    path, setting = orders(tool, "config")
    path.unlink()
    path.symlink_to("/dev/null")
    assert tool.sync(**{setting: str(path)}).returncode == 0
    assert tool.sync(**{setting: str(link_of_somebody(path))}).returncode == 2


@pytest.mark.parametrize("spoil", [foreign_owner, world_writable, link_of_somebody], ids=lambda value: value.__name__)
def test_a_state_folder_of_another_user(tool: Host, spoil: Attack) -> None:
    """Its journal says which file is to be replaced by which: whoever may write there could replace any file."""
    victim = tool.root / "victim"
    victim.write_bytes(V1)
    planted = b"#!/bin/sh\necho planted\n"
    for folder in ("journal", "backups/tool"):
        (tool.state / folder).mkdir(parents=True)
    (tool.state / "backups/tool" / md5(planted)).write_bytes(planted)
    record = {"version": 1, "name": "tool", "target": str(victim), "old": md5(planted), "new": md5(V1), "inode": 0}
    record |= {"processes": {}, "healthy": True, "probed": False, "by": "sync", "since": 0.0}
    record |= {"phase": "rolling-back", "fault": "host", "reason": "planted"}
    (tool.state / "journal/tool.json").write_text(json.dumps(record))
    tool.state.chmod(0o755)
    path = spoil(tool.state)
    done = tool.sync(STATE_DIR=str(path))
    assert victim.read_bytes() == V1
    assert done.returncode in (1, 2)
    assert str(path) in done.stderr


# What belongs to root alone


def test_nobody_reaches_a_backup_with_set_id_bits(tool: Host) -> None:
    """A set-id release with a hole is replaced for a reason: its backup must be out of reach."""
    tool.install("tool", V1, 0o4755)
    assert tool.sync().returncode == 0
    backup = tool.state / "backups/tool" / md5(V1)
    assert backup.stat().st_mode & stat.S_ISUID
    assert as_nobody("cat", str(tool.state / "state.json")).returncode == 0
    assert "denied" in as_nobody("cat", str(backup)).stderr
    assert "denied" in as_nobody(str(backup), "0").stderr
    assert stat.S_IMODE((tool.state / "backups").stat().st_mode) == 0o700


def test_a_backups_folder_that_others_may_enter_is_closed(tool: Host) -> None:
    """Also one that a restore, or an operator's mkdir, made 0755."""
    tool.install("tool", V1, 0o4755)
    (tool.state / "backups").mkdir(parents=True, mode=0o755)
    tool.sync()
    assert "denied" in as_nobody("cat", str(tool.state / "backups/tool" / md5(V1))).stderr


def test_nobody_else_can_hold_the_lock(tool: Host) -> None:
    """flock(2) needs no more than a descriptor for reading: who may read the lock could stop all updates."""
    require("flock")
    assert tool.sync().returncode == 0
    done = as_nobody("flock", "--nonblock", str(tool.state / "lock"), "true")
    assert done.returncode != 0
    assert "denied" in done.stderr


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_the_callers_umask_decides_nothing(tool: Host, mask: int) -> None:
    """Cron's, or a careless operator's: nothing of ours can be written by others, and status can be read by all."""
    shutil.rmtree(tool.state, ignore_errors=True)
    nested = tool.root / "var/lib/state"
    settings = {"STATE_DIR": str(nested), "METRICS_FILE": str(tool.root / "bin-proxy.prom")}
    done = subprocess.run(
        tool.command("sync"),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
        env=tool.environment(**settings),
        umask=mask,
    )
    assert done.returncode == 0, done.stderr
    for path in [tool.root / "bin-proxy.prom", tool.log_path, *(tool.root / "var").rglob("*"), tool.root / "var"]:
        assert not path.stat().st_mode & 0o022, path
    assert stat.S_IMODE(nested.stat().st_mode) == 0o755
    assert stat.S_IMODE((tool.bin / "tool").stat().st_mode) == 0o755
    assert as_nobody("cat", str(nested / "state.json"), str(tool.root / "bin-proxy.prom")).returncode == 0


def test_a_download_under_way_is_root_s_alone(tool: Host) -> None:
    """Before it is verified, nobody else can read, run or write the staged file."""
    seen: list[int] = []

    def look(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(V2)))
        handler.end_headers()
        handler.wfile.write(V2[:200_000])
        seen.extend(path.stat().st_mode for path in tool.bin.glob(".tool.*.part"))
        handler.wfile.write(V2[200_000:])
        return False

    tool.server.always[BinManagerServer.download_path("tool")] = look
    tool.install("tool", V1, 0o4777)
    assert tool.sync().returncode == 0
    assert [stat.S_IMODE(mode) for mode in seen] == [0o600]


# Links that lie where one of our files is to be made

PLACES = {
    "part": f"bin/{PART}",
    "manifest": ".manifest.json.bin-proxy.tmp",
    "state": "state/.state.json.bin-proxy.tmp",
    "cache": "state/.cache.json.bin-proxy.tmp",
    "cache itself": "state/cache.json",
    "journal": "state/journal/.tool.json.bin-proxy.tmp",
    "backup": f"state/backups/tool/{md5(V1)}.tmp",
    "backup itself": f"state/backups/tool/{md5(V1)}",
    "pauses": "state/.pauses.json.bin-proxy.tmp",
    "metrics": ".bin-proxy.prom.bin-proxy.tmp",
    "metrics itself": "bin-proxy.prom",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_planted_link_leads_nowhere(tool: Host, place: str, how: str) -> None:
    """The file behind a link that lies at a predictable name of ours keeps its bytes, mode and owner."""
    victim = tool.root / "victim"
    victim.write_bytes(b"victim")
    victim.chmod(0o640)
    os.chown(victim, NOBODY, NOBODY)
    link = tool.root / PLACES[place]
    link.parent.mkdir(parents=True, exist_ok=True)
    if how == "symbolic":
        link.symlink_to(victim)
    else:
        os.link(victim, link)
    before = victim.stat()
    settings = {"METRICS_FILE": str(tool.root / "bin-proxy.prom")}
    if place == "pauses":
        tool.run("pause", "tool", **settings)
        tool.run("resume", "tool", **settings)
    # What lies at the name of the cache itself is told and set aside, as it is no cache.
    assert tool.sync(**settings).returncode == (place == "cache itself")
    after = victim.stat()
    assert victim.read_bytes() == b"victim"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert tool.disk_md5("tool") == md5(V2)
    assert not link.is_symlink()
    assert not link.exists() or link.stat().st_ino != before.st_ino


@pytest.mark.parametrize("content", [b"victim", None], ids=["present", "dangling"])
def test_a_lock_that_is_a_link_leads_nowhere(tool: Host, content: bytes | None) -> None:
    """It is neither emptied nor made; that a lock cannot be had is one line."""
    victim = tool.root / "victim"
    if content:
        victim.write_bytes(content)
        victim.chmod(0o640)
    tool.state.mkdir()
    (tool.state / "lock").symlink_to(victim)
    done = tool.sync()
    assert (victim.read_bytes() if victim.exists() else None) == content
    assert not content or stat.S_IMODE(victim.stat().st_mode) == 0o640
    if done.returncode:
        [line] = done.stderr.splitlines()
        assert str(tool.state) in line
        assert tool.disk_md5("tool") == md5(V1)


def test_a_dangling_log_link_makes_no_file(tool: Host) -> None:
    """A new log is never made through a link; that is said, and the work goes on."""
    victim = tool.root / "victim"
    tool.log_path.symlink_to(victim)
    done = tool.sync()
    assert not victim.exists()
    assert str(tool.log_path) in done.stderr
    assert tool.disk_md5("tool") == md5(V2)


def test_a_restored_backup_follows_no_planted_link(tool: Host) -> None:
    """Going back stages a file at a predictable name, too."""
    assert tool.sync().returncode == 0
    victim = tool.root / "victim"
    victim.write_bytes(b"victim")
    (tool.bin / f".tool.{md5(V1)}.part").symlink_to(victim)
    assert tool.run("rollback", "tool").returncode == 0
    assert victim.read_bytes() == b"victim"
    assert tool.disk_md5("tool") == md5(V1)
    assert not (tool.bin / "tool").is_symlink()


# Planted parts


def plant(host: Host, data: bytes, mode: int = 0o600) -> Path:
    part = host.bin / PART
    part.write_bytes(data)
    part.chmod(mode)
    return part


def ranges(host: Host) -> list[str | None]:
    return [headers.get("Range") for path, headers in host.server.requests if path.endswith("/download")]


@pytest.mark.parametrize("how", ["owner", "group", "world", "hard link", "link", "pipe"])
def test_a_part_that_others_had_a_hand_in_is_not_used(tool: Host, how: str) -> None:
    """Not even one byte of it: the download begins at the first."""
    part = plant(tool, V2[:100_000])
    other = tool.root / "other"
    if how == "owner":
        os.chown(part, NOBODY, NOBODY)
    elif how in ("group", "world"):
        part.chmod(0o660 if how == "group" else 0o602)
    elif how == "hard link":
        os.link(part, other)
    elif how == "link":
        part.rename(other)
        part.symlink_to(other)
    else:
        part.unlink()
        os.mkfifo(part, 0o600)
    assert tool.sync().returncode == 0
    assert ranges(tool) == [None]
    assert tool.disk_md5("tool") == md5(V2)
    assert (tool.bin / "tool").stat().st_nlink == 1
    assert (tool.bin / "tool").stat().st_uid == 0
    assert not other.exists() or other.read_bytes() == V2[:100_000]


def test_a_folder_in_the_place_of_a_part_is_told(tool: Host) -> None:
    (tool.bin / PART / "below").mkdir(parents=True)
    done = tool.sync()
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert PART in line
    assert (tool.bin / PART / "below").is_dir()
    assert tool.disk_md5("tool") == md5(V1)


@pytest.mark.parametrize(
    ("planted", "asked"),
    [
        (b"x" * len(V2), [f"bytes={len(V2)}-", None]),
        (b"x" * 100_000, ["bytes=100000-", None]),
        (V2 + b"x", [f"bytes={len(V2) + 1}-", None]),
        (V2[:100_000], ["bytes=100000-"]),
        (V2, []),
        (b"", [None]),
    ],
    ids=["whole and wrong", "begun and wrong", "too long", "begun and right", "whole and right", "empty"],
)
def test_a_part_of_ours_counts_only_if_its_bytes_verify(tool: Host, planted: bytes, asked: list[str | None]) -> None:
    """Whatever lies there, what is installed is the release, after as few bytes as that takes."""
    plant(tool, planted)
    assert tool.sync().returncode == 0
    assert tool.disk_md5("tool") == md5(V2)
    assert ranges(tool) == asked
    assert tool.strays() == []


def test_a_planted_part_does_not_lend_its_mode(tool: Host) -> None:
    """A part with set-id bits that lies there before gives none of them to what is installed."""
    plant(tool, V2[:100_000], 0o6755)
    assert tool.sync().returncode == 0
    assert stat.S_IMODE((tool.bin / "tool").stat().st_mode) == 0o755
