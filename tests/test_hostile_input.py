"""What comes in, from bin-manager, the manifest or a program's output, stays data: bounded, escaped, never obeyed."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.host import Host, eventually, good, md5
from tests.server import Behaviour, BinManagerServer, Handler

# A cleared screen, a window's title, a forged line, a name that reads backwards, and all that ends a line somewhere.
NASTY = "\x1b[2J\x1b]0;owned\x07\r\nbin-proxy: all is well\n\u202egnp.exe\u2066"
NASTY += "\u2028\u2029\x85\x0b\x0c\x9b31m\x7f\0\ud800\u200b"
NASTY_BYTES = NASTY.encode(errors="surrogatepass") + b"\xff\xfe"
V1, V2 = good("v1"), good("v2")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def tool(host: Host) -> Host:
    """A host with "tool" v1 and a bin-manager that has v2."""
    host.install("tool", V1)
    host.server.publish("tool", V2)
    host.write_manifest({"name": "tool", "currentMd5": "", "service": False})
    return host


def entry(**more: Any) -> dict[str, Any]:
    return {"name": "tool", "currentMd5": "", "service": False, **more}


def assert_harmless(host: Host, *runs: subprocess.CompletedProcess[str]) -> None:
    """No terminal is told anything but text, and each line of the log is an event."""
    for text in [done.stdout for done in runs] + [done.stderr for done in runs] + [host.log()]:
        assert all(char.isprintable() or char == "\n" for char in text), text
        assert not any(line.startswith("bin-proxy: all is well") for line in text.splitlines())
    for line in host.log().splitlines():
        assert re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ", line), line


def say(status: int, body: Any, headers: dict[str, str] | None = None) -> Behaviour:
    def behave(handler: Handler) -> bool:
        handler.answer(status, body, headers)
        return False

    return behave


def say_raw(raw: bytes) -> Behaviour:
    """Send bytes as they are, and end the connection."""

    def behave(handler: Handler) -> bool:
        handler.wfile.write(raw)
        handler.close_connection = True
        return False

    return behave


def script(host: Host, name: str, text: str) -> str:
    path = host.root / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# What is shown


@pytest.mark.parametrize(
    "body",
    [
        {"code": 5, "message": NASTY},
        {"code": NASTY, "message": NASTY},
        {"code": 0, "message": "success", "data": {"md5": NASTY}},
        {"code": 0, "message": "success", "data": {"md5": md5(V2), "sha256": NASTY}},
        {"code": 0, "message": "success", "data": {"md5": md5(V2), "size": NASTY}},
        json.dumps({NASTY: 1}).encode()[:-1] + b"," + json.dumps({NASTY: 1}).encode()[1:],
        NASTY_BYTES,
    ],
    ids=["message", "code", "md5", "sha256", "size", "key twice", "no JSON"],
)
@pytest.mark.parametrize("status", [200, 403])
def test_what_bin_manager_says_is_one_harmless_line(tool: Host, body: Any, status: int) -> None:
    tool.server.always["*"] = say(status, body)
    runs = [tool.sync(), tool.run("-v", "sync", "--json")]
    assert [done.returncode for done in runs] == [1, 1]
    assert len(runs[0].stderr.splitlines()) == 1
    assert len(tool.log().splitlines()) == 1
    assert_harmless(tool, *runs)
    assert tool.disk_md5("tool") == md5(V1)


@pytest.mark.parametrize("status", [403, 503])
def test_every_command_shows_what_bin_manager_says_harmlessly(tool: Host, status: int) -> None:
    tool.server.always["*"] = say(status, {"code": 5, "message": NASTY})
    runs = [tool.sync(), tool.sync("--dry-run"), tool.run("status"), tool.run("status", "--json"), tool.run("doctor")]
    assert all("owned" in done.stdout + done.stderr for done in runs)
    assert_harmless(tool, *runs)


@pytest.mark.parametrize("which", ["verifyCommand", "healthCheck"])
def test_what_a_command_says_is_one_harmless_line(tool: Host, which: str) -> None:
    (tool.root / "words").write_bytes(NASTY_BYTES)
    command = script(
        tool, "command", f"cat {tool.root}/words; cat {tool.root}/words >&2; ! grep -aq v2 {tool.bin}/* $1"
    )
    more = (
        {"verifyCommand": [command, "{file}"]} if which == "verifyCommand" else {"healthCheck": {"command": [command]}}
    )
    tool.write_manifest(entry(**more))
    done = tool.sync(HEALTH_TIMEOUT="0.5", MIN_HEALTHY_SECONDS="0.1")
    runs = [done, tool.sync("--json"), tool.run("status"), tool.run("status", "--json"), tool.run("doctor")]
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert_harmless(tool, *runs)
    assert tool.disk_md5("tool") == md5(V1)


@pytest.mark.parametrize("stream", ["1", "2"])
@pytest.mark.parametrize("code", [0, 1, 4])
def test_what_supervisorctl_says_is_one_harmless_line(tool: Host, stream: str, code: int) -> None:
    (tool.root / "words").write_bytes(NASTY_BYTES)
    command = script(tool, "ctl", f"cat {tool.root}/words >&{stream}; exit {code}")
    tool.write_manifest(entry(service="tool"))
    done = tool.sync(SUPERVISORCTL=command)
    runs = [done, tool.run("status", SUPERVISORCTL=command), tool.run("doctor", SUPERVISORCTL=command)]
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert_harmless(tool, *runs)
    assert tool.disk_md5("tool") == md5(V1)


def test_a_process_with_a_hostile_name(tool: Host) -> None:
    """supervisord passes on any name and any words; they are shown and logged escaped."""
    words = "spawn error \x1b[2J\u202e\x9b31m"
    (tool.root / "words").write_text(
        f"g:\x1b]0;x\x07\u202ex   FATAL     {words}\ng:y   RUNNING   pid 1, uptime 0:00:01\n"
    )
    command = script(tool, "ctl", f"cat {tool.root}/words")
    tool.write_manifest(entry(service="g:*"))
    runs = [tool.sync(SUPERVISORCTL=command), tool.run("status", SUPERVISORCTL=command)]
    runs += [tool.run("doctor", SUPERVISORCTL=command), tool.run("status", "--json", SUPERVISORCTL=command)]
    assert runs[0].returncode == 1
    assert "FATAL" in runs[1].stdout
    assert_harmless(tool, *runs)


def test_a_terminal_is_not_obeyed_either(tool: Host) -> None:
    """On a terminal, where colours and a progress bar are drawn, what came from outside is escaped all the same."""
    tool.server.always[BinManagerServer.md5_path("tool")] = say(403, {"code": 1, "message": NASTY})
    master, slave = pty.openpty()
    child = subprocess.Popen(
        tool.command("-v", "sync"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env=tool.environment(TERM="xterm"),
    )
    os.close(slave)
    seen = b""
    try:
        while data := os.read(master, 65536):
            seen += data
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(master)
    assert child.wait(30) == 1
    text = seen.decode()
    assert "owned" in text
    assert not re.search("\x1b\\]|\x1b\\[2J|\x07|\u202e|\u2066|\x9b|\x85|\x7f|\0", text)


def test_an_operators_words_are_escaped_too(tool: Host) -> None:
    """The reason of a pause is shown to whoever comes next."""
    reason = NASTY.replace("\0", "").replace("\ud800", "")
    runs = [
        tool.run("pause", "tool", "--reason", reason),
        tool.run("status"),
        tool.run("doctor"),
        tool.run("resume", "tool"),
    ]
    assert tool.run("status", "--check").returncode == 1
    assert_harmless(tool, *runs)


def test_a_pause_beyond_the_calendar(tool: Host) -> None:
    """A date that no calendar has is refused, or shown; it never bars the way to `status`."""
    done = tool.run("pause", "tool", "--for", "999999d" * 9)
    assert done.returncode in (0, 2)
    assert tool.run("status").returncode == 0
    assert tool.run("status", "--json").returncode == 0
    assert tool.run("doctor").returncode in (0, 1)


# Manifest

NAMES = [
    "../tool",
    "a/b",
    "/tool",
    "..",
    ".",
    "",
    " tool",
    "tool ",
    "-rf",
    ".hidden",
    "a\\b",
    "a%2fb",
    "a\0b",
    "a\n",
    NASTY,
]
NAMES += ["\uff54ool", "tööl", "a" * 129, "a;b", "$(a)", "a*", "~a", "a:b", "a@b", "a?b", "a#b"]


@pytest.mark.parametrize("key", ["name", "version"])
def test_names_and_versions_cannot_leave_their_place(tool: Host, key: str) -> None:
    """They become parts of paths and of URLs; every one of these is refused, each with a line of its own."""
    tool.write_manifest(*({**entry(), "name": f"n{at}", key: value} for at, value in enumerate(NAMES)))
    done = tool.sync()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == len(NAMES)
    assert_harmless(tool, done)
    assert tool.server.requests == []
    assert not tool.log_path.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"name": 1},
        {"name": ["tool"]},
        {"name": None},
        {"version": 1.5},
        {"version": {}},
        {"path": "tool"},
        {"path": "/bin/" + NASTY},
        {"path": ["/bin/x"]},
        {"path": ""},
        {"path": 7},
        {"service": 0},
        {"service": {}},
        {"service": [[]]},
        {"service": []},
        {"service": NASTY},
        {"service": "a b"},
        {"service": True},
        {"healthCheck": []},
        {"healthCheck": {}},
        {"healthCheck": {"tcp": 80}},
        {"healthCheck": {"tcp": "h:99999"}},
        {"healthCheck": {"http": "file:///etc/passwd"}},
        {"healthCheck": {"http": "http://h/" + NASTY}},
        {"healthCheck": {"http": "http://[::1"}},
        {"healthCheck": {"command": "rm -rf x"}},
        {"healthCheck": {"command": [1]}},
        {"healthCheck": {"command": ["a\0b"]}},
        {"healthCheck": {"command": [[["x"]]]}},
        {"verifyCommand": "x"},
        {"verifyCommand": []},
        {"verifyCommand": {"0": "x"}},
        {"verifyCommand": [NASTY]},
        {"minHealthySeconds": "5"},
        {"minHealthySeconds": -1},
        {"minHealthySeconds": True},
        {"minHealthySeconds": 10**400},
        {"minHealthySeconds": -(10**400)},
        {"healthTimeout": 10**400},
        {"healthTimeout": [5]},
        {"currentMd5": 5},
        {"currentMd5": [[]]},
    ],
    ids=lambda more: ascii(more)[:40],
)
def test_a_value_of_the_wrong_kind_is_one_line(tool: Host, more: dict[str, Any]) -> None:
    tool.write_manifest(entry(**more))
    done = tool.sync()
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"bin-proxy: manifest {tool.manifest_path}")
    assert next(iter(more)) in line
    assert len(line) < 600
    assert_harmless(tool, done)
    assert tool.server.requests == []


SOUND = json.dumps({"binaries": [entry()]})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"null",
        b"[]",
        b"{}",
        b'{"binaries": {}}',
        b'{"binaries": [1, "x", null, []]}',
        SOUND.encode("utf-16"),
        b"\xef\xbb\xbf" + SOUND.encode(),
        SOUND.encode()[:-1],
        SOUND.encode() + b"x",
        SOUND.replace('"tool"', '"tool", "name": "tool"').encode(),
        SOUND.replace('"tool"', '"tool", "x": NaN').encode(),
        SOUND.replace('"tool"', '"tool", "minHealthySeconds": 1e999').encode(),
        SOUND.replace('"tool"', '"tool", "minHealthySeconds": Infinity').encode(),
        SOUND.replace('"tool"', '"tool", "x": -Infinity').encode(),
        SOUND.replace('"tool"', '"tool", "x": ' + "9" * 5000).encode(),
        SOUND.replace('"tool"', '"tool", "x": ' + "[" * 100_000 + "]" * 100_000).encode(),
        SOUND.replace('"tool"', '"tool", "x": ' + '{"a":' * 100_000 + "1" + "}" * 100_000).encode(),
        b"[" * 1_000_000,
        SOUND.replace("tool", "\\ud800").encode(),
        SOUND.replace("tool", NASTY.replace("\ud800", "")).encode(),
        NASTY_BYTES,
        b"{" + b",".join(b'"%d":0' % at for at in range(200_000)) + b',"0":0}',
    ],
    ids=lambda raw: ascii(raw[:30]) + str(len(raw)),
)
def test_a_manifest_that_is_none_is_refused(tool: Host, raw: bytes) -> None:
    """Exit 2 in short, harmless lines, soon, and it stays as it is."""
    tool.manifest_path.write_bytes(raw)
    done = tool.run("sync", timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert 1 <= len(done.stderr.splitlines()) <= 4
    assert len(done.stderr) < 2000
    assert str(tool.manifest_path) in done.stderr
    assert_harmless(tool, done)
    assert tool.server.requests == []
    assert tool.manifest_path.read_bytes() == raw


def test_what_bin_proxy_does_not_know_is_kept_however_odd(tool: Host) -> None:
    """Unknown keys with escapes, nesting and large numbers come through an update byte for byte."""
    odd = '"x": {"\\u0062\\ud800": [1e5, ' + "[" * 50 + "]" * 50 + ', 123456789012345678901234567890, "\\"}{][,:"]}'
    text = (
        '{ "pre" :[{}], "\\u0062inaries": [ {"name":"tool", ' + odd + ', "current\\u004dd5" : "","service":false}]\n}'
    )
    tool.manifest_path.write_text(text)
    assert tool.sync().returncode == 0
    assert tool.manifest_path.read_text() == text.replace(
        '"current\\u004dd5" : ""', f'"current\\u004dd5" : "{md5(V2)}"'
    )


@pytest.mark.parametrize(
    "line",
    [
        b"HTTP_PROXY=http://a\0b:1/",
        b"BIN_DIR=/x\x1b[2J",
        b"BIN_MANAGER_API=http://h\x1b]0;x\x07/",
        b"LOG_FILE=/x\xe2\x80\xae",
        b"SUPERVISORCTL='a\rb'",
        b"JOBS=" + b"9" * 5000,
        b"HTTP_TIMEOUT=nan",
        b"HTTP_TIMEOUT=1e999",
        b"HTTP_TIMEOUT=-1",
        b"BIN_DIR=$(touch /tmp/owned)",
        b"BIN_DIR=`touch /tmp/owned`",
        b"\xff\xfe",
    ],
    ids=ascii,
)
def test_a_config_file_with_a_hostile_line(tool: Host, line: bytes) -> None:
    """Exit 2 with harmless lines; a proxy that is none may also fail as the unreachable thing it is."""
    for name in ("BIN_DIR", "BIN_MANAGER_API", "LOG_FILE", "SUPERVISORCTL", "HTTP_TIMEOUT"):
        if line.startswith(name.encode()):
            del tool.settings[name]
    (tool.root / "config").write_bytes(b"# sound\n" + line + b"\n")
    done = tool.run("sync", timeout=30)
    assert done.returncode == 2 or line.startswith(b"HTTP_PROXY")
    assert done.returncode == 0 or done.stderr
    assert len(done.stderr) < 2000
    assert_harmless(tool, done)
    assert not os.path.exists("/tmp/owned")


# Answers

H = md5(V2)


def ok(data: Any) -> bytes:
    return json.dumps({"code": 0, "message": "success", "data": data}).encode()


ANSWERS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"x"',
    "number": b"0",
    "html": b"<html><body>Bad Gateway</body></html>",
    "no-data": b'{"code": 0, "message": "success"}',
    "data-null": ok(None),
    "data-list": ok([H]),
    "data-text": ok(H),
    "md5-null": ok({"md5": None}),
    "md5-list": ok({"md5": [H]}),
    "md5-number": ok({"md5": 10**31}),
    "md5-short": ok({"md5": H[:-1]}),
    "md5-long": ok({"md5": H + "0"}),
    "md5-hex": ok({"md5": "0x" + H[2:]}),
    "md5-path": ok({"md5": "../../../../../../../etc/cron.d/"}),
    "md5-newline": ok({"md5": H + "\nx"}),
    "md5-wide": ok({"md5": "\uff10" * 32}),
    "code-true": json.dumps({"code": False, "message": "success", "data": {"md5": H}}).encode(),
    "code-text": json.dumps({"code": "0", "message": "success", "data": {"md5": H}}).encode(),
    "code-float": b'{"code": 0.0, "message": "success", "data": {"md5": "' + H.encode() + b'"}}',
    "code-absent": json.dumps({"message": "success", "data": {"md5": H}}).encode(),
    "code-deep": b'{"code": ' + b"[" * 900 + b"]" * 900 + b', "message": "x"}',
    "code-large": b'{"code": ' + b"9" * 4000 + b', "message": "x"}',
    "code-larger": b'{"code": ' + b"9" * 5000 + b', "message": "x"}',
    "sha256-short": ok({"md5": H, "sha256": "00"}),
    "sha256-false": ok({"md5": H, "sha256": False}),
    "sha256-wrong": ok({"md5": H, "sha256": "0" * 64}),
    "size-negative": ok({"md5": H, "size": -1}),
    "size-float": ok({"md5": H, "size": 1.5}),
    "size-true": ok({"md5": H, "size": True}),
    "size-large": ok({"md5": H, "size": 10**30}),
    "size-larger": ok({"md5": H, "size": 10**4200}),
    "size-wrong": ok({"md5": H, "size": len(V2) + 1}),
    "size-nan": b'{"code": 0, "data": {"md5": "' + H.encode() + b'", "size": NaN}}',
    "twice": b'{"code": 0, "data": {"md5": "' + b"0" * 32 + b'", "md5": "' + H.encode() + b'"}}',
    "deep": b"[" * 100_000,
    "deep-object": b'{"a":' * 30_000,
    "huge": b" " * 300_000 + ok({"md5": H}),
    "surrogate": b'{"code": "\\ud800", "message": "\\udfff"}',
    "utf-16": ok({"md5": H}).decode().encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + ok({"md5": H}),
    "bytes": bytes(range(256)),
}
# Where the interpreter's stack ends, a message must not be what fails.
ANSWERS |= {f"edge-{n}": b'{"code": ' + b"[" * n + b"]" * n + b', "message": "x"}' for n in range(940, 1000, 4)}
ANSWERS |= {f"value-{n}": b'{"code": 0, "data": {"md5": ' + b"[" * n + b"]" * n + b"}}" for n in range(942, 1000, 4)}


def test_answers_that_name_no_release(tool: Host) -> None:
    """Each is that binary's failure in one short line; the one sound answer among them is followed."""
    for name, body in ANSWERS.items():
        tool.install(name, V1)
        tool.server.publish(name, V2)
        tool.server.always[BinManagerServer.md5_path(name)] = say(200, body)
    tool.write_manifest(*({**entry(), "name": name} for name in ANSWERS), entry())
    done = tool.run("sync", "--json", timeout=60, JOBS="16")
    results = {row["name"]: row for row in json.loads(done.stdout)["results"]}
    assert {name: row["outcome"] for name, row in results.items()} == dict.fromkeys(ANSWERS, "failed") | {
        "tool": "updated"
    }
    for name, row in results.items():
        assert tool.disk_md5(name) == (md5(V2) if name == "tool" else md5(V1)), name
        assert len(row["error"] or "") < 600, row
    assert tool.strays() == []
    assert_harmless(tool, done)


def test_json_that_is_slow_to_refuse(tool: Host) -> None:
    """An answer of the largest size that is read, with as many keys as fit and one of them twice, costs no time."""
    keys = b",".join(b'"%x":0' % at for at in range(28_000))
    body = b"{" + keys + b',"0":0}'
    assert len(body) < 256 * 1024
    names = ["tool", *(f"n{at}" for at in range(8))]
    for name in names:
        tool.server.always[BinManagerServer.md5_path(name)] = say(200, body)
    tool.write_manifest(*({**entry(), "name": name} for name in names))
    done = tool.run("sync", "--json", timeout=25)
    errors = {row["error"] for row in json.loads(done.stdout)["results"]}
    assert len(errors) == 1
    assert "twice" in errors.pop()


def head(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1", "replace")


LENGTH = f"Content-Length: {len(V2)}"
# name: (the answer to the download, whether the release may get installed from it)
DOWNLOADS: dict[str, tuple[bytes, bool]] = {
    "plain": (head("200 OK", LENGTH) + V2, True),
    "no-length": (head("200 OK", "Connection: close") + V2, True),
    "reason": (head("200 \x1b[2J", LENGTH) + V2, True),
    "short": (head("200 OK", LENGTH) + V2[:-1], False),
    "no-length-short": (head("200 OK", "Connection: close") + V2[:-1], False),
    "long": (head("200 OK", f"Content-Length: {len(V2) + 1}") + V2 + b"x", False),
    "no-length-long": (head("200 OK", "Connection: close") + V2 + b"x", False),
    "length-negative": (head("200 OK", "Content-Length: -1") + V2[:-1], False),
    "length-huge": (head("200 OK", "Content-Length: " + "9" * 14) + V2, False),
    "length-huger": (head("200 OK", "Content-Length: " + "9" * 5000) + V2[:-1], False),
    "length-text": (head("200 OK", "Content-Length: \x1b[2J") + V2[:-1], False),
    "length-twice": (head("200 OK", "Content-Length: 5", LENGTH) + V2[:-1], False),
    "length-list": (head("200 OK", "Content-Length: 5, 6") + V2[:-1], False),
    "chunk-garbage": (head("200 OK", "Transfer-Encoding: chunked") + b"zz\r\n" + V2, False),
    "chunk-huge": (head("200 OK", "Transfer-Encoding: chunked") + b"f" * 15 + b"\r\n" + V2[:-1], False),
    "chunk-negative": (head("200 OK", "Transfer-Encoding: chunked") + b"-5\r\n" + V2[:-1], False),
    "encoding-gzip": (head("200 OK", LENGTH, "Content-Encoding: gzip") + V2, True),
    "partial-unasked": (
        head("206 Partial", f"Content-Length: {len(V2) - 5}", f"Content-Range: bytes 5-{len(V2) - 1}/{len(V2)}")
        + V2[5:],
        False,
    ),
    "range-garbage": (head("206 Partial", LENGTH, "Content-Range: \x1b[2J") + V2, False),
    "range-huge": (head("206 Partial", LENGTH, "Content-Range: bytes 0-1/" + "9" * 15) + V2, False),
    "range-absent": (head("206 Partial", LENGTH) + V2, False),
    "not-satisfiable": (head("416 No", "Content-Length: 0", "Content-Range: bytes */0"), False),
    "no-content": (head("204 No Content"), False),
    "not-modified": (head("304 Not Modified", "Content-Length: 0"), False),
    "teapot": (head("418 \x1b[2J", "Content-Length: 0"), False),
    "status-text": (b"HTTP/1.1 abc OK\r\n\r\n", False),
    "status-large": (b"HTTP/1.1 99999 OK\r\n\r\n", False),
    "http-0.9": (V2, False),
    "line-long": (b"HTTP/1.1 200 " + b"x" * 200_000 + b"\r\n\r\n", False),
    "header-long": (head("200 OK", "X: " + "x" * 200_000) + V2, False),
    "header-many": (head("200 OK", LENGTH, *(f"X-{at}: x" for at in range(500))) + V2, False),
    "header-nul": (head("200 OK", "X: \0\x1b[2J", LENGTH) + V2, True),
    "location-empty": (head("302 Found", "Location: ", "Content-Length: 0"), False),
    "location-absent": (head("302 Found", "Content-Length: 0"), False),
    "location-file": (head("302 Found", "Location: file:///etc/passwd", "Content-Length: 0"), False),
    "location-ftp": (head("302 Found", "Location: ftp://127.0.0.1/x", "Content-Length: 0"), False),
    "location-data": (head("302 Found", "Location: data:text/plain,x", "Content-Length: 0"), False),
    "location-unix": (head("302 Found", "Location: http+unix://%2Frun%2Fx/", "Content-Length: 0"), False),
    "location-bracket": (head("302 Found", "Location: http://[::1", "Content-Length: 0"), False),
    "location-port": (head("302 Found", "Location: http://127.0.0.1:99999/", "Content-Length: 0"), False),
    "location-no-host": (head("302 Found", "Location: http:///x", "Content-Length: 0"), False),
    "location-label": (head("302 Found", "Location: http://" + "a" * 300 + "/", "Content-Length: 0"), False),
    "location-dot": (head("302 Found", "Location: http://.example/", "Content-Length: 0"), False),
    "location-bytes": (head("302 Found", "Location: http://\xff\xfe/\x1b[2J", "Content-Length: 0"), False),
    "location-long": (head("302 Found", "Location: /" + "x" * 60_000, "Content-Length: 0"), False),
    "location-loop": (head("302 Found", "Location: download", "Content-Length: 0"), False),
    "retry-nan": (head("503 No", "Retry-After: nan", "Content-Length: 0"), False),
    "retry-negative": (head("429 No", "Retry-After: -5", "Content-Length: 0"), False),
    "retry-huge": (head("503 No", "Retry-After: " + "9" * 5000, "Content-Length: 0"), False),
    "retry-year": (head("429 No", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", "Content-Length: 0"), False),
    "retry-zone": (head("429 No", "Retry-After: Fri, 31 Dec 9999 23:59:59 -9999", "Content-Length: 0"), False),
    "retry-past": (head("429 No", "Retry-After: Mon, 01 Jan 0001 00:00:00 +2359", "Content-Length: 0"), False),
    "retry-wide": (head("503 No", "Retry-After: \xb2\xb3", "Content-Length: 0"), False),
    "retry-garbage": (head("503 No", "Retry-After: 31 \x1b[2J , : +", "Content-Length: 0"), False),
}


def test_answers_to_a_download(tool: Host) -> None:
    """Headers of every evil kind: nothing but the release gets installed, each failure is one short line, in time."""
    for name, (raw, _) in DOWNLOADS.items():
        tool.install(name, V1)
        tool.server.publish(name, V2)
        tool.server.always[BinManagerServer.download_path(name)] = say_raw(raw)
    tool.write_manifest(*({**entry(), "name": name} for name in DOWNLOADS))
    done = tool.run("sync", "--json", timeout=60, JOBS="32", HTTP_TIMEOUT="1", DOWNLOAD_TIMEOUT="5")
    results = {row["name"]: row for row in json.loads(done.stdout)["results"]}
    expected = {name: "updated" if good_one else "failed" for name, (_, good_one) in DOWNLOADS.items()}
    assert {name: row["outcome"] for name, row in results.items()} == expected
    for name, row in results.items():
        assert tool.disk_md5(name) == md5(V2 if expected[name] == "updated" else V1), name
        assert len(row["error"] or "") < 600, row
    assert_harmless(tool, done)


def test_a_cookie_is_not_kept(tool: Host) -> None:
    """bin-manager cannot mark a host, nor one answer another."""
    cookies = {"Set-Cookie": "id=1; Path=/; Domain=127.0.0.1"}
    body = json.loads(ok({"md5": md5(V2)}))
    tool.server.always[BinManagerServer.md5_path("tool")] = say(200, body, cookies)
    tool.server.scripts[BinManagerServer.download_path("tool")] = [say(503, {}, cookies)]
    assert tool.sync().returncode == 0
    assert len(tool.server.requests) == 3
    assert not any("Cookie" in headers for _, headers in tool.server.requests)


# Programs


def peak(host: Host, *arguments: str, **settings: str) -> tuple[int, int]:
    """Run bin-proxy; returns its exit code and the most memory it used, in MiB."""
    child = subprocess.Popen(
        host.command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=host.environment(**settings),
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss // 1024


def test_output_without_end_is_not_kept(tool: Host) -> None:
    """A supervisorctl that prints gigabytes, in one line or in many, costs neither memory nor the run."""
    usual = peak(tool, "sync", "--dry-run", SUPERVISORCTL="/bin/true")[1]
    tool.write_manifest(entry(service="tool"))
    for what in ("head -c 400000000 /dev/zero", "yes | head -c 400000000"):
        code, used = peak(tool, "sync", SUPERVISORCTL=script(tool, "ctl", what), RESTART_TIMEOUT="4")
        assert code == 1
        assert used < usual + 60
        assert tool.disk_md5("tool") == md5(V1)


@pytest.mark.parametrize("which", ["verifyCommand", "healthCheck"])
def test_a_command_that_never_ends_is_ended_with_all_it_started(tool: Host, which: str) -> None:
    """Also what ignores a polite signal, works in the background, or prints without end."""
    body = f"trap '' TERM HUP INT\nsleep 54321 & echo $! >> {tool.root}/pids\nyes & echo $! >> {tool.root}/pids\n"
    command = script(tool, "command", body + f"echo $$ >> {tool.root}/pids\nwait")
    more = {"verifyCommand": [command]} if which == "verifyCommand" else {"healthCheck": {"command": [command]}}
    tool.write_manifest(entry(healthTimeout=1, **more))
    done = tool.run("sync", timeout=60, MIN_HEALTHY_SECONDS="0.1")
    assert done.returncode == 1
    assert tool.disk_md5("tool") == md5(V1)
    pids = (tool.root / "pids").read_text().split()
    assert len(pids) >= 3
    eventually(lambda: not any(_lives(pid) for pid in pids))


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_that_leaves_something_behind_is_not_waited_for(tool: Host) -> None:
    """What it left in the background holds its output open, and is ended."""
    body = f"sleep 54321 & echo $! > {tool.root}/pids; exit 0"
    tool.write_manifest(entry(verifyCommand=[script(tool, "command", body)], healthTimeout=60))
    started = time.monotonic()
    assert tool.sync().returncode == 0
    assert time.monotonic() - started < 30
    eventually(lambda: not _lives((tool.root / "pids").read_text().strip()))


@pytest.mark.parametrize("which", ["verifyCommand", "healthCheck", "SUPERVISORCTL"])
def test_commands_get_arguments_and_no_shell(tool: Host, which: str) -> None:
    """Whatever a shell would do with them, they arrive as they are written."""
    owned, got = tool.root / "owned", tool.root / "got"
    words = [
        f"; touch {owned}",
        f"$(touch {owned})",
        f"`touch {owned}`",
        f"| touch {owned}",
        "*",
        "a  b",
        "~",
        "$HOME",
        "&",
        "'",
        '"',
    ]
    command = script(tool, "command", f'printf "%s\\n" "$@" > {got}; exit 0')
    settings = {}
    if which == "SUPERVISORCTL":
        settings = {"SUPERVISORCTL": shlex.join([command, *words])}
        tool.write_manifest(entry(service="tool"))
    elif which == "verifyCommand":
        tool.write_manifest(entry(verifyCommand=[command, *words]))
    else:
        tool.write_manifest(entry(healthCheck={"command": [command, *words]}))
    tool.sync(**settings)
    assert got.read_text().splitlines()[: len(words)] == words
    assert not owned.exists()


SEES: dict[str, Callable[[str], dict[str, Any]]] = {
    "verifyCommand": lambda command: {"verifyCommand": [command, "{file}"]},
    "healthCheck": lambda command: {"healthCheck": {"command": [command]}},
    "SUPERVISORCTL": lambda command: {"service": "tool"},
}


@pytest.mark.parametrize("which", SEES)
def test_commands_inherit_nothing(tool: Host, which: str) -> None:
    """Three descriptors, an input at its end, the root folder, no ignored signals, no variable that steers Python."""
    secret = tool.root / "secret"
    secret.write_text("secret")
    body = f"ls -l /proc/self/fd > {tool.root}/fds; pwd > {tool.root}/pwd; env > {tool.root}/env\n"
    body += f"cat > {tool.root}/stdin\n"
    body += f"grep SigIgn /proc/self/status > {tool.root}/signals"
    command = script(tool, "command", body)
    tool.write_manifest(entry(**SEES[which](command)))
    settings = {"PYTHONPATH": str(ROOT), "PYTHONSTARTUP": "/x", "BIN_MANAGER_TOKEN": "t0ken", "SUPERVISORCTL": command}
    read, write = os.pipe()
    with open(secret) as opened:
        child = subprocess.Popen(
            tool.command("sync"),
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=tool.environment(**settings),
            pass_fds=[opened.fileno()],
        )
        child.wait(60)
    os.close(read)
    os.close(write)
    links = dict(re.findall(r" (\d+) -> (.*)", (tool.root / "fds").read_text()))
    own = [number for number, target in links.items() if re.fullmatch(r"/proc/\d+/fd", target)]
    assert set(links) - set(own) == {"0", "1", "2"}
    assert links["0"] == "/dev/null"
    assert not any("secret" in target or "lock" in target for target in links.values())
    assert (tool.root / "stdin").read_text() == ""
    assert (tool.root / "pwd").read_text() == "/\n"
    seen = (tool.root / "env").read_text()
    assert "PATH=" in seen
    assert not re.search("PYTHON|BIN_MANAGER_|t0ken", seen)
    ignored = int((tool.root / "signals").read_text().split()[1], 16)
    assert not ignored & (1 << 12)  # SIGPIPE, which Python itself ignores
