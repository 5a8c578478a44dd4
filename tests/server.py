"""A bin-manager over real HTTP whose answers a test can script, request by request."""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler"], bool]


class Handler(BaseHTTPRequestHandler):
    """One request. A behaviour gets this object; it returns True where the ordinary answer is to follow."""

    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.requests.append((self.path, dict(self.headers)))
            queue = owner.scripts.get(self.path, [])
            behaviour = queue.pop(0) if queue else owner.always.get(self.path) or owner.always.get("*")
        if behaviour and not behaviour(self):
            return
        match = re.fullmatch(r"/api/v1/releases/([^/]+)/([^/]+)/(md5|download)", self.path)
        release = owner.releases.get((match[1], match[2])) if match else None
        if match is None or release is None:
            self.answer(404, {"code": 404, "message": "no such release"})
        elif match[3] == "md5":
            data = {"md5": hashlib.md5(release).hexdigest(), **owner.extra.get((match[1], match[2]), {})}
            self.answer(200, {"code": 0, "message": "success", "data": data})
        else:
            self.send_release(release)

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def send_release(self, release: bytes) -> None:
        """Send the bytes, or the range that is asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted and start >= len(release):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(release)}"})
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(release) - 1}/{len(release)}")
        self.send_header("Content-Length", str(len(release) - start))
        self.end_headers()
        with self.server.owner.lock:
            self.server.owner.downloads += 1
        self.wfile.write(release[start:])

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    owner: BinManagerServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class BinManagerServer:
    """Serves releases on loopback.

    `address` is any of loopback's; with `context` it speaks TLS.

    `scripts[path]` is a list of behaviours, one for each coming request; `always[path]` (or `always["*"]`) one for
    all of them; `extra[(version, name)]` is put into the data of the MD5's answer.
    """

    def __init__(self, port: int = 0, address: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        self.lock = threading.Lock()
        self.releases: dict[tuple[str, str], bytes] = {}
        self.extra: dict[tuple[str, str], dict[str, Any]] = {}
        self.scripts: dict[str, list[Behaviour]] = {}
        self.always: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.downloads = 0
        self.port, self.address, self.context = port, address, context
        self.server: Server | None = None
        self.start()

    @property
    def api(self) -> str:
        return f"{'https' if self.context else 'http'}://{self.address}:{self.port}/api/v1"

    def start(self) -> None:
        self.server = Server((self.address, self.port), Handler)
        if self.context:
            # The handshake belongs into the thread of its connection, not into the one that accepts.
            self.server.socket = self.context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.server.owner = self
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def publish(self, name: str, data: bytes, version: str = "latest") -> str:
        """Make `data` the release; returns its MD5."""
        self.releases[(version, name)] = data
        return hashlib.md5(data).hexdigest()

    @staticmethod
    def md5_path(name: str, version: str = "latest") -> str:
        return f"/api/v1/releases/{version}/{name}/md5"

    @staticmethod
    def download_path(name: str, version: str = "latest") -> str:
        return f"/api/v1/releases/{version}/{name}/download"


def redirect_to(location: str, status: int = 302) -> Behaviour:
    """A behaviour that sends the client elsewhere."""

    def behave(handler: Handler) -> bool:
        handler.answer(status, b"", {"Location": location})
        return False

    return behave
