"""verifyCommand with real signatures: what was not signed for this host is never installed."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.host import Host, good, md5
from tests.server import BinManagerServer

EXAMPLE = Path(__file__).parent.parent / "examples" / "verify-signature"
V1 = good("v1")


def run(*command: str | Path, data: bytes = b"") -> bytes:
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """release.key, release.pub and the key of somebody else, made as the example says."""
    require("openssl")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("release", "foreign"):
        made = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072"]
        run(*made, "-out", folder / f"{name}.key")
        run("openssl", "pkey", "-in", folder / f"{name}.key", "-pubout", "-out", folder / f"{name}.pub")
    return folder


def signed(data: bytes, key: Path, name: str = "tool") -> bytes:
    """The release with its signature, made as the example says."""
    return data + run("openssl", "dgst", "-sha256", "-sign", key, data=f"{name}\n".encode() + data)


def use(host: Host, *command: str | Path, **more: Any) -> None:
    words = [str(word) for word in command]
    host.write_manifest({"name": "tool", "currentMd5": "", "service": False, "verifyCommand": words, **more})


@pytest.fixture
def tool(host: Host, keys: Path) -> Host:
    """A host with "tool" v1 that takes signed releases only."""
    host.install("tool", V1)
    use(host, EXAMPLE, keys / "release.pub", "tool", "{file}")
    return host


def assert_held(host: Host, *words: str) -> None:
    """It is not installed, costs one download in all, is told once, and nothing of it stays."""
    downloads = host.server.downloads
    done = host.sync()
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert all(word in line for word in ("held", *words)), line
    again = host.outcomes()
    assert again == {"tool": "held"}
    assert host.server.downloads == downloads + 1
    assert host.disk_md5("tool") == md5(V1)
    assert host.strays() == []


def test_a_signed_release_is_installed_and_runs(tool: Host, keys: Path) -> None:
    release = signed(good("v2"), keys / "release.key")
    tool.server.publish("tool", release)
    done = tool.sync()
    assert (done.returncode, done.stderr) == (0, "")
    assert tool.disk_md5("tool") == md5(release)
    assert subprocess.run([tool.bin / "tool", "0"], timeout=10).returncode == 0


BAD = [
    "unsigned",
    "one bit",
    "one bit of the signature",
    "other key",
    "other name",
    "cut",
    "longer",
    "tiny",
    "two halves",
]


@pytest.mark.parametrize("how", BAD)
def test_a_release_with_a_bad_signature_is_held(tool: Host, keys: Path, how: str) -> None:
    """Never swapped in, held, and the next one that is signed gets installed at once."""
    key, data = keys / "release.key", good("v2")
    sound = signed(data, key)
    release = {
        "unsigned": lambda: data,
        "one bit": lambda: sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:],
        "one bit of the signature": lambda: sound[:-1] + bytes([sound[-1] ^ 1]),
        "other key": lambda: signed(data, keys / "foreign.key"),
        "other name": lambda: signed(data, key, "other"),
        "cut": lambda: sound[:-1],
        "longer": lambda: sound + b"\0",
        "tiny": lambda: b"x" * 384,
        "two halves": lambda: good("v3") + signed(data, key)[-384:],
    }[how]()
    tool.server.publish("tool", release)
    assert_held(tool, "verify-signature")
    assert tool.outcomes("--retry-held") == {"tool": "held"}
    assert tool.disk_md5("tool") == md5(V1)
    newest = signed(good("v4"), key)
    tool.server.publish("tool", newest)
    assert tool.sync().returncode == 0
    assert tool.disk_md5("tool") == md5(newest)


def test_a_signature_of_minisign_beside_the_manifest(host: Host) -> None:
    """Without a script of one's own: the signature comes to the host by another way than the release."""
    require("minisign")
    public, secret, signature = host.root / "key.pub", host.root / "key", host.root / "tool.minisig"
    run("minisign", "-G", "-W", "-f", "-p", public, "-s", secret, data=b"\n\n")
    sound = host.root / "release"
    sound.write_bytes(good("v2"))
    run("minisign", "-S", "-s", secret, "-x", signature, "-m", sound, data=b"\n")
    host.install("tool", V1)
    use(host, "minisign", "-V", "-q", "-p", public, "-x", signature, "-m", "{file}")
    host.server.publish("tool", good("v3"))
    assert_held(host, "minisign")
    host.server.publish("tool", good("v2"))
    assert host.sync().returncode == 0
    assert host.disk_md5("tool") == md5(good("v2"))


# What the command itself may do

ONE_BYTE = 'printf x | dd of="$1" bs=1 seek=5000 conv=notrunc 2>/dev/null'


def script(host: Host, text: str) -> Path:
    path = host.root / "verify"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "text",
    [
        'printf x >> "$1"',
        ONE_BYTE,
        'head -c 5000 "$1" > "$1.new"; mv "$1.new" "$1"',
        'rm "$1"',
        'rm "$1"; ln -s /bin/true "$1"',
        f'touch -r "$1" "$1.date"; {ONE_BYTE}; touch -r "$1.date" "$1"; rm "$1.date"',
    ],
    ids=["longer", "one byte", "cut", "removed", "a link", "one byte, dated back"],
)
def test_a_command_that_alters_the_file(host: Host, text: str) -> None:
    """Bytes that are not the MD5's are never installed, whoever made them so."""
    host.install("tool", V1)
    host.server.publish("tool", good("v2"))
    use(host, script(host, text + "; exit 0"), "{file}")
    done = host.sync()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert host.disk_md5("tool") == md5(V1)
    assert not (host.bin / "tool").is_symlink()
    assert host.sync().stderr == ""
    assert host.disk_md5("tool") == md5(V1)


def test_what_the_command_gets(host: Host) -> None:
    """{file} anywhere in a word is the staged file's path: whole, of 0700, beside its target, not yet in its place."""
    seen = host.root / "seen"
    host.install("tool", V1)
    host.server.publish("tool", good("v2"))
    text = f'stat -c %a "$2" > {seen}; md5sum < "$2" >> {seen}; md5sum < {host.bin}/tool >> {seen}; echo "$1" >> {seen}'
    use(host, script(host, text), "--in={file}", "{file}")
    assert host.sync().returncode == 0
    mode, staged, installed, word = seen.read_text().split("\n")[:4]
    part = host.bin / f".tool.{md5(good('v2'))}.part"
    assert (mode, staged.split()[0], installed.split()[0], word) == ("700", md5(good("v2")), md5(V1), f"--in={part}")
    assert stat.S_IMODE((host.bin / "tool").stat().st_mode) == 0o755


def test_the_release_as_its_own_check(host: Host) -> None:
    """["{file}", "--version"] finds out that a release cannot even start, before anything is swapped."""
    host.install("tool", V1)
    use(host, "{file}", "--version")
    host.server.publish("tool", Path(shutil.which("false") or "").resolve().read_bytes()[:2000])
    done = host.sync()
    assert done.returncode == 1
    assert host.disk_md5("tool") == md5(V1)
    host.server.publish("tool", good("v2"))
    assert host.sync().returncode == 0
    assert host.disk_md5("tool") == md5(good("v2"))


@pytest.mark.parametrize("how", ["absent", "not executable", "hangs"])
def test_a_command_that_cannot_do_its_work_blames_nobody(host: Host, how: str) -> None:
    """Not installed and not held: once the command works, the release goes in without another download."""
    host.install("tool", V1)
    host.server.publish("tool", good("v2"))
    command = script(host, "sleep 1000")
    if how == "absent":
        command.unlink()
    elif how == "not executable":
        command.chmod(0o644)
    use(host, command, "{file}", healthTimeout=0.5)
    assert host.outcomes() == {"tool": "failed"}
    assert host.disk_md5("tool") == md5(V1)
    parts = [path.stat().st_mode for path in host.bin.glob(".tool.*.part")]
    assert [stat.S_IMODE(mode) for mode in parts] in ([], [0o600])
    script(host, "exit 0")
    assert host.sync().returncode == 0
    assert host.disk_md5("tool") == md5(good("v2"))
    assert host.server.downloads == 1


def test_a_held_release_is_not_asked_for_again(host: Host) -> None:
    """A hold by verifyCommand counts like any other: the minute after costs no download and no command."""
    host.install("tool", V1)
    host.server.publish("tool", good("v2"))
    use(host, script(host, f"echo run >> {host.root}/runs; exit 1"), "{file}")
    assert_held(host)
    assert (host.root / "runs").read_text() == "run\n"
    download = BinManagerServer.download_path("tool")
    assert [path for path, _ in host.server.requests].count(download) == 1
