"""A longer fuzz run over every parser: `python -m tests.fuzz --seconds 600 [--seed N]` prints what it tried and found.

Each round takes an input that is valid, or was interesting before, spoils it (bytes flipped, cut, doubled, replaced by
words that the formats know) and gives it to its parser. Whatever is raised but the parser's own typed error is a
finding: it is printed with the input that causes it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from bin_proxy.config.config_file import parse_config
from bin_proxy.config.manifest import load_manifest
from bin_proxy.config.settings import load_settings
from bin_proxy.errors import BinManagerError, BinProxyError, HostError, UsageError
from bin_proxy.host.supervisor import parse_status
from bin_proxy.policy.model import Answer, LastSync, Pause, Record, Retry, Trouble, Unwell
from bin_proxy.server import client as bin_manager
from bin_proxy.store.manifest_file import record_md5s
from bin_proxy.store.state import State

MD5 = "0123456789abcdef" * 2


def state_files() -> dict[str, bytes]:
    """Every file that bin-proxy itself keeps in STATE_DIR, each value of it set."""
    with tempfile.TemporaryDirectory() as folder:
        state = State(folder, ("manager",))
        state.prepare()
        memory = state.memory("manager")
        memory.hold("1" * 32, "it failed", 1.5, "failure")
        memory.retries[MD5] = Retry(1, 2.5, "corrupt", "bytes differ")
        memory.left[MD5], memory.strikes[MD5], memory.due[MD5] = [1.0, 2.0], 1, 1.0
        memory.unwell = Unwell(MD5, 1, 2.0, "down")
        memory.down, memory.backups, memory.parts = ["manager"], [MD5], [f"{folder}/.manager.{MD5}.part"]
        memory.updated_at = 1.0
        state.save()
        state.pauses["*"] = Pause("maintenance", 1.0, 4e9)
        state.save_pauses()
        state.cache.digests["/usr/local/bin/manager"] = [1, 2, 3, 4, 5, MD5]
        state.cache.answers["manager"] = Answer("latest", MD5, 1.0)
        state.cache.troubles["manager host "] = Trouble("manager", "text", 1.0, 2.0)
        state.cache.outcomes["manager"] = "current"
        state.cache.last_sync = LastSync(1.0, 0)
        state.save_cache(durable=False)
        processes = {"manager": 7}
        state.write_record(Record("manager", "/bin/manager", None, MD5, 1, processes, True, False, "sync", 1.0))
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


STATE_FILES = state_files()


def parse_config_file(raw: bytes) -> None:
    """The config file, through the settings, as any command reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config")
        path.write_bytes(raw)
        load_settings({"CONFIG": str(path)}, {})


def parse_config_text(raw: bytes) -> None:
    """The config file's text alone, which has no typed error at all: it must take anything."""
    for value, line in parse_config(raw.decode(errors="replace")).values():
        assert line >= 1
        assert value is None or isinstance(value, str)


def parse_manifest(raw: bytes) -> None:
    """The manifest; one that is accepted can also be recorded in, and stays acceptable."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.json")
        path.write_bytes(raw)
        settings = load_settings({}, {"BIN_MANIFESTS": str(path)})
        binaries = load_manifest(settings)
        record_md5s(str(path), {binary.name: MD5 for binary in binaries})
        again = load_manifest(settings)
        assert [binary.name for binary in again] == [binary.name for binary in binaries]
        assert all(binary.reported in (None, MD5) for binary in again)


def parse_answer(raw: bytes) -> None:
    """bin-manager's answer to the question for the MD5, and the page of an error."""
    assert len(str(bin_manager._failure(404, raw))) < 1000
    try:
        release = bin_manager._parse_release(raw)
    except BinManagerError as error:
        assert len(str(error)) < 1000
    else:
        assert len(release.md5) == 32 and set(release.md5) <= set("0123456789abcdef")
        assert release.sha256 is None or len(release.sha256) == 64
        assert release.size is None or release.size >= 0


def parse_headers(raw: bytes) -> None:
    """Retry-After of a hostile server, a line each."""
    response = requests.Response()
    for response.headers["Retry-After"] in raw.decode("latin-1").split("\n"):
        assert bin_manager._retry_after(response) >= 0


def parse_state(raw: bytes) -> None:
    """Every file of STATE_DIR, its content being noise: it is set aside, or read as what it is."""
    for file in STATE_FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
            state = State(folder, ("manager",))
            unreadable = [name for name, _ in state.unreadable]
            assert unreadable in ([], [file])
            state.memory("manager")
            state.pause_of("manager")
            assert len(state.set_aside()) == len(unreadable)
            state.prepare()
            state.save()
            state.save_cache(durable=False)
            again = State(folder, ("manager",))
            # That an update was begun must not be lost, so its record stays until it is resolved.
            assert [name for name, _ in again.unreadable] == [name for name in unreadable if "journal" in name]


def parse_supervisor(raw: bytes) -> None:
    """What `supervisorctl status` may print, or anything else in its place."""
    for name, process in parse_status(raw.decode(errors="replace")).items():
        assert name == process.name
        assert process.pid is None or process.pid >= 0


@dataclass(frozen=True)
class Parser:
    """One parser: how to call it, the error it may raise, and inputs to start from."""

    call: Callable[[bytes], None]
    typed: tuple[type[BaseException], ...]
    seeds: tuple[bytes, ...]


PARSERS: dict[str, Parser] = {
    "config file": Parser(
        parse_config_file,
        (UsageError,),
        (
            b"# settings\nexport BIN_MANAGER_API=http://localhost:8080/api/v1\nJOBS=8; BIN_DIR='/usr/bin'\r\n",
            b'HTTP_TIMEOUT=10\nSUPERVISORCTL="/bin/true -c x"\nBACKUPS_KEEP=$x\nBIN_MANAGER_TOKEN=a\\ b\n',
            b"http_proxy=http://h:1\nMAX_DOWNLOAD_MIB=1 METRICS_FILE=~/x\nLOG_FILE=`x`",
        ),
    ),
    "config text": Parser(parse_config_text, (), (b"A='b' # c\nexport D=\"e\\\nf\";G=$h\n", b"A+=1 2\\")),
    "manifest": Parser(
        parse_manifest,
        (UsageError, HostError),
        (
            b'{"binaries": [{"name": "manager", "version": "latest", "currentMd5": ""}]}',
            b'{"x": [1e5], "binaries": [{"name": "a", "path": "/x/a", "service": ["a", "b:*"], "healthTimeout": 5,'
            b' "healthCheck": {"http": "http://[::1]:80/x"}, "currentMd5": null}, {"name": "b", "service": false,'
            b' "healthCheck": {"tcp": "127.0.0.1:8080"}, "verifyCommand": ["{file}"], "minHealthySeconds": 1.5}]}',
        ),
    ),
    "answer": Parser(
        parse_answer,
        (),
        (
            b'{"code": 0, "message": "success", "data": {"md5": "0123456789abcdef0123456789ABCDEF"}}',
            b'{"code": 200, "data": {"md5": " 0123456789abcdef0123456789abcdef\\n", "size": 5, "sha256": null}}',
            b'{"code": 404, "message": "no such release"}',
            b"<html><body>502 Bad Gateway</body></html>",
        ),
    ),
    "headers": Parser(
        parse_headers,
        (),
        (
            b"120\n",
            b"Wed, 21 Oct 2065 07:28:00 GMT\n",
            b"Sun Nov  6 08:49:37 1994\n",
            b"Wed, 21 Oct 2065 07:28:00 +9999\n",
        ),
    ),
    "state": Parser(parse_state, (HostError,), (*STATE_FILES.values(), b'{"version": 2}')),
    "supervisor": Parser(
        parse_supervisor,
        (HostError,),
        (
            b"manager                          RUNNING   pid 123, uptime 0:00:21\nw:w_00   STOPPED   Not started\n",
            b"a BACKOFF   Exited too quickly (process log may have details)\nb FATAL can't find command '/x'\n",
            b"unix:///var/run/supervisor.sock no such file\n",
            b"error: <class 'xmlrpc.client.Fault'>, <Fault 6: 'SHUTDOWN_STATE'>: file: x line: 1\n",
        ),
    ),
}

_WORDS = [
    *(
        b'"',
        b"'",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\x1b[31m",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-1",
        b"1e999",
        b"0",
        b"9" * 20,
        b"9" * 400,
        b"9" * 5000,
        b"1.5",
        b"\\ud800",
    ),
    *(
        b'"name"',
        b'"md5"',
        b'"code"',
        b'"binaries"',
        b'"currentMd5"',
        b'"version"',
        b"$x",
        b"$(",
        b"`",
        b"#",
        b"=",
        b"~",
    ),
    *(
        b"export ",
        b"[" * 3000,
        b"{" * 50,
        b"bytes ",
        b"/",
        b"-",
        b"*",
        b"GMT",
        b"RUNNING",
        b"pid ",
        b" ",
        b"\t",
        b"\xc2\x85",
    ),
]


def spoil(raw: bytes, dice: random.Random) -> bytes:
    """One to four random changes."""
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(raw))
        to = min(len(raw), at + dice.choice([0, 1, 1, 2, 8, 40]))
        kind = dice.randrange(5)
        if kind == 0:
            raw = raw[:at] + dice.choice(_WORDS) + raw[to:]
        elif kind == 1:
            raw = raw[:at] + bytes(dice.randrange(256) for _ in range(dice.randint(1, 4))) + raw[to:]
        elif kind == 2:
            raw = raw[:at] + raw[to:]
        elif kind == 3:
            raw = raw[:to] + raw[at:]
        else:
            raw = raw[:at]
    return raw[:50_000]


def fuzz(name: str, seconds: float, dice: random.Random) -> tuple[int, int, list[tuple[bytes, str]]]:
    """Try one parser for some time.

    Returns:
        how many inputs were tried, how many of them were accepted, and each finding: input and traceback.
    """
    parser = PARSERS[name]
    pool, tried, accepted = list(parser.seeds), 0, 0
    findings: dict[str, tuple[bytes, str]] = {}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        raw = spoil(dice.choice(pool), dice)
        tried += 1
        try:
            parser.call(raw)
        except parser.typed as error:
            assert isinstance(error, BinProxyError)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            findings.setdefault(
                f"{type(error).__name__} {where.filename}:{where.lineno}", (raw, traceback.format_exc())
            )
        else:
            accepted += 1
            if len(pool) < 500:
                pool.append(raw)
    return tried, accepted, list(findings.values())


def main() -> int:
    """Divide the time among the parsers and print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seconds", type=float, default=60.0, help="for the whole run (default: 60)")
    arguments.add_argument("--seed", type=int, default=None, help="to repeat a run")
    arguments.add_argument("--parser", choices=list(PARSERS), help="this one only")
    chosen = arguments.parse_args()
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(2**32)
    names = [chosen.parser] if chosen.parser else list(PARSERS)
    base = tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    tempfile.tempdir = base
    print(f"seed {seed}")
    print(f"{'parser':<12} {'inputs':>9} {'accepted':>9} {'findings':>9}")
    found = 0
    try:
        for name in names:
            tried, accepted, findings = fuzz(name, chosen.seconds / len(names), random.Random(f"{seed} {name}"))
            print(f"{name:<12} {tried:>9,} {accepted:>9,} {len(findings):>9}", flush=True)
            for raw, words in findings:
                print(f"\n{words}caused by {raw!r}\n")
            found += len(findings)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
