"""A host in a folder: a real supervisord, real processes, a real bin-manager over HTTP, the real command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.server import BinManagerServer

SLEEP = Path("/bin/sleep").resolve().read_bytes()
FALSE = Path("/bin/false").resolve().read_bytes()
SUPERVISORD = [sys.executable, "-m", "supervisor.supervisord"]
SUPERVISORCTL = [sys.executable, "-m", "supervisor.supervisorctl"]


def good(tag: str, size: int = 0) -> bytes:
    """A release that runs: an ELF program with a tag behind it, so that its MD5 is its own."""
    return SLEEP + tag.encode() + b"\0" * size


def dies_at_once(tag: str) -> bytes:
    """A release that starts and exits 1."""
    return FALSE + tag.encode()


def dies_after(seconds: float, tag: str) -> bytes:
    """A release that runs for some seconds, then exits 1."""
    return f"#!/bin/sh\n# {tag}\nsleep {seconds}\nexit 1\n".encode()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Poll until `condition` is true; returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {condition}")
        time.sleep(0.03)
    return found


class Host:
    """One host; `binaries` are the manifest's entries, `programs` the supervisor programs and their options."""

    def __init__(self) -> None:
        # supervisord's socket needs a short path.
        self.root = Path(tempfile.mkdtemp(prefix="bp", dir="/tmp"))
        self.bin = self.root / "bin"
        self.state = self.root / "state"
        self.manifest_path = self.root / "manifest.json"
        self.log_path = self.root / "log"
        self.conf = self.root / "s.conf"
        self.socket = self.root / "s.sock"
        self.bin.mkdir()
        self.server = BinManagerServer()
        self.supervisord: subprocess.Popen[bytes] | None = None
        self.programs: dict[str, dict[str, str]] = {}
        self.groups: dict[str, str] = {}
        self.extra_conf: list[str] = []  # sections of supervisord.conf
        self.settings = {
            "BIN_MANAGER_API": self.server.api,
            "BIN_DIR": str(self.bin),
            "BIN_MANIFESTS": str(self.manifest_path),
            "LOG_FILE": str(self.log_path),
            "STATE_DIR": str(self.state),
            "SUPERVISORCTL": " ".join([*SUPERVISORCTL, "-c", str(self.conf)]),
            "BIN_PROXY_CONFIG": str(self.root / "config"),
            "HTTP_TIMEOUT": "2",
            "DOWNLOAD_TIMEOUT": "20",
            "RESTART_TIMEOUT": "15",
            "MIN_HEALTHY_SECONDS": "1",
            "HEALTH_TIMEOUT": "4",
        }
        (self.root / "config").write_text("")

    # what is on the host

    def install(self, name: str, data: bytes, mode: int = 0o755) -> None:
        (self.bin / name).write_bytes(data)
        (self.bin / name).chmod(mode)

    def write_manifest(self, *entries: dict[str, Any] | str) -> None:
        rows = [{"name": e, "version": "latest", "currentMd5": ""} if isinstance(e, str) else e for e in entries]
        self.manifest_path.write_text(json.dumps({"binaries": rows}, indent=2) + "\n")

    def reported(self, name: str) -> str | None:
        entries = json.loads(self.manifest_path.read_text())["binaries"]
        return next(entry.get("currentMd5") for entry in entries if entry["name"] == name)

    def disk_md5(self, name: str) -> str | None:
        path = self.bin / name
        return md5(path.read_bytes()) if path.exists() else None

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def strays(self) -> list[str]:
        """What an interruption may have left: everything that is neither ours to keep nor the host's."""
        found = [str(p.relative_to(self.root)) for p in self.bin.iterdir() if p.name.startswith(".")]
        found += [str(p.relative_to(self.root)) for p in self.root.glob("*.tmp")]
        if self.state.exists():
            found += [str(p.relative_to(self.root)) for p in self.state.rglob("*.tmp")]
            found += [str(p.relative_to(self.root)) for p in (self.state / "journal").glob("*")]
        return found

    # supervisor

    def program(self, name: str, **options: str) -> None:
        """A program for supervisord.conf; by default it runs BIN_DIR/name for ever."""
        defaults = {"command": f"{self.bin / name} 1000000", "startsecs": "1", "startretries": "1", "stopwaitsecs": "5"}
        self.programs[name] = defaults | options

    def write_conf(self) -> None:
        lines = ["[unix_http_server]", f"file={self.socket}", "[supervisord]", f"logfile={self.root}/s.log"]
        lines += [f"pidfile={self.root}/s.pid", f"childlogdir={self.root}", "nodaemon=true", "[supervisorctl]"]
        lines += [f"serverurl=unix://{self.socket}", "[rpcinterface:supervisor]"]
        lines += ["supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface"]
        for name, options in self.programs.items():
            lines += [f"[program:{name}]", *(f"{key}={value}" for key, value in options.items())]
        for name, programs in self.groups.items():
            lines += [f"[group:{name}]", f"programs={programs}"]
        lines += self.extra_conf
        self.conf.write_text("\n".join(lines) + "\n")

    def start_supervisord(self) -> None:
        self.write_conf()
        self.supervisord = subprocess.Popen(
            [*SUPERVISORD, "-c", str(self.conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )
        eventually(lambda: self.socket.exists() and not re.search("refused|no such", self.ctl("pid")))

    def stop_supervisord(self, how: int = signal.SIGTERM) -> None:
        if self.supervisord:
            self.supervisord.send_signal(how)
            self.supervisord.wait(30)
            self.supervisord = None

    def ctl(self, *arguments: str) -> str:
        command = [*SUPERVISORCTL, "-c", str(self.conf), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60).stdout

    def service_state(self, name: str) -> str:
        match = re.search(rf"^{re.escape(name)}\s+(\w+)", self.ctl("status"), re.M)
        return match[1] if match else ""

    def pid(self, name: str) -> int:
        match = re.search(rf"^{re.escape(name)}\s+RUNNING\s+pid (\d+)", self.ctl("status"), re.M)
        return int(match[1]) if match else 0

    def running_md5(self, name: str) -> str | None:
        """The MD5 of what the service really executes."""
        pid = self.pid(name)
        return md5(Path(f"/proc/{pid}/exe").read_bytes()) if pid else None

    def await_running(self, name: str) -> int:
        return int(eventually(lambda: self.pid(name)))

    # bin-proxy

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "bin_proxy", *arguments]

    def environment(self, **settings: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **self.settings, **settings}

    def run(self, *arguments: str, timeout: float = 120, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run bin-proxy as cron does: no terminal. `settings` join the environment."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parent.parent,
            env=self.environment(**settings),
        )
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        return done

    def sync(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run("sync", *arguments, **settings)

    def outcomes(self, *arguments: str, **settings: str) -> dict[str, str]:
        done = self.sync("--json", *arguments, **settings)
        return {row["name"]: row["outcome"] for row in json.loads(done.stdout)["results"]}

    def close(self) -> None:
        try:
            self.stop_supervisord()
        except subprocess.TimeoutExpired:
            self.stop_supervisord(signal.SIGKILL)
        self.server.stop()
        subprocess.run(["pkill", "-KILL", "-f", f"^{self.bin}/"], check=False)
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def running_host(*names: str, tag: str = "v1", **options: str) -> Iterator[Host]:
    """A host on which each name is a program that runs the good release `tag`, which is published, too."""
    host = Host()
    try:
        for name in names:
            host.install(name, good(tag))
            host.server.publish(name, good(tag))
            host.program(name, **options)
        host.write_manifest(*names)
        host.start_supervisord()
        for name in names:
            host.await_running(name)
        yield host
    finally:
        host.close()


@contextmanager
def running(host: Host, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """`bin-proxy` in the background; what is still running at the end is ended."""
    process = subprocess.Popen(
        host.command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=host.environment(**settings),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
