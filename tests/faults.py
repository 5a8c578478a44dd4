"""Ways to be broken: a bin-manager or a supervisorctl that misbehaves, a clock that is ahead; and what is left."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.host import SLEEP, SUPERVISORCTL, Host
from tests.server import Behaviour, Handler

MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""

# faketime breaks the waits on the monotonic clock that Python makes (0.9.10), so this shifts the date and no more.
LATER = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, clock, at);
    const char *later = getenv("LATER");
    if (!failed && later && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += atol(later);
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of trouble that a run prints off a terminal."""
    assert done.stdout == "", done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def run_measured(host: Host, *arguments: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run bin-proxy; returns what it did and its peak memory in MiB."""
    peak = host.root / "peak"
    # A small process in between: Linux counts the memory of the one that forks as its child's.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(peak), *host.command(*arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
        env=host.environment(**settings),
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done, int(peak.read_text()) / 1024


def run_later(host: Host, seconds: float, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run bin-proxy at a time `seconds` ahead of the clock, as if it had been waited for."""
    library = host.root / "later.so"
    if not library.exists():
        (host.root / "later.c").write_text(LATER)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, host.root / "later.c"], check=True)
    return host.run(*arguments, LD_PRELOAD=str(library), LATER=str(seconds), **settings)


def script(body: str, tag: str) -> bytes:
    """A release that is a shell script."""
    return f"#!/bin/sh\n# {tag}\n{body}\n".encode()


def sleeper(host: Host) -> str:
    """A program that sleeps for ever, under a path of this host's by which what is left of it can be found."""
    path = host.bin / "sleeper"
    if not path.exists():
        path.write_bytes(SLEEP)
        path.chmod(0o755)
    return f"{path} 1000000"


def sleepers(host: Host) -> list[int]:
    """The processes that run `sleeper`."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else [b""]
            if words[0] == str(host.bin / "sleeper").encode():
                found.append(int(entry.name))
    return found


class Wrapper:
    """The host's supervisorctl, which writes down its calls and first runs a piece of shell where a test gives one."""

    def __init__(self, host: Host) -> None:
        self.calls_path = host.root / "calls"
        self.hook = host.root / "hook"
        path = host.root / "ctl"
        lines = ["#!/bin/sh", f'echo "$*" >> {self.calls_path}', f"if [ -e {self.hook} ]; then . {self.hook}; fi"]
        path.write_text("\n".join([*lines, f'exec {" ".join(SUPERVISORCTL)} -c {host.conf} "$@"']) + "\n")
        path.chmod(0o755)
        host.settings["SUPERVISORCTL"] = str(path)

    def before(self, action: str, shell: str) -> None:
        """Run `shell` before each `supervisorctl ACTION`."""
        self.hook.write_text(f'if [ "$1" = {action} ]; then\n{shell}\nfi\n')

    def calls(self) -> list[str]:
        return self.calls_path.read_text().splitlines() if self.calls_path.exists() else []

    def restarts(self) -> int:
        return sum(call.startswith("restart") for call in self.calls())


# What a bin-manager may do to those who ask. A behaviour that returns True lets the ordinary answer follow.


def hang_up(handler: Handler, *, reset: bool = False) -> None:
    """End the connection, with FIN or with RST."""
    handler.close_connection = True
    with suppress(OSError):
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)


def wait_for_the_client_to_go(handler: Handler) -> None:
    with suppress(OSError):
        handler.connection.settimeout(60)
        while handler.connection.recv(4096):
            pass
    handler.close_connection = True


def send_all(handler: Handler, chunk: bytes, pause: float = 0.0) -> None:
    """Send the same for ever, or until the client has gone."""
    handler.close_connection = True
    while True:
        handler.wfile.write(chunk)
        handler.wfile.flush()
        time.sleep(pause)


def hanging(handler: Handler) -> bool:
    wait_for_the_client_to_go(handler)
    return False


def dripping_headers(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    send_all(handler, b"x", 0.1)
    return False


def dripping_body(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    send_all(handler, b" ", 0.1)
    return False


def endless_body(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    send_all(handler, b" " * 65536)
    return False


def endless_chunks(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    send_all(handler, b"10000\r\n" + b" " * 65536 + b"\r\n")
    return False


def endless_chunk_size(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    send_all(handler, b"0" * 65536)
    return False


def endless_headers(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    send_all(handler, b"X-More: and more\r\n" * 100)
    return False


def endless_header_line(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    send_all(handler, b"x" * 65536)
    return False


def endless_continue(handler: Handler) -> bool:
    send_all(handler, b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
    return False


def cut(handler: Handler) -> bool:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"code": 0, "mess')
    hang_up(handler)
    return False


def reset(handler: Handler) -> bool:
    hang_up(handler, reset=True)
    return False


def no_http(handler: Handler) -> bool:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    hang_up(handler)
    return False


def redirect_loop(handler: Handler) -> bool:
    handler.answer(302, b"", {"Location": handler.path})
    return False


def redirect_endless(handler: Handler) -> bool:
    handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: " + handler.path.encode() + b"\r\n\r\n")
    send_all(handler, b" " * 65536)
    return False


def answering(status: int, body: object, headers: dict[str, str] | None = None) -> Behaviour:
    """Always the same answer."""

    def answer(handler: Handler) -> bool:
        handler.answer(status, body, headers)
        return False

    return answer


def first(action: Callable[[], object]) -> Behaviour:
    """Do something on the server's side, then answer as ever."""

    def act(handler: Handler) -> bool:
        action()
        return True

    return act
