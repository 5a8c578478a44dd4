"""A bin-manager MS milliseconds away that counts its connections: `python -m tests.bench.slow_server PORT MS ROOT`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests have no body."""

    opened = requests = 0
    delay = 0.05
    root = Path()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self._read = transport, b""
        Connection.opened += 1

    def data_received(self, data: bytes) -> None:
        self._read += data
        while b"\r\n\r\n" in self._read:
            head, _, self._read = self._read.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            if path == "/counts":
                self._answer(200, f'{{"connections": {Connection.opened}, "requests": {Connection.requests}}}'.encode())
                continue
            Connection.requests += 1
            file = self.root / path.lstrip("/")
            body, status = (file.read_bytes(), 200) if file.is_file() else (b"{}", 404)
            asyncio.get_running_loop().call_later(self.delay, self._answer, status, body)

    def _answer(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


async def serve(port: int) -> None:
    """Serve until the end."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=256)
    await server.serve_forever()


if __name__ == "__main__":
    Connection.delay, Connection.root = float(sys.argv[2]) / 1000, Path(sys.argv[3])
    asyncio.run(serve(int(sys.argv[1])))
