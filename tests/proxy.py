"""A real HTTP proxy on loopback: forwards http, tunnels https, and keeps what it could read."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # type: ignore[assignment]

    def _keep(self) -> None:
        self.server.heads.append(f"{self.requestline}\n{self.headers}")

    def do_GET(self) -> None:
        self._keep()
        parts = urlsplit(self.path)
        connection = HTTPConnection(str(parts.hostname), parts.port, timeout=10)
        kept = {key: value for key, value in self.headers.items() if not key.lower().startswith("proxy-")}
        connection.request("GET", parts.path, headers=kept)
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "content-length"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        connection.close()

    def do_CONNECT(self) -> None:
        self._keep()
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pump, args=(there, self.connection), daemon=True)
            back.start()
            _pump(self.connection, there)
            back.join(10)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    heads: list[str]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Proxy:
    """`heads` are the requests it got, with their headers, as text."""

    def __init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self.heads: list[str] = []
        self._server.heads = self.heads
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
