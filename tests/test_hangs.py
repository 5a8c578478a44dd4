"""What never comes back: every run ends within its stated time, leaves the host well and no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests import faults
from tests.faults import Wrapper, one_line, script, sleeper, sleepers
from tests.host import SUPERVISORCTL, Host, eventually, good, md5
from tests.server import BinManagerServer, Handler
from tests.test_services import deploy, entry, held

MD5_PATH = BinManagerServer.md5_path("manager")
DOWNLOAD_PATH = BinManagerServer.download_path("manager")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The body ends in that time, and half a minute for a slow machine."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + 30


def ours(host: Host) -> list[str]:
    """Processes that belong to this host's bin-proxy: neither supervisord nor its programs."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            words = file.read().replace(b"\0", b" ").decode(errors="replace")
            if str(host.root) in words and "supervisord" not in words and f"{host.bin}/manager" not in words:
                found.append(words)
    return found


def test_a_supervisorctl_status_that_hangs_before_an_update_touches_nothing(manager_host: Host) -> None:
    """Nothing is downloaded, the run ends, and the next one updates."""
    host = manager_host
    wrapper = Wrapper(host)
    wrapper.before("status", f"exec {sleeper(host)}")
    pid, new = host.pid("manager"), host.server.publish("manager", good("v2"))
    with within(30):
        done = host.sync(RESTART_TIMEOUT="3")
    assert done.returncode == 1 and "supervisorctl" in one_line(done)
    assert (host.pid("manager"), host.server.downloads, held(host)) == (pid, 0, [])
    assert sleepers(host) == [] and ours(host) == []
    wrapper.hook.unlink()
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == new


def test_a_supervisorctl_status_that_hangs_during_an_update_ends_in_an_agreement(manager_host: Host) -> None:
    """Once it hangs, nobody knows how the new release fares: later runs resolve that, and hold nothing."""
    host = manager_host
    wrapper = Wrapper(host)
    broken = host.root / "broken"
    snippet = f"if [ -e {broken} ]; then exec {sleeper(host)}; fi"
    wrapper.hook.write_text(f'[ "$1" = restart ] && touch {broken}\nif [ "$1" = status ]; then\n{snippet}\nfi\n')
    new = host.server.publish("manager", good("v2"))
    with within(120):
        done = host.run("sync", timeout=200, RESTART_TIMEOUT="3")
    assert done.returncode == 1 and one_line(done)
    assert sleepers(host) == [] and held(host) == []
    wrapper.hook.unlink()
    host.sync()
    host.await_running("manager")
    assert host.running_md5("manager") == host.disk_md5("manager") == host.reported("manager")
    host.sync("--retry-held")
    assert host.running_md5("manager") == host.disk_md5("manager") == new
    assert held(host) == [] and host.strays() == []


@pytest.mark.parametrize("stops_first", [False, True])
def test_a_supervisorctl_restart_that_hangs_is_the_hosts_fault(manager_host: Host, stops_first: bool) -> None:
    """The previous release comes back and nothing is held, also where the program was stopped before the hang."""
    host = manager_host
    wrapper = Wrapper(host)
    stop = f"{' '.join(SUPERVISORCTL)} -c {host.conf} stop manager" if stops_first else ":"
    wrapper.before("restart", f"{stop}\nexec {sleeper(host)}")
    new = host.server.publish("manager", good("v2"))
    with within(10):
        done = host.sync(RESTART_TIMEOUT="3")
    assert done.returncode == 1 and "3 s" in one_line(done)
    assert host.disk_md5("manager") == md5(good("v1")) and held(host) == []
    assert sleepers(host) == [] and ours(host) == []
    wrapper.hook.unlink()
    host.sync("--retry-held")
    host.await_running("manager")
    assert held(host) == []
    assert host.sync("--retry-held").returncode == 0
    assert host.running_md5("manager") == host.disk_md5("manager") == new


def test_a_health_check_that_hangs_rolls_back(host: Host) -> None:
    """It counts as one that fails; it and what it started are ended."""
    hang = host.root / "hang"
    check = {"command": ["/bin/sh", "-c", f"[ -e {hang} ] || exit 0; trap '' TERM; {sleeper(host)} & {sleeper(host)}"]}
    old = good("v1")
    deploy(host, old, entry(healthCheck=check, healthTimeout=2))
    bad = host.server.publish("manager", script(f"touch {hang}\nexec {sleeper(host)}", "v2"))
    wrapper = Wrapper(host)
    wrapper.before("restart", f"rm -f {hang}")
    with within(20):
        done = host.sync()
    assert done.returncode == 1 and "health" in one_line(done)
    assert host.running_md5("manager") == md5(old) and held(host) == [bad]
    assert eventually(lambda: sleepers(host) == [])


def test_an_http_health_check_that_drips_rolls_back(host: Host) -> None:
    """A socket's timeout never fires on it; the run ends all the same."""
    host.server.always["/health"] = faults.answering(200, b"")
    port = host.server.port
    deploy(host, good("v1"), entry(healthCheck={"http": f"http://127.0.0.1:{port}/health"}, healthTimeout=2))
    bad = host.server.publish("manager", good("v2"))

    def drip_for_the_new_one(handler: Handler) -> bool:
        if host.disk_md5("manager") == bad:
            return faults.dripping_headers(handler)
        handler.answer(200, b"")
        return False

    host.server.always["/health"] = drip_for_the_new_one
    with within(15):
        assert host.outcomes() == {"manager": "rolled-back"}
    assert host.running_md5("manager") == md5(good("v1")) and held(host) == [bad]


@pytest.mark.parametrize("grandchild", ["waited for", "left behind"])
def test_a_verify_command_whose_grandchild_hangs_is_not_waited_for(manager_host: Host, grandchild: str) -> None:
    """It holds the pipe open and ignores TERM; a verifyCommand that does not end itself holds nothing."""
    host = manager_host
    ending = "wait" if grandchild == "waited for" else "exit 0"
    verify = f"trap '' TERM; {sleeper(host)} & {ending}"
    host.write_manifest(entry(verifyCommand=["/bin/sh", "-c", verify], healthTimeout=2))
    pid, new = host.pid("manager"), host.server.publish("manager", good("v2"))
    with within(10):
        done = host.sync()
    assert eventually(lambda: sleepers(host) == [])
    if grandchild == "left behind":
        assert done.returncode == 0 and host.running_md5("manager") == new
        return
    assert done.returncode == 1 and "verifyCommand" in one_line(done)
    assert host.pid("manager") == pid and host.disk_md5("manager") == md5(good("v1")) and held(host) == []
    host.write_manifest("manager")
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == new


def test_a_verify_command_that_prints_without_end_ends(manager_host: Host) -> None:
    """Its output is neither kept nor a reason to hang."""
    host = manager_host
    host.write_manifest(entry(verifyCommand=["/bin/sh", "-c", "while :; do echo yes yes yes; done"], healthTimeout=2))
    pid = host.pid("manager")
    host.server.publish("manager", good("v2"))
    with within(10):
        done, peak = faults.run_measured(host, "sync")
    assert done.returncode == 1 and "verifyCommand" in one_line(done)
    assert peak < 100 and host.pid("manager") == pid and held(host) == []


@pytest.mark.parametrize("path", [MD5_PATH, DOWNLOAD_PATH])
@pytest.mark.parametrize("kind", ["hanging", "dripping_headers", "dripping_body"])
def test_a_bin_manager_that_never_comes_to_an_end_does_not_touch_the_service(
    manager_host: Host, kind: str, path: str
) -> None:
    """Three HTTP_TIMEOUT for the question, DOWNLOAD_TIMEOUT for the bytes; the service keeps its pid."""
    host = manager_host
    pid, new = host.pid("manager"), host.server.publish("manager", good("v2"))
    host.server.always[path] = getattr(faults, kind)
    with within(3 + 3):
        done = host.sync(HTTP_TIMEOUT="1", DOWNLOAD_TIMEOUT="3")
    assert done.returncode == 1 and one_line(done)
    assert host.pid("manager") == pid and host.disk_md5("manager") == md5(good("v1"))
    host.server.always.clear()
    assert host.sync().returncode == 0
    assert host.running_md5("manager") == new


def test_what_a_run_started_does_not_keep_the_next_one_out(manager_host: Host) -> None:
    """A process that escapes by a session of its own has not inherited the lock."""
    host = manager_host
    wrapper = Wrapper(host)
    wrapper.before("status", f"setsid {sleeper(host)} > /dev/null 2>&1 &")
    host.server.publish("manager", good("v2"))
    assert host.sync().returncode == 0
    assert sleepers(host)
    try:
        new = host.server.publish("manager", good("v3"))
        assert host.sync().returncode == 0
        assert host.running_md5("manager") == new
    finally:
        for pid in sleepers(host):
            os.kill(pid, signal.SIGKILL)


def test_a_run_that_was_killed_does_not_keep_the_next_one_out(manager_host: Host) -> None:
    """Its supervisorctl hangs on, without the lock; the next run puts all right."""
    host = manager_host
    wrapper = Wrapper(host)
    wrapper.before("restart", f"exec {sleeper(host)}")
    new = host.server.publish("manager", good("v2"))
    child = subprocess.Popen(
        host.command("sync"),
        env=host.environment(),
        cwd=os.path.dirname(os.path.dirname(__file__)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    eventually(lambda: sleepers(host))
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    wrapper.hook.unlink()
    try:
        assert sleepers(host)
        host.sync()
        assert host.sync().returncode == 0
        assert host.running_md5("manager") == host.reported("manager") == new and host.strays() == []
    finally:
        for pid in sleepers(host):
            os.kill(pid, signal.SIGKILL)
