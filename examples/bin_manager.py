#!/usr/bin/env python3
"""A small bin-manager, to try bin-proxy with: serves RELEASES/{version}/{name} as the release of that name.

    mkdir -p RELEASES/latest
    python3 examples/bin_manager.py --port 8080 RELEASES
    cp manager RELEASES/latest/.manager.new && mv RELEASES/latest/.manager.new RELEASES/latest/manager

Publish like that, by renaming: whoever downloads then gets one release whole, the old or the new one. It needs
nothing but Python 3.10; it has neither TLS nor passwords, so let it listen on loopback or behind a proxy that has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import stat
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

PART = r"([A-Za-z0-9][A-Za-z0-9._+-]{0,127})"  # no "..", no "/", no hidden file
ROUTE = re.compile(rf"/api/v1/releases/{PART}/{PART}/(md5|download)")
CHUNK = 1024 * 1024


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True
    releases: Path

    def do_GET(self) -> None:
        route = ROUTE.fullmatch(unquote(urlsplit(self.path).path))
        if not route:
            self.answer(404, "no such page")
            return
        version, name, what = route.groups()
        try:
            file = open_release(self.releases / version / name)
        except OSError as error:
            self.answer(404, f"no release {version} of {name}: {error.strerror}")
            return
        with file:
            if what == "md5":
                self.answer(200, "success", {"md5": md5_of(file)})
            else:
                self.send_release(file)

    def answer(self, status: int, message: str, data: object = None, headers: dict[str, str] | None = None) -> None:
        """Send JSON; `code` is 0 where all is well."""
        body = json.dumps({"code": 0 if status == 200 else status, "message": message, "data": data}).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_release(self, file: BinaryIO) -> None:
        """Send the bytes, or the one range of them that is asked for."""
        size = os.fstat(file.fileno()).st_size
        first, last, status = 0, size - 1, 200
        wanted = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", self.headers.get("Range", "").strip())
        if wanted and wanted[0] != "bytes=-":
            status = 206
            if wanted[1]:
                first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            else:  # the last N bytes
                first = max(0, size - int(wanted[2]))
            if first > last:
                self.answer(416, "no such range", None, {"Content-Range": f"bytes */{size}"})
                return
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        file.seek(first)
        left = last - first + 1
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            self.wfile.write(chunk)
            left -= len(chunk)
        if left:  # the file has become shorter meanwhile: end the connection, so that it is noticed
            self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # whoever asked has gone
            self.close_connection = True


def open_release(path: Path) -> BinaryIO:
    """Open the file, and see that it is one. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a file")
    return open(fd, "rb")


def md5_of(file: BinaryIO) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0: any that is free")
    parser.add_argument("releases", metavar="RELEASES", type=Path, help="folder of {version}/{name}")
    options = parser.parse_args()
    if not options.releases.is_dir():
        parser.error(f"{options.releases} is no folder")
    Handler.releases = options.releases
    ThreadingHTTPServer.request_queue_size = 128  # a fleet asks all at once, at the full minute
    try:
        server = ThreadingHTTPServer((options.host, options.port), Handler)
    except OSError as error:
        parser.error(f"cannot listen on {options.host}:{options.port}: {error.strerror}")
    host, port = str(server.server_address[0]), server.server_address[1]
    print(f"bin-manager: http://{host}:{port}/api/v1 serves {options.releases}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
