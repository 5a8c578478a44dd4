"""examples/nginx-cache.conf: a real nginx between hosts and bin-manager that asks once, and gives nobody another's."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from urllib.parse import urlsplit

import pytest

from tests.conftest import require
from tests.host import Host, eventually, good, md5
from tests.server import Handler

CONF = Path(__file__).parent.parent / "examples" / "nginx-cache.conf"
MIB = 1024 * 1024
NAME = "manager"
TOKEN = "Bearer s3cret"


class Cache:
    """The example's nginx in front of a host's bin-manager."""

    def __init__(self, host: Host) -> None:
        self.host, self.root = host, host.root / "nginx"
        self.root.mkdir()
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        text = CONF.read_text()
        for old, new in (
            ("/var/cache/nginx/", f"{self.root}/"),
            ("listen 8088;", f"listen 127.0.0.1:{self.port};"),
            ("server 127.0.0.1:8080;", f"server {urlsplit(host.server.api).netloc};"),
        ):
            assert old in text
            text = text.replace(old, new)
        (self.root / "cache.conf").write_text(text)
        folders = "".join(f"{name}_temp_path {self.root}; " for name in ("fastcgi", "uwsgi", "scgi", "proxy"))
        (self.root / "nginx.conf").write_text(
            f"daemon off; pid {self.root}/pid; error_log {self.root}/error.log;\n"
            + ("user root;\n" if os.geteuid() == 0 else "")
            + f"events {{}}\nhttp {{ access_log off; client_body_temp_path {self.root}; {folders}\n"
            + f"include {self.root}/cache.conf; }}\n"
        )
        command = ["nginx", "-e", f"{self.root}/error.log", "-c", f"{self.root}/nginx.conf"]
        self.nginx = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        eventually(lambda: self._listens())
        self.api = f"http://127.0.0.1:{self.port}/api/v1"

    def _listens(self) -> bool:
        assert self.nginx.poll() is None, (self.root / "error.log").read_text()
        with socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, what: str, **headers: str) -> tuple[int, bytes]:
        """GET md5 or download; returns the status and the body."""
        request = urllib.request.Request(f"{self.api}/releases/latest/{NAME}/{what}")
        for key, value in headers.items():
            request.add_header(key, value)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def asked(self, what: str) -> int:
        """How many such questions reached bin-manager."""
        with self.host.server.lock:
            return sum(path.endswith(f"/{what}") for path, _ in self.host.server.requests)

    def close(self) -> None:
        self.nginx.terminate()
        self.nginx.wait(20)


def ranged(handler: Handler) -> bool:
    """Answer a closed range, as nginx's slices ask for, with an ETag; whoever lacks the token is turned away."""
    if handler.server.owner.extra.get(("private", NAME)) and handler.headers.get("Authorization") != TOKEN:
        handler.answer(401, {"code": 401, "message": "who are you"})
        return False
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if not wanted:
        return True
    data = handler.server.owner.releases[("latest", NAME)]
    first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
    headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "ETag": f'"{md5(data)}"'}
    handler.answer(206, data[first : last + 1], headers)
    return False


@pytest.fixture
def cache(host: Host) -> Iterator[Cache]:
    """The cache, and a bin-manager behind it that has one release of several slices."""
    require("nginx")
    host.server.publish(NAME, good("v1", 20 * MIB))
    host.server.always["*"] = ranged
    host.write_manifest({"name": NAME, "version": "latest", "currentMd5": "", "service": False})
    made = Cache(host)
    try:
        yield made
    finally:
        made.close()


def test_many_hosts_are_one_question_and_each_byte_once(cache: Cache) -> None:
    """However many ask at once, bin-manager answers each question once, and a sync through the cache works."""
    release = cache.host.server.releases[("latest", NAME)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: cache.get("md5"), range(48)))
        bodies = list(pool.map(lambda _: cache.get("download"), range(16)))
    assert {status for status, _ in answers + bodies} == {200}
    assert {md5(body) for _, body in bodies} == {md5(release)}
    assert cache.asked("md5") <= 2  # an answer is good for a second, which may end in between
    assert cache.asked("download") == 3  # slices of 8 MiB
    done = cache.host.sync(BIN_MANAGER_API=cache.api)
    assert (done.returncode, done.stderr) == (0, "")
    assert cache.host.disk_md5(NAME) == md5(release)


def test_a_download_is_resumed_through_the_cache(cache: Cache) -> None:
    """A range is answered with that range, and what a sync had already is not fetched again."""
    release = cache.host.server.releases[("latest", NAME)]
    assert cache.get("download", Range=f"bytes={17 * MIB}-") == (206, release[17 * MIB :])
    assert cache.asked("download") == 1
    part = cache.host.bin / f".{NAME}.{md5(release)}.part"
    part.write_bytes(release[: 17 * MIB])
    part.chmod(0o600)
    cache.host.server.requests.clear()
    assert cache.host.sync(BIN_MANAGER_API=cache.api).returncode == 0
    assert cache.host.disk_md5(NAME) == md5(release)
    fetched = [headers["Range"] for path, headers in cache.host.server.requests if path.endswith("/download")]
    assert fetched in ([], [f"bytes={16 * MIB}-{24 * MIB - 1}"])


def test_a_new_release_is_never_mixed_up_with_the_cached_one(cache: Cache) -> None:
    """A release published right after hosts fetched the one before is installed at once, never from its bytes."""
    assert cache.host.sync(BIN_MANAGER_API=cache.api).returncode == 0
    newer = cache.host.server.publish(NAME, good("v2", 20 * MIB))
    eventually(lambda: newer.encode() in cache.get("md5")[1])
    done = cache.host.sync(BIN_MANAGER_API=cache.api)
    assert (done.returncode, done.stderr) == (0, "")
    assert cache.host.disk_md5(NAME) == newer


def test_a_private_release_is_not_given_to_strangers(cache: Cache) -> None:
    """What is in the cache for one who may have it stays out of reach of one who may not."""
    cache.host.server.extra[("private", NAME)] = {"yes": True}
    for what in ("md5", "download"):
        assert cache.get(what, Authorization=TOKEN)[0] == 200
        assert cache.get(what)[0] == 401
        assert cache.get(what, Authorization="Bearer other")[0] == 401
        assert cache.get(what, Authorization=TOKEN)[0] == 200
