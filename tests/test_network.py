"""A bin-manager, or a way there, that misbehaves: the host is untouched, the run ends, the next one converges."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import zlib
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests import faults
from tests.conftest import require
from tests.faults import answering, first, hang_up, one_line, run_later, run_measured
from tests.host import Host, good, md5
from tests.server import Behaviour, BinManagerServer, Handler

MIB = 1024 * 1024
QUICK = {"HTTP_TIMEOUT": "1", "DOWNLOAD_TIMEOUT": "4"}
# Seconds that a run may take with these: three HTTP_TIMEOUT and one DOWNLOAD_TIMEOUT, a start, and a slow machine.
BOUND = 40
MD5_PATH = BinManagerServer.md5_path("manager")
DOWNLOAD_PATH = BinManagerServer.download_path("manager")
HTML = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>"


@pytest.fixture
def plain(host: Host) -> Host:
    """A host whose only binary, without a service, is outdated: v1 is installed, bin-manager has v2."""
    host.install("manager", good("v1"))
    host.write_manifest(entry())
    host.server.publish("manager", good("v2"))
    return host


def entry(name: str = "manager", **keys: Any) -> dict[str, Any]:
    return {"name": name, "version": "latest", "currentMd5": "", "service": False, **keys}


def untouched(host: Host) -> bool:
    """Only v1 is there, and perhaps an unfinished download that nobody else may read."""
    for path in host.bin.glob(".manager.*.part"):
        assert path.stat().st_mode & 0o7777 == 0o600
    others = sorted(path.name for path in host.bin.iterdir() if not path.name.endswith(".part"))
    return others == ["manager"] and host.disk_md5("manager") == md5(good("v1")) and host.reported("manager") == ""


def state_of(host: Host) -> dict[str, Any]:
    path = host.state / "state.json"
    memories: dict[str, Any] = json.loads(path.read_text())["memories"] if path.exists() else {}
    return dict(memories.get("manager", {}))


def bad_run(host: Host, **settings: str) -> str:
    """A run that must fail: exit 1, one line, in bounded time and memory, nothing touched. Returns the line."""
    began = time.monotonic()
    done, peak = run_measured(host, "sync", **{**QUICK, **settings})
    assert time.monotonic() - began < BOUND
    assert done.returncode == 1, done.stderr
    assert peak < 100, f"{peak:.0f} MiB"
    assert untouched(host)
    line = one_line(done)
    assert "manager" in line and len(line) < 1000 and line.isprintable()
    return line


def converges(host: Host, data: bytes, waiting: int = 0, **settings: str) -> None:
    """The next run installs `data`, says nothing, and leaves nothing behind: no hold, and no pause but of so many."""
    done = host.sync(**settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.disk_md5("manager") == host.reported("manager") == md5(data)
    assert host.strays() == []
    assert not state_of(host).get("holds") and len(state_of(host).get("retries", [])) == waiting


def requests_for(host: Host, path: str) -> list[dict[str, str]]:
    return [headers for asked, headers in host.server.requests if asked == path]


HUGE = json.dumps({"code": 0, "message": "x" * (60 * MIB), "data": {"md5": "0" * 32}}).encode()
ANSWERS: dict[str, Behaviour] = {
    "hangs": faults.hanging,
    "headers drip": faults.dripping_headers,
    "body drips": faults.dripping_body,
    "endless body": faults.endless_body,
    "endless chunks": faults.endless_chunks,
    "endless chunk size": faults.endless_chunk_size,
    "endless headers": faults.endless_headers,
    "endless header line": faults.endless_header_line,
    "endless 100 Continue": faults.endless_continue,
    "cut": faults.cut,
    "reset": faults.reset,
    "no HTTP": faults.no_http,
    "HTML": answering(200, HTML),
    "empty": answering(200, b""),
    "huge JSON": answering(200, HUGE),
    "deep JSON": answering(200, b"[" * 100_000),
    "deep objects": answering(200, b'{"data":' * 30_000 + b"1" + b"}" * 30_000),
    "huge number": answering(200, b'{"code": ' + b"9" * 100_000 + b"}"),
    "not UTF-8": answering(200, b'{"code": 0, "message": "\xff\xfe"}'),
    "a list": answering(200, [1, 2]),
    "null": answering(200, None),
    "no data": answering(200, {"code": 0, "message": "success"}),
    "data is a list": answering(200, {"code": 0, "data": []}),
    "md5 is null": answering(200, {"code": 0, "data": {"md5": None}}),
    "md5 too short": answering(200, {"code": 0, "data": {"md5": "a" * 31}}),
    "md5 is a path": answering(200, {"code": 0, "data": {"md5": "../../../../../etc/passwd\0aaaaaaa"}}),
    "sha256 is none": answering(200, {"code": 0, "data": {"md5": "a" * 32, "sha256": "b" * 32}}),
    "size is negative": answering(200, {"code": 0, "data": {"md5": "a" * 32, "size": -1}}),
    "code is false": answering(200, {"code": False, "data": {"md5": "a" * 32}}),
    "code is text": answering(200, {"code": "0", "data": {"md5": "a" * 32}}),
    "redirect loop": faults.redirect_loop,
    "redirect with an endless body": faults.redirect_endless,
    "redirect to a file": answering(302, b"", {"Location": "file:///etc/passwd"}),
    "redirect to nonsense": answering(302, b"", {"Location": "http://[::1"}),
    "404": answering(404, b"no such thing"),
    "403": answering(403, HTML),
    "500": answering(500, HTML),
    "204": answering(204, b""),
    "203": answering(203, {"code": 0, "message": "success", "data": {"md5": md5(good("v2"))}}),
    "gzip": answering(200, zlib.compress(b" " * MIB, wbits=31), {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_bad_answer_to_the_question_for_the_md5(plain: Host, kind: str) -> None:
    """Nothing is downloaded, and once bin-manager is well again the next run updates."""
    plain.server.always[MD5_PATH] = ANSWERS[kind]
    bad_run(plain)
    assert plain.server.downloads == 0
    assert list(plain.bin.iterdir()) == [plain.bin / "manager"]
    del plain.server.always[MD5_PATH]
    converges(plain, good("v2"))


@pytest.mark.parametrize("kind", ["endless body", "endless chunks", "redirect with an endless body"])
def test_an_endless_answer_ends_by_its_size(plain: Host, kind: str) -> None:
    """It comes fast, so there is no need to wait for the time to be over."""
    plain.server.always[MD5_PATH] = ANSWERS[kind]
    bad_run(plain, HTTP_TIMEOUT="60")


CORRUPT: dict[str, Behaviour] = {
    "other bytes": answering(200, good("v3")),
    "one bit": answering(200, good("v2")[:-1] + b"3"),
    "HTML": answering(200, HTML),
    "empty": answering(200, b""),
    "cut and called whole": answering(200, good("v2")[:5000]),
    "gzip": answering(200, zlib.compress(good("v2"), wbits=31), {"Content-Encoding": "gzip"}),
}


def content_length(difference: int) -> Behaviour:
    """Announces another length than it sends."""

    def answer(handler: Handler) -> bool:
        release = good("v2")
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(release) + difference))
        handler.end_headers()
        handler.wfile.write(release)
        hang_up(handler)
        return False

    return answer


CORRUPT["Content-Length too short"] = content_length(-10)
DOWNLOADS: dict[str, Behaviour] = {
    "hangs": faults.hanging,
    "headers drip": faults.dripping_headers,
    "body drips": faults.dripping_body,
    "endless body": faults.endless_body,
    "endless chunks": faults.endless_chunks,
    "endless chunk size": faults.endless_chunk_size,
    "endless headers": faults.endless_headers,
    "endless 100 Continue": faults.endless_continue,
    "cut": faults.cut,
    "Content-Length too long": content_length(10),
    "reset": faults.reset,
    "no HTTP": faults.no_http,
    "redirect loop": faults.redirect_loop,
    "redirect with an endless body": faults.redirect_endless,
    "404": answering(404, b"no such thing"),
    "500": answering(500, HTML),
    "204": answering(204, b""),
    "206 unasked": answering(206, good("v2"), {"Content-Range": "bytes 5-9/10"}),
}


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_download_that_does_not_come(plain: Host, kind: str) -> None:
    """Nothing of the host changes, nothing waits: the next run that gets the bytes installs them."""
    plain.server.always[DOWNLOAD_PATH] = DOWNLOADS[kind]
    bad_run(plain, MAX_DOWNLOAD_MIB="16")
    del plain.server.always[DOWNLOAD_PATH]
    # What came may be anything; it must not be in the way.
    arguments = ["--retry-held"] if state_of(plain).get("retries") else []
    assert not arguments or kind in ("endless body", "endless chunks", "body drips", "cut", "Content-Length too long")
    plain.sync(*arguments)
    converges(plain, good("v2"))


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_release_waits_under_a_growing_pause_and_another_does_not(plain: Host, kind: str) -> None:
    """Bytes that do not match are never installed, nor fetched every minute; another release is taken at once."""
    plain.server.always[DOWNLOAD_PATH] = CORRUPT[kind]
    line = bad_run(plain)
    assert md5(good("v2")) in line or "bytes" in line
    asked = len(requests_for(plain, DOWNLOAD_PATH))
    assert asked <= 2
    assert plain.strays() == []
    quiet = plain.sync()
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert plain.outcomes() == {"manager": "waiting"}
    assert len(requests_for(plain, DOWNLOAD_PATH)) == asked
    del plain.server.always[DOWNLOAD_PATH]
    plain.server.publish("manager", good("v4"))
    converges(plain, good("v4"), waiting=1)


def test_a_release_of_another_size_than_announced_waits_under_a_growing_pause(plain: Host) -> None:
    """Whether Content-Length gives it away or the bytes do."""
    data = {"md5": md5(good("v2")), "size": 5}
    plain.server.always[MD5_PATH] = answering(200, {"code": 0, "message": "success", "data": data})
    assert "bytes" in bad_run(plain)
    asked = len(requests_for(plain, DOWNLOAD_PATH))
    assert plain.outcomes() == {"manager": "waiting"}
    assert len(requests_for(plain, DOWNLOAD_PATH)) == asked


def test_a_corrupt_release_is_fetched_again_when_its_pause_is_over(plain: Host) -> None:
    """A minute after the first failure, longer after the second; --retry-held does not wait."""
    require("cc")
    plain.server.always[DOWNLOAD_PATH] = CORRUPT["other bytes"]
    bad_run(plain)
    fetched = len(requests_for(plain, DOWNLOAD_PATH))
    assert run_later(plain, 65, "sync").returncode == 1
    assert len(requests_for(plain, DOWNLOAD_PATH)) == 2 * fetched
    assert run_later(plain, 130, "sync").returncode == 1
    assert len(requests_for(plain, DOWNLOAD_PATH)) == 2 * fetched, "the second pause is longer"
    del plain.server.always[DOWNLOAD_PATH]
    assert run_later(plain, 200, "sync").returncode == 0
    assert plain.disk_md5("manager") == md5(good("v2"))


def test_an_operator_need_not_wait_for_a_corrupt_release(plain: Host) -> None:
    """--retry-held overrides the pause."""
    plain.server.scripts[DOWNLOAD_PATH] = [CORRUPT["other bytes"]]
    bad_run(plain)
    converges_now = plain.sync("--retry-held")
    assert converges_now.returncode == 0
    converges(plain, good("v2"))


# answers that are to be understood


@pytest.mark.parametrize(
    "data",
    [
        {"md5": f"  {md5(good('v2')).upper()}\n"},
        {"sha256": hashlib.sha256(good("v2")).hexdigest().upper(), "size": len(good("v2"))},
        {"sha256": None, "size": None, "more": [1]},
    ],
)
def test_an_md5_in_any_case_and_matching_details_are_accepted(plain: Host, data: dict[str, Any]) -> None:
    """Upper case, white space, a sha256 and a size that match."""
    plain.server.extra["latest", "manager"] = data
    converges(plain, good("v2"))
    assert plain.server.downloads == 1
    converges(plain, good("v2"))
    assert plain.server.downloads == 1


@pytest.mark.parametrize("data", [{"sha256": "0" * 64}, {"size": 5}, {"size": len(good("v2")) + 1}])
def test_a_release_whose_details_do_not_match_is_not_installed(plain: Host, data: dict[str, Any]) -> None:
    """The MD5 alone does not do where bin-manager tells more."""
    plain.server.extra["latest", "manager"] = data
    bad_run(plain)
    assert untouched(plain)


def test_code_200_is_a_success_too_and_any_other_code_is_told(plain: Host) -> None:
    """The code and the message that came are in the line."""
    data = {"md5": md5(good("v2"))}
    refusal = {"code": 40403, "message": "no such\nrelease\x1b[31m", "data": data}
    plain.server.always[MD5_PATH] = answering(200, refusal)
    line = bad_run(plain)
    assert "40403" in line and "no such" in line
    plain.server.always[MD5_PATH] = answering(200, {"code": 200, "message": "success", "data": data})
    converges(plain, good("v2"))


def test_the_message_of_an_http_error_is_told(plain: Host) -> None:
    """HTTP status, code and message."""
    plain.server.always[MD5_PATH] = answering(404, {"code": 7, "message": "manager was never built"})
    line = bad_run(plain)
    assert "404" in line and "7" in line and "manager was never built" in line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"message": "manager was never built"}, "manager was never built"),
        ({"code": 7}, "code 7"),
        ({"code": None, "message": None}, "404"),
    ],
)
def test_what_an_error_says_is_told_though_it_does_not_say_all(plain: Host, body: dict[str, Any], words: str) -> None:
    """A message without a code, or a code without a message; what is null is not told as a word."""
    plain.server.always[MD5_PATH] = answering(404, body)
    line = bad_run(plain)
    assert "404" in line and words in line and "None" not in line


def refusing(status: int, kind: str) -> Behaviour:
    """An error whose page does not come whole, or is larger than any answer may be."""

    def answer(handler: Handler) -> bool:
        handler.wfile.write(f"HTTP/1.1 {status} Oh\r\nContent-Length: 400000\r\n\r\n".encode())
        if kind == "large":
            faults.send_all(handler, b" " * 400_000)
        elif kind == "hangs":
            faults.wait_for_the_client_to_go(handler)
        else:
            hang_up(handler)
        return False

    return answer


@pytest.mark.parametrize("kind", ["large", "hangs", "cut"])
@pytest.mark.parametrize("path", [MD5_PATH, DOWNLOAD_PATH])
def test_the_status_of_an_error_counts_whatever_becomes_of_its_page(plain: Host, path: str, kind: str) -> None:
    """A 404 is told as one and asked for once; one 503 is got over within the run."""
    plain.server.always[path] = refusing(404, kind)
    assert "404" in bad_run(plain)
    assert len(requests_for(plain, path)) == 1
    del plain.server.always[path]
    plain.server.scripts[path] = [refusing(503, kind)]
    converges(plain, good("v2"), HTTP_TIMEOUT="2")


@pytest.mark.parametrize("path", [MD5_PATH, DOWNLOAD_PATH])
@pytest.mark.parametrize("kind", ["503", "reset", "cut", "429"])
def test_trouble_once_is_got_over_within_the_run(plain: Host, path: str, kind: str) -> None:
    """One 503, 429, reset or cut connection is not even told."""
    once = {"503": answering(503, HTML), "429": answering(429, b""), "reset": faults.reset, "cut": faults.cut}[kind]
    if kind == "cut" and path == DOWNLOAD_PATH:
        once = cut_after(5000)
    plain.server.scripts[path] = [once]
    converges(plain, good("v2"))


@pytest.mark.parametrize("as_date", [False, True])
def test_a_short_retry_after_is_honoured(plain: Host, as_date: bool) -> None:
    """The next request comes when the server wants it, in seconds or as a date, and not before."""
    times: list[float] = []

    def busy(handler: Handler) -> bool:
        times.append(time.time())
        after = formatdate(time.time() + 3, usegmt=True) if as_date else "2"
        handler.answer(429, {"code": 429, "message": "later"}, {"Retry-After": after})
        return False

    plain.server.scripts[MD5_PATH] = [busy, first(lambda: times.append(time.time()))]
    converges(plain, good("v2"), HTTP_TIMEOUT="10")
    assert times[1] - times[0] >= (1.9 if not as_date else 1)


def test_a_long_retry_after_ends_the_attempt(plain: Host) -> None:
    """Whoever wants to be left alone for an hour is not asked again in this run."""
    plain.server.always[MD5_PATH] = answering(429, {"code": 9, "message": "quota"}, {"Retry-After": "3600"})
    line = bad_run(plain)
    assert "429" in line and "quota" in line
    assert len(requests_for(plain, MD5_PATH)) == 1
    del plain.server.always[MD5_PATH]
    converges(plain, good("v2"))


def test_a_silent_bin_manager_is_asked_once_a_run(plain: Host) -> None:
    """A read timeout ends the attempt."""
    plain.server.always[MD5_PATH] = faults.hanging
    bad_run(plain)
    assert len(requests_for(plain, MD5_PATH)) == 1


def test_a_download_without_a_length_is_taken(plain: Host) -> None:
    """Chunked, or ended by the end of the connection."""
    release = good("v2")

    def chunked(handler: Handler) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(release), 1000):
            chunk = release[at : at + 1000]
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")
        return False

    plain.server.always[DOWNLOAD_PATH] = chunked
    converges(plain, release)
    other = good("v3")
    plain.server.publish("manager", other)

    def until_the_end(handler: Handler) -> bool:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + other)
        hang_up(handler)
        return False

    plain.server.always[DOWNLOAD_PATH] = until_the_end
    converges(plain, other)


def test_a_redirect_is_followed(plain: Host) -> None:
    """To another path and another server, for both requests."""
    other = BinManagerServer()
    try:
        other.publish("manager", good("v2"))
        for path in (MD5_PATH, DOWNLOAD_PATH):
            target = f"http://127.0.0.1:{other.port}{path}"
            plain.server.always[path] = answering(302, b"", {"Location": target})
        converges(plain, good("v2"))
        assert plain.server.downloads == 0 and other.downloads == 1
    finally:
        other.stop()


# bin-manager is not there


def test_while_bin_manager_is_down_ten_binaries_are_one_line_once(host: Host) -> None:
    """One cause that strikes all is told once, in the first minute; its end is in the log; the next run converges."""
    names = [f"tool{number}" for number in range(10)]
    for name in names:
        host.install(name, good("v1"))
        host.server.publish(name, good("v2"))
    host.write_manifest(*(entry(name) for name in names))
    host.server.stop()
    done = host.sync(**QUICK)
    assert done.returncode == 1 and str(host.server.port) in one_line(done)
    lines = host.log().count("\n")
    again = host.sync(**QUICK)
    assert (again.returncode, again.stdout, again.stderr) == (1, "", "")
    assert host.log().count("\n") == lines
    assert {host.disk_md5(name) for name in names} == {md5(good("v1"))}
    host.server.start()
    assert host.sync().returncode == 0
    assert {host.disk_md5(name) for name in names} == {md5(good("v2"))}
    assert "over after" in host.log()


def test_a_bin_manager_that_answers_nobody_ends_a_run_over_many_binaries(host: Host) -> None:
    """Forty binaries do not cost forty timeouts one after the other, and are one line."""
    names = [f"tool{number}" for number in range(40)]
    host.write_manifest(*(entry(name) for name in names))
    host.server.always["*"] = faults.hanging
    began = time.monotonic()
    done = host.sync(HTTP_TIMEOUT="2", JOBS="4")
    assert time.monotonic() - began < 15
    assert done.returncode == 1 and one_line(done)
    host.server.always.clear()
    for name in names:
        host.server.publish(name, good("v1"))
    assert host.sync().returncode == 0


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_binaries_that_get_no_answer_keep_none_of_the_others_from_theirs(host: Host, jobs: str) -> None:
    """However few are asked at once, and though those that hang are asked first."""
    names = [f"tool{number}" for number in range(6)]
    for name in names:
        host.server.publish(name, good("v2"))
    host.write_manifest(*(entry(name) for name in names))
    for name in names[:3]:
        host.server.always[host.server.md5_path(name)] = faults.hanging
    done = host.sync(HTTP_TIMEOUT="2", JOBS=jobs)
    assert done.returncode == 1 and f"{', '.join(names[:3])}: " in one_line(done)
    assert {host.disk_md5(name) for name in names[3:]} == {md5(good("v2"))}


def test_one_binary_that_hangs_keeps_none_of_the_others_from_their_update(host: Host) -> None:
    """The download of one goes on only once the nine others are installed: the run does not wait for it."""
    names = [f"tool{number}" for number in range(10)]
    for name in names:
        host.install(name, good("v1"))
        host.server.publish(name, good("v2"))
    host.write_manifest(*(entry(name) for name in names))
    seen: list[bool] = []

    def wait_for_the_others(handler: Handler) -> bool:
        deadline = time.monotonic() + 20
        while not (done := all(host.disk_md5(name) == md5(good("v2")) for name in names[1:])):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        seen.append(done)
        return True

    host.server.always[BinManagerServer.download_path("tool0")] = wait_for_the_others
    done = host.sync(HTTP_TIMEOUT="30", DOWNLOAD_TIMEOUT="60")
    assert seen == [True]
    assert (done.returncode, done.stderr) == (0, "")
    assert {host.disk_md5(name) for name in names} == {md5(good("v2"))}


@pytest.mark.parametrize("path", [MD5_PATH, DOWNLOAD_PATH])
def test_one_binary_that_never_answers_fails_alone(host: Host, path: str) -> None:
    """It is told, the others are updated."""
    host.write_manifest(entry("first"), entry("manager"), entry("last"))
    for name in ("first", "manager", "last"):
        host.install(name, good("v1"))
        host.server.publish(name, good("v2"))
    host.server.always[path] = faults.dripping_headers
    rows = json.loads(host.sync("--json", **QUICK).stdout)["results"]
    assert [row["outcome"] for row in rows] == ["updated", "failed", "updated"]
    assert host.disk_md5("manager") == md5(good("v1"))


def test_a_bin_manager_that_drips_at_all_is_told_in_one_line(host: Host) -> None:
    """However long each binary took: one cause is one line."""
    names = ("first", "manager", "last")
    host.write_manifest(*(entry(name) for name in names))
    for name in names:
        host.install(name, good("v1"))
        host.server.always[host.server.md5_path(name)] = faults.dripping_headers
    done = host.sync(**QUICK)
    assert done.returncode == 1 and "first, manager, last: " in one_line(done)


def test_no_more_than_jobs_requests_are_under_way_at_once(host: Host) -> None:
    """The server never sees more, and sees as many."""
    lock, under_way, most = threading.Lock(), [0], [0]

    def counted(handler: Handler) -> bool:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.1)
        with lock:
            under_way[0] -= 1
        return True

    names = [f"tool{number}" for number in range(12)]
    for name in names:
        host.server.publish(name, good("v1"))
    host.write_manifest(*(entry(name) for name in names))
    host.server.always["*"] = counted
    assert host.sync(JOBS="3").returncode == 0
    assert most[0] == 3


# a link that drops


class Ledger:
    """What was sent of a release: how often each block, and how many bytes in all."""

    BLOCK = 64 * 1024

    def __init__(self, release: bytes) -> None:
        self.release = release
        self.times = [0] * (len(release) // self.BLOCK + 1)
        self.starts: list[int] = []

    def send(self, handler: Handler, most: int) -> bool:
        """Send at most that many bytes of what is asked for; returns whether that was all."""
        wanted = handler.headers.get("Range", "bytes=0-")
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.starts.append(start)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.release) - 1}/{len(self.release)}")
        handler.send_header("Content-Length", str(len(self.release) - start))
        handler.end_headers()
        end = min(len(self.release), start + most)
        for at in range(start, end, self.BLOCK):
            handler.wfile.write(self.release[at : min(end, at + self.BLOCK)])
            self.times[at // self.BLOCK] += 1
        return end == len(self.release)


def cut_after(most: int, reset: bool = False) -> Behaviour:
    """Sends so many bytes of v2, announces all of them, and hangs up."""
    ledger = Ledger(good("v2"))

    def answer(handler: Handler) -> bool:
        ledger.send(handler, most)
        hang_up(handler, reset=reset)
        return False

    return answer


def large(tag: str, mib: int) -> bytes:
    """A release whose bytes differ from place to place, so that a wrong join shows."""
    return b"".join(hashlib.sha256(f"{tag}{at}".encode()).digest() * 2048 for at in range(16 * mib))


@pytest.mark.parametrize("reset", [False, True])
def test_a_large_release_over_a_link_that_drops_converges_within_the_run(plain: Host, reset: bool) -> None:
    """Each connection brings two of twenty MiB: it is resumed, and hardly a byte is sent twice."""
    release = large("v2", 20)
    ledger = Ledger(release)
    plain.server.publish("manager", release)

    def drop(handler: Handler) -> bool:
        if not ledger.send(handler, 2 * MIB):
            time.sleep(0.2 if reset else 0)  # what the other side has not yet taken is lost with a reset
            hang_up(handler, reset=reset)
        return False

    plain.server.always[DOWNLOAD_PATH] = drop
    converges(plain, release, DOWNLOAD_TIMEOUT="100")
    assert len(ledger.starts) >= 10
    assert max(ledger.times) <= 2
    assert sum(ledger.times) <= 1.3 * len(ledger.times)


def test_a_large_release_is_resumed_by_later_runs(plain: Host) -> None:
    """Each run gets three MiB before the server falls silent: the next goes on there, and no byte comes twice."""
    release = large("v2", 10)
    ledger = Ledger(release)
    plain.server.publish("manager", release)

    def stall(handler: Handler) -> bool:
        if not ledger.send(handler, 3 * MIB):
            faults.wait_for_the_client_to_go(handler)
        return False

    plain.server.always[DOWNLOAD_PATH] = faults.hanging
    for run in range(3):
        plain.server.scripts[DOWNLOAD_PATH] = [stall]
        assert plain.sync(**QUICK).returncode == 1, run
        [part] = plain.bin.glob(".manager.*.part")
        assert part.stat().st_size == 3 * MIB * (run + 1) and part.stat().st_mode & 0o7777 == 0o600
        assert plain.disk_md5("manager") == md5(good("v1"))
    plain.server.scripts[DOWNLOAD_PATH] = [stall]
    converges(plain, release)
    assert ledger.starts == [0, 3 * MIB, 6 * MIB, 9 * MIB]
    assert max(ledger.times) == 1


def leave_a_part(host: Host, release: bytes) -> None:
    """A run that brings the first MiB of `release` and no more."""
    ledger = Ledger(release)
    host.server.publish("manager", release)

    def stall(handler: Handler) -> bool:
        ledger.send(handler, MIB)
        faults.wait_for_the_client_to_go(handler)
        return False

    host.server.scripts[DOWNLOAD_PATH] = [stall]
    host.server.always[DOWNLOAD_PATH] = faults.hanging
    assert host.sync(**QUICK).returncode == 1
    [part] = host.bin.glob(".manager.*.part")
    assert part.stat().st_size == MIB
    del host.server.always[DOWNLOAD_PATH]


@pytest.mark.parametrize(
    "kind", ["ignores Range", "400", "412", "416", "501", "another part", "206 without Content-Range"]
)
def test_a_server_that_cannot_resume_is_asked_from_the_beginning(plain: Host, kind: str) -> None:
    """The bytes are right in the end, whatever it makes of Range; at the latest in the next run."""
    release = large("v2", 3)
    leave_a_part(plain, release)

    def answer(handler: Handler) -> bool:
        if "Range" not in handler.headers or kind == "ignores Range":
            handler.answer(200, release)
        elif kind.isdigit():
            handler.answer(int(kind), b"", {"Content-Range": f"bytes */{len(release)}"})
        elif kind == "another part":
            whole = f"bytes 0-{len(release) - 1}/{len(release)}"
            handler.answer(206, release, {"Content-Range": whole})
        else:
            handler.answer(206, release[MIB:])
        return False

    plain.server.always[DOWNLOAD_PATH] = answer
    if kind == "ignores Range" or kind.isdigit():
        return converges(plain, release)
    plain.sync()
    converges(plain, release)


def test_a_part_of_the_same_release_that_was_damaged_is_fetched_anew(plain: Host) -> None:
    """What lies on the disk is no more trusted than what comes over the network."""
    release = large("v2", 3)
    leave_a_part(plain, release)
    [part] = plain.bin.glob(".manager.*.part")
    part.write_bytes(b"x" * MIB)
    part.chmod(0o600)
    converges(plain, release)


def test_a_server_that_has_moved_on_during_a_download_converges(plain: Host) -> None:
    """Half of the old release and the rest of the new one: the new one is installed in the same run, nothing waits."""
    old, new = large("v2", 4), large("v3", 4)
    ledger = Ledger(old)
    plain.server.publish("manager", old)

    def drop(handler: Handler) -> bool:
        ledger.send(handler, MIB)
        plain.server.publish("manager", new)
        hang_up(handler)
        return False

    plain.server.scripts[DOWNLOAD_PATH] = [drop]
    converges(plain, new)


def test_a_part_of_a_release_that_is_no_more_is_removed(plain: Host) -> None:
    """bin-manager has another release by the next run: what came of the old one is neither used nor left."""
    leave_a_part(plain, large("v2", 3))
    new = large("v3", 2)
    plain.server.publish("manager", new)
    converges(plain, new)
    assert requests_for(plain, DOWNLOAD_PATH)[-1].get("Range") is None


def test_a_part_of_a_release_that_was_overtaken_by_hand_is_removed(plain: Host) -> None:
    """An operator goes back while a download is unfinished, and bin-manager moves on: the part is nobody's."""
    assert plain.sync().returncode == 0
    leave_a_part(plain, large("v3", 3))
    plain.server.always.clear()
    assert plain.run("rollback", "manager").returncode == 0
    plain.server.publish("manager", good("v4"))
    assert plain.sync().returncode == 0
    assert plain.strays() == [] and plain.disk_md5("manager") == md5(good("v4"))


def test_a_part_of_a_binary_that_has_left_the_manifest_is_removed(plain: Host) -> None:
    """Nobody else would ever remove it."""
    leave_a_part(plain, large("v2", 3))
    plain.server.publish("other", good("v1"))
    plain.write_manifest(entry("other"))
    assert plain.sync().returncode == 0
    assert plain.strays() == []
    assert plain.disk_md5("manager") == md5(good("v1"))


@pytest.mark.parametrize("size", ["same", "larger"])
def test_a_release_published_between_the_question_and_the_download_converges(plain: Host, size: str) -> None:
    """The bytes that come are the next release's: it is asked for again, without a hold or a pause."""
    new = good("v3") if size == "same" else good("v3", MIB)
    plain.server.scripts[DOWNLOAD_PATH] = [first(lambda: plain.server.publish("manager", new))]
    converges(plain, new)


# limits


@pytest.mark.parametrize("told", ["size", "Content-Length", "nowhere"])
def test_a_release_beyond_max_download_mib_is_refused(plain: Host, told: str) -> None:
    """Before the download where its size is told, else when it comes to that."""
    release = good("v2", 3 * MIB)
    plain.server.publish("manager", release)

    def answer(handler: Handler) -> bool:
        length = f"Content-Length: {len(release)}\r\n" if told == "Content-Length" else ""
        handler.wfile.write(f"HTTP/1.0 200 OK\r\n{length}\r\n".encode())
        for at in range(0, len(release), 65536):
            handler.wfile.write(release[at : at + 65536])
        hang_up(handler)
        return False

    plain.server.always[DOWNLOAD_PATH] = answer
    if told == "size":
        plain.server.extra["latest", "manager"] = {"size": len(release)}
    line = bad_run(plain, MAX_DOWNLOAD_MIB="2")
    assert "MAX_DOWNLOAD_MIB" in line
    parts = list(plain.bin.glob(".manager.*.part"))
    assert sum(part.stat().st_size for part in parts) <= (2 * MIB if told == "nowhere" else 0)
    if told == "size":
        assert requests_for(plain, DOWNLOAD_PATH) == []
    if told == "nowhere":  # which cost a download, so it waits
        assert plain.sync("--retry-held", MAX_DOWNLOAD_MIB="4").returncode == 0
    converges(plain, release, MAX_DOWNLOAD_MIB="4")


@pytest.mark.parametrize("kind", ["whole", "endless"])
def test_a_large_download_takes_no_memory(plain: Host, kind: str) -> None:
    """300 MiB pass through less than 100 MiB of memory; so does an answer that never ends."""
    block = b"\0" * MIB
    digest = hashlib.md5()
    for _ in range(300):
        digest.update(block)

    def send(handler: Handler) -> bool:
        length = f"Content-Length: {300 * MIB}\r\n" if kind == "whole" else ""
        handler.wfile.write(f"HTTP/1.0 200 OK\r\n{length}\r\n".encode())
        for _ in range(300 if kind == "whole" else 10**6):
            handler.wfile.write(block)
        hang_up(handler)
        return False

    data = {"md5": digest.hexdigest()}
    plain.server.always[MD5_PATH] = answering(200, {"code": 0, "message": "success", "data": data})
    plain.server.always[DOWNLOAD_PATH] = send
    done, peak = run_measured(plain, "sync", MAX_DOWNLOAD_MIB="300", DOWNLOAD_TIMEOUT="60")
    assert peak < 100, f"{peak:.0f} MiB"
    if kind == "whole":
        assert (done.returncode, done.stderr) == (0, "")
        assert (plain.bin / "manager").stat().st_size == 300 * MIB and plain.reported("manager") == data["md5"]
    else:
        assert done.returncode == 1 and "MAX_DOWNLOAD_MIB" in one_line(done)
        assert untouched(plain)


def test_an_error_page_without_end_ends(plain: Host) -> None:
    """A 404 or a 500 whose body never ends is an error like any other."""
    for status in (404, 500):

        def endless(handler: Handler, status: int = status) -> bool:
            handler.wfile.write(f"HTTP/1.1 {status} Oh\r\n\r\n".encode())
            faults.send_all(handler, b" " * 65536)
            return False

        plain.server.always[MD5_PATH] = endless
        bad_run(plain)
        (plain.state / "cache.json").unlink()  # or the second would be the same trouble, told once
    plain.server.always.clear()
    converges(plain, good("v2"))


def test_the_manifests_version_is_what_is_asked_for(plain: Host) -> None:
    """Another version than latest pins the binary to its own path."""
    plain.write_manifest(entry(version="1.2.3"))
    plain.server.publish("manager", good("pinned"), "1.2.3")
    converges(plain, good("pinned"))
    assert {path for path, _ in plain.server.requests} == {
        BinManagerServer.md5_path("manager", "1.2.3"),
        BinManagerServer.download_path("manager", "1.2.3"),
    }
    assert Path(plain.bin / "manager").read_bytes() == good("pinned")
