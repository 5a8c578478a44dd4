"""A host and a bin-manager in a folder: files, a manifest, nginx with bin-manager's answers as files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.bench.measure import MIB, REPOSITORY, Variant

_NGINX = """
daemon off;
user root;
worker_processes 1;
pid {root}/nginx.pid;
error_log {root}/nginx.err;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    default_type application/octet-stream;
    client_body_temp_path {root}/tmp; proxy_temp_path {root}/tmp; fastcgi_temp_path {root}/tmp;
    uwsgi_temp_path {root}/tmp; scgi_temp_path {root}/tmp;
    server {{
        listen 127.0.0.1:{port};
        root {root}/www;
        location ~ /md5$ {{ default_type application/json; }}
        location ~ /download$ {{ limit_rate {limit}; }}
    }}
}}
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def await_port(port: int, child: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and child.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise SystemExit(f"the server on port {port} did not come up")


def random_file(path: Path, size: int) -> str:
    """Write `size` random bytes; returns their MD5. Never all at once in memory: see `measure.run`."""
    digest = hashlib.md5()
    with open(path, "wb") as file:
        for done in range(0, size, MIB):
            chunk = os.urandom(min(MIB, size - done))
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


class Rig:
    """One host whose bin-manager is nginx.

    Args:
        root: its folder, made by the caller.
        service: False where there is nothing to restart.
    """

    def __init__(self, root: Path, *, service: bool) -> None:
        self.root, self._service = root, service
        self.bin, self.state, self.www = root / "bin", root / "state", root / "www/api/v1/releases/latest"
        for folder in (self.bin, self.www, root / "tmp"):
            folder.mkdir(parents=True)
        self.names: list[str] = []
        self.port = free_port()
        self._children: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "BIN_MANAGER_API": f"http://127.0.0.1:{self.port}/api/v1",
            "BIN_DIR": str(self.bin),
            "BIN_MANIFESTS": str(root / "manifest.json"),
            "LOG_FILE": str(root / "log"),
            "STATE_DIR": str(self.state),
            "SUPERVISORCTL": f"{sys.executable} -m supervisor.supervisorctl",
        }

    @property
    def bin_proxy(self) -> list[str]:
        """The command line, as far as the subcommand."""
        return [sys.executable, "-m", "bin_proxy"]

    @property
    def sync(self) -> Variant:
        """What cron runs."""
        return Variant("bin-proxy", [*self.bin_proxy, "sync"], self.environment)

    @property
    def floor(self) -> Variant:
        """An interpreter that has the libraries and does nothing."""
        return Variant("floor", [sys.executable, "-c", "import click, requests, filelock"], self.environment)

    def start_nginx(self, limit: str = "0") -> None:
        """Serve what `publish` put there; `limit` is a rate a connection, such as 16m."""
        conf = self.root / "nginx.conf"
        conf.write_text(_NGINX.format(root=self.root, port=self.port, limit=limit))
        self.start([shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(conf)], self.port)

    def start(self, command: list[str], port: int) -> None:
        """Start a server that `close` ends."""
        self._children.append(subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL))
        await_port(port, self._children[-1])

    def publish(self, name: str, file: Path, md5: str) -> None:
        """Make `file` the release."""
        folder = self.www / name
        folder.mkdir(exist_ok=True)
        (folder / "md5").write_text(json.dumps({"code": 0, "message": "success", "data": {"md5": md5}}))
        (folder / "download").unlink(missing_ok=True)
        (folder / "download").symlink_to(file)

    def write_manifest(self, names: list[str]) -> None:
        """`names` are the binaries."""
        self.names = names
        service = {} if self._service else {"service": False}
        entries = [{"name": name, "version": "latest", "currentMd5": "", **service} for name in names]
        (self.root / "manifest.json").write_text(json.dumps({"binaries": entries}, indent=2) + "\n")

    def fill(self, count: int, size: int) -> None:
        """Install and publish `count` binaries of `size` bytes, the same on both sides."""
        names = [f"binary-{at:04}" for at in range(count)]
        for name in names:
            self.publish(name, self.bin / name, random_file(self.bin / name, size))
            (self.bin / name).chmod(0o755)
        self.write_manifest(names)
        os.sync()

    def settle(self) -> None:
        """The first runs: they hash everything, record it in the manifest, and see that the files are not too fresh."""
        for _ in range(2):
            self.run("sync")
            time.sleep(2.1)
            self.run("sync")

    def run(self, *arguments: str) -> str:
        """Run bin-proxy; returns what it printed."""
        done = subprocess.run(
            [*self.bin_proxy, *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise SystemExit(f"bin-proxy {' '.join(arguments)} exited {done.returncode}: {done.stderr}")
        return done.stdout

    def trace(self, what: str, *arguments: str) -> list[str]:
        """Run bin-proxy under strace; returns the traced calls, one a line, descriptors with their paths."""
        to = self.root / "strace"
        command = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", f"trace={what}", "-e", "signal=none", "-o", str(to)]
        subprocess.run([*command, *self.bin_proxy, *arguments], cwd=REPOSITORY, env=self.environment, check=True)
        return to.read_text().splitlines()

    def close(self) -> None:
        """End the servers and remove everything."""
        for child in self._children:
            child.terminate()
            child.wait(20)
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def rig(*, service: bool = True) -> Iterator[Rig]:
    """A rig that is gone afterwards."""
    made = Rig(Path(tempfile.mkdtemp(prefix="bpbench")), service=service)
    try:
        yield made
    finally:
        made.close()
