"""Services on a real supervisord: which releases are taken back and held, and what is the host's fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bin_proxy.host.health import probe
from bin_proxy.policy.model import HealthCheck
from tests.conftest import require
from tests.faults import Wrapper, one_line, run_later, script, sleeper, sleepers
from tests.host import SLEEP, SUPERVISORCTL, Host, dies_after, dies_at_once, eventually, good, md5, running_host

# EM_VAX: an ELF program that no host of ours, nor an emulator on it, can run.
FOREIGN = SLEEP[:18] + b"\x4b\x00" + SLEEP[20:]
BAD = {
    "dies at once": dies_at_once("bad"),
    "dies after startsecs": dies_after(1.5, "bad"),
    "of another machine": FOREIGN + b"bad",
    "empty": b"",
    "no interpreter": b"#!/nonexistent\nbad\n",
    "not a program": b"<html>not found</html>",
}


def deploy(host: Host, data: bytes, *entries: dict[str, Any] | str, **options: str) -> None:
    """Make `data` what the program "manager" runs and bin-manager has."""
    host.install("manager", data)
    host.server.publish("manager", data)
    host.program("manager", **options)
    host.write_manifest(*(entries or ("manager",)))
    host.start_supervisord()
    host.await_running("manager")


def entry(**keys: Any) -> dict[str, Any]:
    return {"name": "manager", "version": "latest", "currentMd5": "", **keys}


def results(host: Host, *arguments: str, **settings: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(host.sync("--json", *arguments, **settings).stdout)["results"]
    return {row["name"]: row for row in rows}


def held(host: Host) -> list[str]:
    """The MD5s that the state says are held for "manager"."""
    text = host.state / "state.json"
    memories = json.loads(text.read_text())["memories"] if text.exists() else {}
    return [hold["md5"] for hold in memories.get("manager", {}).get("holds", [])]


def supervisord_pid(host: Host) -> int:
    assert host.supervisord
    return host.supervisord.pid


@contextmanager
def meanwhile(condition: Callable[[], Any], action: Callable[[], Any]) -> Iterator[None]:
    """Once `condition` is seen, in another thread, do `action` (once)."""
    over, done = threading.Event(), threading.Event()

    def wait() -> None:
        while not over.is_set():
            if condition():
                action()
                done.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
        assert done.wait(10), "it was never seen"
    finally:
        over.set()
        thread.join()


# bad releases


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_release_is_rolled_back_and_held(manager_host: Host, kind: str) -> None:
    """The previous release runs again, the manifest says so, and no later run touches anything for it."""
    host, old = manager_host, good("v1")
    host.sync()
    bad = host.server.publish("manager", BAD[kind])

    done = host.sync(MIN_HEALTHY_SECONDS="2")

    assert done.returncode == 1
    assert bad[:8] in one_line(done) and "manager" in done.stderr and md5(old)[:8] in done.stderr
    assert host.disk_md5("manager") == host.running_md5("manager") == host.reported("manager") == md5(old)
    assert held(host) == [bad]
    assert host.strays() == []
    pid, downloads = host.pid("manager"), host.server.downloads
    again = host.sync()
    assert (again.returncode, again.stdout, again.stderr) == (1, "", "")
    assert host.outcomes() == {"manager": "held"}
    assert (host.pid("manager"), host.server.downloads) == (pid, downloads)


def test_with_startsecs_0_a_release_that_dies_is_taken_back_and_a_good_one_stays() -> None:
    """supervisord calls such a program started whatever it does, so only watching it tells."""
    with running_host("manager", startsecs="0") as host:
        bad = host.server.publish("manager", dies_at_once("v2"))
        assert host.outcomes() == {"manager": "rolled-back"}
        assert host.running_md5("manager") == md5(good("v1")) and held(host) == [bad]
        host.server.publish("manager", good("v3"))
        assert host.outcomes() == {"manager": "updated"}
        assert host.running_md5("manager") == md5(good("v3"))


def test_another_release_is_tried_at_once_and_a_hold_outlives_it(manager_host: Host) -> None:
    """A hold belongs to one MD5: the next release is taken, and the bad one stays held when it comes again."""
    host = manager_host
    bad = host.server.publish("manager", dies_at_once("v2"))
    assert host.outcomes() == {"manager": "rolled-back"}
    host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    host.server.publish("manager", dies_at_once("v2"))
    pid = host.pid("manager")
    assert host.outcomes() == {"manager": "held"}
    assert host.pid("manager") == pid and held(host) == [bad]
    host.server.publish("manager", good("v4"))
    assert host.outcomes() == {"manager": "updated"}


def test_a_bad_release_among_good_ones_keeps_no_other_back() -> None:
    """Each binary has its own outcome in one sync."""
    with running_host("first", "second", "third") as host:
        for name in ("first", "third"):
            host.server.publish(name, good("v2"))
        host.server.publish("second", dies_at_once("v2"))
        assert host.outcomes() == {"first": "updated", "second": "rolled-back", "third": "updated"}
        running = {name: host.running_md5(name) for name in ("first", "second", "third")}
        assert running == {"first": md5(good("v2")), "second": md5(good("v1")), "third": md5(good("v2"))}


def test_an_hour_of_a_bad_release_costs_one_download_two_restarts_and_one_message(manager_host: Host) -> None:
    """Sixty syncs over the better part of an hour, while bin-manager goes on naming the same bad release."""
    require("cc")
    host = manager_host
    host.sync()
    wrapper = Wrapper(host)
    host.server.publish("manager", dies_at_once("v2"))
    printed, lines = [], host.log().count("\n")
    for minute in range(60):
        done = run_later(host, 50 * minute, "sync")  # a slow machine takes its own time, and hourly the log tells it
        assert done.returncode == 1
        printed += done.stderr.splitlines() + done.stdout.splitlines()
    assert len(printed) == 1, printed
    assert host.server.downloads == 1
    assert wrapper.restarts() == 2, wrapper.calls()
    assert host.log().count("\n") == lines + 1, host.log()
    assert host.running_md5("manager") == md5(good("v1"))


def test_two_bin_managers_that_disagree_do_not_restart_a_service_every_minute() -> None:
    """Where answers alternate, restarts become rare, and another release is still taken at once."""
    require("cc")
    with running_host("manager", startsecs="0") as host:
        wrapper = Wrapper(host)
        for minute in range(20):
            host.server.publish("manager", good(f"v{1 + (minute + 1) % 2}"))
            run_later(host, 60 * minute, "sync", MIN_HEALTHY_SECONDS="0.2")
        assert wrapper.restarts() <= 10, wrapper.calls()
        host.server.publish("manager", good("v3"))
        assert run_later(host, 60 * 20, "sync").returncode == 0
        assert host.running_md5("manager") == md5(good("v3"))


# first installs


def test_a_first_install_that_fails_leaves_no_file_and_no_program_that_tries_and_the_next_one_starts(
    host: Host,
) -> None:
    """There is nothing to go back to: the file goes, its program is stopped, and the next good release starts it."""
    host.program("manager", startretries="1000")
    host.write_manifest("manager")
    host.start_supervisord()
    eventually(lambda: host.service_state("manager") in ("BACKOFF", "STARTING"))
    bad = host.server.publish("manager", dies_at_once("v1"))

    done = host.sync()

    assert done.returncode == 1 and bad[:8] in one_line(done)
    assert host.disk_md5("manager") is None and list(host.bin.iterdir()) == []
    assert held(host) == [bad] and host.strays() == []
    assert host.service_state("manager") in ("STOPPED", "FATAL", "EXITED")
    assert host.reported("manager") == ""
    assert host.outcomes() == {"manager": "held"}
    host.server.publish("manager", good("v2"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == md5(good("v2"))


def test_a_first_install_starts_a_program_that_could_not_start(host: Host) -> None:
    """supervisord gave the program up as its file was not there; the release brings it up, 0755."""
    host.program("manager", startretries="0")
    host.write_manifest("manager")
    host.start_supervisord()
    eventually(lambda: host.service_state("manager") == "FATAL")
    host.server.publish("manager", good("v1"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == md5(good("v1"))
    assert (host.bin / "manager").stat().st_mode & 0o7777 == 0o755


# supervisord


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_while_supervisord_is_down_nothing_is_touched(manager_host: Host, how: int) -> None:
    """No download, no hold, one line that names the way out; once supervisord is back the next run updates."""
    host = manager_host
    host.stop_supervisord(how)
    new = host.server.publish("manager", good("v2"))
    inode = (host.bin / "manager").stat().st_ino

    done = host.sync()

    assert done.returncode == 1
    assert '"service": false' in one_line(done)
    assert ((host.bin / "manager").stat().st_ino, host.server.downloads, held(host)) == (inode, 0, [])
    assert host.strays() == []
    host.start_supervisord()
    host.await_running("manager")
    assert host.sync().returncode == 0
    assert host.running_md5("manager") == new


def test_while_supervisord_shuts_down_nothing_is_touched(host: Host) -> None:
    """A supervisord that waits for a slow program to end refuses its clients; that is no bad release."""
    deploy(host, script(f"trap '' TERM\nexec {sleeper(host)}", "v1"), stopwaitsecs="6")
    host.server.publish("manager", good("v2"))
    before = host.disk_md5("manager")
    host.ctl("shutdown")
    eventually(lambda: "SHUTDOWN_STATE" in host.ctl("status"))

    done = host.sync()

    assert done.returncode == 1 and '"service": false' in one_line(done)
    assert (host.disk_md5("manager"), host.server.downloads, held(host)) == (before, 0, [])
    assert host.supervisord
    host.supervisord.wait(30)
    host.start_supervisord()
    host.await_running("manager")
    assert host.outcomes() == {"manager": "updated"}


@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_when_supervisord_goes_down_during_an_update_the_release_is_not_held(host: Host, how: str) -> None:
    """The previous release comes back; once supervisord is there again all agrees, and the release is installed."""
    old = script(f"exec {sleeper(host)}", "v1")
    deploy(host, old)
    once = host.root / "once"
    new = script(f"if mkdir {once}; then kill -{how} $PPID; sleep 2; exit 1; fi\nexec {sleeper(host)}", "v2")
    host.server.publish("manager", new)

    done = host.sync()

    assert once.exists() and done.returncode == 1
    assert md5(old)[:8] in one_line(done) or "previous" in done.stderr
    assert host.disk_md5("manager") == md5(old) and held(host) == []
    assert host.supervisord
    host.supervisord.wait(30)
    (host.root / "s.sock").unlink(missing_ok=True)
    host.start_supervisord()
    host.await_running("manager")
    host.sync()
    assert held(host) == []
    if host.disk_md5("manager") == md5(old):
        assert host.outcomes() == {"manager": "updated"}
    host.await_running("manager")
    assert host.disk_md5("manager") == host.reported("manager") == md5(new)
    assert host.strays() == []
    assert host.sync().returncode == 0


def test_a_service_that_supervisord_does_not_know_is_refused_before_the_download(manager_host: Host) -> None:
    """The line names the service; other binaries are updated; once the manifest is right, so is this one."""
    host = manager_host
    host.server.publish("tool", good("t1"))
    new = host.server.publish("manager", good("v2"))
    tool = {"name": "tool"}
    host.write_manifest(entry(service="nosuch"), tool)

    done = host.sync()

    assert done.returncode == 1 and "nosuch" in one_line(done)
    assert host.disk_md5("manager") == md5(good("v1")) and host.disk_md5("tool") == md5(good("t1"))
    assert [path for path, _ in host.server.requests if path.endswith("manager/download")] == []
    assert held(host) == []
    host.write_manifest(entry(service="manager"), tool)
    assert host.sync().returncode == 0
    assert host.running_md5("manager") == new


def test_a_stopped_program_stays_stopped_and_its_file_is_updated(manager_host: Host) -> None:
    """What an operator stopped is not started by an update, not even to check its health."""
    host = manager_host
    host.write_manifest(entry(healthCheck={"tcp": "127.0.0.1:1"}))
    host.ctl("stop", "manager")
    new = host.server.publish("manager", good("v2"))
    assert host.sync().returncode == 0
    assert host.service_state("manager") == "STOPPED"
    assert host.disk_md5("manager") == host.reported("manager") == new
    host.ctl("start", "manager")
    assert host.running_md5("manager") == new


def test_a_program_that_is_being_stopped_stays_stopped(host: Host) -> None:
    """An operator's stop that is under way when the update begins is waited for, not overruled."""
    stubborn = script(f"trap '' TERM\n{sleeper(host)} &\nwait; wait; sleep 1000", "v1")
    deploy(host, stubborn, stopwaitsecs="4", killasgroup="true", stopasgroup="false")
    new = host.server.publish("manager", good("v2"))
    stop = subprocess.Popen([*SUPERVISORCTL, "-c", str(host.conf), "stop", "manager"], stdout=subprocess.DEVNULL)
    eventually(lambda: host.service_state("manager") == "STOPPING")
    assert host.sync().returncode == 0
    stop.wait()
    assert host.disk_md5("manager") == host.reported("manager") == new
    assert host.service_state("manager") == "STOPPED" and held(host) == []


def test_a_program_that_is_stopped_while_it_is_watched_stays_stopped(manager_host: Host) -> None:
    """It had come up, so that it is STOPPED now is an operator's decision and no fault of the release."""
    host, pid = manager_host, manager_host.pid("manager")
    new = host.server.publish("manager", good("v2"))
    with meanwhile(lambda: host.pid("manager") not in (0, pid), lambda: host.ctl("stop", "manager")):
        assert host.sync(MIN_HEALTHY_SECONDS="3").returncode == 0
    assert host.disk_md5("manager") == host.reported("manager") == new
    assert host.service_state("manager") == "STOPPED" and held(host) == [] and host.strays() == []
    assert host.sync().returncode == 0 and host.service_state("manager") == "STOPPED"


@pytest.mark.parametrize("state", ["BACKOFF", "FATAL", "EXITED"])
def test_a_release_repairs_a_service_that_had_failed(host: Host, state: str) -> None:
    """A bad release for a service that was down before is held at once; a good one brings it up."""
    host.install("manager", script("exit 0", "v1") if state == "EXITED" else dies_at_once("v1"))
    options = {"startsecs": "0", "autorestart": "false"} if state == "EXITED" else {}
    host.program("manager", **({"startretries": "1000" if state == "BACKOFF" else "0"} | options))
    host.write_manifest("manager")
    host.start_supervisord()
    eventually(lambda: host.service_state("manager") == state)
    wrapper = Wrapper(host)
    bad = host.server.publish("manager", dies_at_once("v2"))
    before = host.disk_md5("manager")

    assert host.outcomes() == {"manager": "rolled-back"}
    assert (host.disk_md5("manager"), held(host), host.strays()) == (before, [bad], [])
    assert host.outcomes() == {"manager": "held"}
    assert wrapper.restarts() <= 2
    new = host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == new


def test_a_slow_stop_is_waited_for(host: Host) -> None:
    """A program that ignores TERM is killed by supervisord after stopwaitsecs; the update goes on then."""
    deploy(host, script(f"trap '' TERM\nexec {sleeper(host)}", "v1"), stopwaitsecs="3")
    new = host.server.publish("manager", good("v2"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == new


def test_a_stop_that_outlasts_restart_timeout_is_the_hosts_fault(host: Host) -> None:
    """The previous release comes back and runs, nothing is held, and with more time the update succeeds."""
    old = script(f"trap '' TERM\nexec {sleeper(host)}", "v1")
    deploy(host, old, stopwaitsecs="4")
    new = host.server.publish("manager", good("v2"))

    done = host.sync(RESTART_TIMEOUT="1")

    assert done.returncode == 1 and one_line(done)
    assert host.disk_md5("manager") == md5(old) and held(host) == []
    # The stop that was begun goes on in supervisord; whoever comes next must see to it that the service runs again.
    eventually(lambda: host.service_state("manager") in ("STOPPED", "RUNNING"))
    host.sync("--retry-held")
    assert held(host) == []
    if host.disk_md5("manager") == md5(old):
        host.await_running("manager")
        host.sync("--retry-held")
    host.await_running("manager")
    assert host.running_md5("manager") == new and host.strays() == []


def test_somebody_elses_restart_during_an_update_does_not_condemn_the_release(manager_host: Host) -> None:
    """An operator who restarts the program just then changes its pid under the watch, no more."""
    host = manager_host
    wrapper = Wrapper(host)
    new = host.server.publish("manager", good("v2"))

    def is_watched() -> bool:
        calls = wrapper.calls()
        looks = calls[calls.index("restart manager") :].count("status") if "restart manager" in calls else 0
        return looks >= 2 and host.running_md5("manager") == new

    with meanwhile(is_watched, lambda: host.ctl("restart", "manager")):
        done = host.sync(MIN_HEALTHY_SECONDS="5")
    assert (done.returncode, done.stderr, held(host)) == (0, "", [])
    assert host.running_md5("manager") == host.disk_md5("manager") == host.reported("manager") == new


def test_somebody_elses_stop_and_start_leaves_the_service_watched(host: Host) -> None:
    """One look at STOPPED, after one at RUNNING and well, may fall between that stop and that start."""
    deploy(host, good("v1"), entry(healthCheck={"command": ["true"]}))
    wrapper = Wrapper(host)
    new = host.server.publish("manager", good("v2"))

    def restart() -> None:
        host.ctl("stop", "manager")
        seen = len(wrapper.calls())
        eventually(lambda: len(wrapper.calls()) > seen + 1)  # the first has been answered
        host.ctl("start", "manager")

    with meanwhile(lambda: wrapper.calls()[-2:] == ["status", "status"] and wrapper.restarts(), restart):
        assert host.outcomes(MIN_HEALTHY_SECONDS="4") == {"manager": "updated"}
    assert host.running_md5("manager") == new
    assert f"-> {host.pid('manager')}," in host.log()


def test_a_restart_by_somebody_else_that_overlaps_ours_does_not_condemn_the_release(manager_host: Host) -> None:
    """Two restarts that cross make supervisorctl say "abnormal termination" or worse; the release is good though."""
    host = manager_host
    wrapper = Wrapper(host)
    wrapper.before("restart", f"({' '.join(SUPERVISORCTL)} -c {host.conf} restart manager >/dev/null 2>&1 &)")
    new = host.server.publish("manager", good("v2"))
    host.sync(MIN_HEALTHY_SECONDS="3")
    wrapper.hook.unlink()
    assert held(host) == []
    host.sync()
    eventually(lambda: host.running_md5("manager") == new)
    assert host.disk_md5("manager") == new


# groups


def test_every_form_of_service_is_restarted() -> None:
    """A program, group:program, group:*, a list, false, and what bears the binary's name."""
    with running_host("plain", "single", "whole", "listed", "none", "named", startsecs="0") as host:
        for name in ("single", "whole", "whole2", "other"):
            host.program(name, command=f"{host.bin / name.rstrip('2')} 1000000", startsecs="0")
        host.install("other", good("other"))
        host.groups = {"g": "single", "w": "whole,whole2", "l": "listed"}
        host.stop_supervisord()
        host.start_supervisord()
        programs = ["plain", "g:single", "w:whole", "w:whole2", "l:listed", "none", "named", "other"]
        before = {program: host.await_running(program) for program in programs}
        services = {
            "plain": "plain",
            "single": "g:single",
            "whole": "w:*",
            "listed": ["l:listed", "other"],
            "none": False,
            "named": None,
        }
        keys = {name: {"service": service} if service is not None else {} for name, service in services.items()}
        host.write_manifest(*({"name": name, **key} for name, key in keys.items()))
        for name in services:
            host.server.publish(name, good("v2"))

        assert set(host.outcomes(MIN_HEALTHY_SECONDS="0.3").values()) == {"updated"}

        after = {program: host.pid(program) for program in programs}
        assert {program for program in programs if after[program] == before[program]} == {"none"}
        assert host.disk_md5("none") == md5(good("v2"))
        for program in ("plain", "g:single", "w:whole", "w:whole2", "l:listed", "named"):
            assert host.running_md5(program) == md5(good("v2")), program


def test_of_two_processes_where_one_fails_both_go_back(host: Host) -> None:
    """The group runs the previous release again, all of it."""
    host.install("manager", good("v1"))
    host.server.publish("manager", good("v1"))
    host.program("serve", command=f"{host.bin / 'manager'} 1000000")
    host.program("work", command=f"{host.bin / 'manager'} 999999")
    host.groups = {"manager": "serve,work"}
    host.write_manifest("manager")
    host.start_supervisord()
    for name in ("manager:serve", "manager:work"):
        host.await_running(name)
    body = f'[ "$1" = 999999 ] && exit 1\nexec {sleeper(host)}'
    bad = host.server.publish("manager", script(body, "v2"))
    assert host.outcomes() == {"manager": "rolled-back"}
    assert held(host) == [bad]
    for name in ("manager:serve", "manager:work"):
        assert host.running_md5(name) == md5(good("v1"))
    new = host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    assert {host.running_md5(name) for name in ("manager:serve", "manager:work")} == {new}


def test_a_stopped_member_of_a_group_stays_stopped(host: Host) -> None:
    """The others are restarted and watched."""
    host.install("manager", good("v1"))
    for name in ("serve", "work"):
        host.program(name, command=f"{host.bin / 'manager'} 1000000")
    host.groups = {"manager": "serve,work"}
    host.write_manifest(entry(service="manager:*"))
    host.start_supervisord()
    host.await_running("manager:work")
    host.await_running("manager:serve")
    host.ctl("stop", "manager:work")
    new = host.server.publish("manager", good("v2"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.service_state("manager:work") == "STOPPED"
    assert host.running_md5("manager:serve") == new
    host.server.publish("manager", dies_at_once("v3"))
    assert host.outcomes() == {"manager": "rolled-back"}
    assert host.service_state("manager:work") == "STOPPED"
    assert host.running_md5("manager:serve") == new


@pytest.mark.parametrize("service", [None, "manager:*"])
def test_all_processes_of_a_program_with_numprocs_are_restarted(host: Host, service: str | None) -> None:
    """Such a program is a group to supervisord, and its bare name no process."""
    host.install("manager", good("v1"))
    host.program("manager", numprocs="2", process_name="%(program_name)s_%(process_num)02d", startsecs="0")
    host.write_manifest(entry(service=service) if service else "manager")
    host.start_supervisord()
    names = ["manager:manager_00", "manager:manager_01"]
    before = [host.await_running(name) for name in names]
    new = host.server.publish("manager", good("v2"))
    assert host.outcomes() == {"manager": "updated"}
    assert {host.running_md5(name) for name in names} == {new}
    assert not {host.pid(name) for name in names} & set(before)


# no supervisorctl


def without_supervisorctl(host: Host) -> dict[str, str]:
    """Settings of a host on which no supervisorctl is to be found."""
    host.settings.pop("SUPERVISORCTL")
    usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    found = shutil.which("supervisorctl", path=usual)
    if found:
        # A file that nobody may execute, seen by bin-proxy alone.
        require("unshare")
        host.command = lambda *arguments: [  # type: ignore[method-assign]
            *("unshare", "-m", "sh", "-c", f'mount --bind /dev/null {found} && exec "$@"', "sh"),
            *Host.command(host, *arguments),
        ]
    return {"PATH": "/usr/bin:/bin"}


def test_without_supervisorctl_a_file_is_updated_unless_a_service_is_named(host: Host) -> None:
    """A host that has no supervisor at all may have binaries; a service that nobody can restart is an error."""
    host.install("manager", good("v1"))
    host.install("tool", good("v1"))
    host.write_manifest(entry(service="manager"), {"name": "tool"})
    for name in ("manager", "tool"):
        host.server.publish(name, good("v2"))
    done = host.sync(**without_supervisorctl(host))
    assert done.returncode == 1 and "supervisorctl" in one_line(done) and "manager" in done.stderr
    assert (host.disk_md5("tool"), host.disk_md5("manager")) == (md5(good("v2")), md5(good("v1")))
    assert [path for path, _ in host.server.requests if path.endswith("manager/download")] == []
    host.write_manifest("manager", {"name": "tool"})
    assert host.sync(PATH="/usr/bin:/bin").returncode == 0
    assert host.disk_md5("manager") == md5(good("v2"))


def test_a_supervisorctl_that_was_set_must_exist(host: Host) -> None:
    """Exit 2, nothing asked."""
    host.write_manifest({"name": "manager", "service": False})
    done = host.sync(SUPERVISORCTL="/nonexistent/supervisorctl -c x")
    assert done.returncode == 2 and "/nonexistent/supervisorctl" in done.stderr
    assert host.server.requests == []


# the host's fault


def needing(host: Host) -> Callable[[str], bytes]:
    """Releases that run only while the file "needed" is there."""
    (host.root / "needed").touch()
    return lambda tag: script(f"[ -e {host.root / 'needed'} ] || exit 1\nexec {sleeper(host)}", tag)


def neither_will_come_up(host: Host) -> tuple[Callable[[str], bytes], Wrapper, str]:
    """v1 runs, v2 is offered, what both need goes at each restart. Returns what makes a release, and the MD5 of v2."""
    release = needing(host)
    deploy(host, release("v1"), startretries="0")
    wrapper = Wrapper(host)
    wrapper.before("restart", f"rm -f {host.root / 'needed'}")
    return release, wrapper, host.server.publish("manager", release("v2"))


def test_when_neither_release_comes_up_it_is_the_hosts_fault_and_the_third_time_it_holds(host: Host) -> None:
    """The previous release stays and the new one is not held, unless that happened three times."""
    release, wrapper, new = neither_will_come_up(host)

    done = host.sync()
    assert done.returncode == 1 and md5(release("v1"))[:8] in one_line(done)
    assert host.disk_md5("manager") == md5(release("v1")) and held(host) == [] and host.strays() == []
    calls = wrapper.restarts()
    assert host.outcomes() == {"manager": "waiting"}
    assert wrapper.restarts() == calls, "the pause is not over"

    for strike in (2, 3):
        (host.root / "needed").touch()
        host.ctl("start", "manager")  # an operator mends the host, though not for long
        host.sync("--retry-held")
        assert host.disk_md5("manager") == md5(release("v1"))
        assert held(host) == ([new] if strike == 3 else []), strike
    wrapper.hook.unlink()
    (host.root / "needed").touch()
    host.ctl("start", "manager")
    assert host.outcomes() == {"manager": "held"}
    assert host.outcomes("--retry-held") == {"manager": "updated"}
    assert host.disk_md5("manager") == new and host.pid("manager")


def test_once_the_host_is_mended_the_previous_release_is_started_after_a_pause_and_the_new_one_tried(
    host: Host,
) -> None:
    """Nobody need come: the restart is tried again with growing pauses, the first of a minute."""
    require("cc")
    _, wrapper, new = neither_will_come_up(host)
    assert host.sync().returncode == 1
    assert host.service_state("manager") == "FATAL"

    first_pause = run_later(host, 65, "sync")  # it is tried, and fails
    assert first_pause.returncode == 1 and wrapper.restarts() == 3
    wrapper.hook.unlink()
    (host.root / "needed").touch()
    run_later(host, 65 + 65, "sync")  # the second pause is longer
    assert wrapper.restarts() == 3 and host.service_state("manager") == "FATAL"
    run_later(host, 65 + 125, "sync")
    assert host.pid("manager")
    if host.disk_md5("manager") != new:
        run_later(host, 65 + 190, "sync")
    assert host.disk_md5("manager") == host.reported("manager") == new and host.pid("manager")
    assert held(host) == []
    assert run_later(host, 65 + 250, "sync").returncode == 0


def neither_will_be_well(host: Host) -> tuple[Wrapper, str]:
    """As `neither_will_come_up`, but both run all the same: only their health check fails.

    Returns the wrapper and the MD5 of v2."""
    needed, well = host.root / "needed", host.root / "well"
    needed.touch()
    body = f"rm -f {well}; [ -e {needed} ] && touch {well}\nexec {sleeper(host)}"
    deploy(host, script(body, "v1"), entry(healthCheck={"command": ["/bin/sh", "-c", f"test -e {well}"]}))
    eventually(well.exists)
    wrapper = Wrapper(host)
    wrapper.before("restart", f"rm -f {needed}")
    new = host.server.publish("manager", script(body, "v2"))
    assert host.sync(HEALTH_TIMEOUT="1").returncode == 1
    wrapper.hook.unlink()
    assert host.pid("manager")
    return wrapper, new


def test_a_program_that_an_operator_stopped_after_a_roll_back_stays_stopped(host: Host) -> None:
    """Neither the restarts of the previous release nor another one start it."""
    require("cc")
    neither_will_be_well(host)
    host.ctl("stop", "manager")
    run_later(host, 65, "sync")
    assert host.service_state("manager") == "STOPPED"
    new = host.server.publish("manager", good("v3"))
    assert run_later(host, 130, "sync").returncode == 0
    assert host.disk_md5("manager") == new and host.service_state("manager") == "STOPPED"


def test_a_previous_release_that_runs_without_being_well_is_restarted_when_its_pause_is_over(host: Host) -> None:
    """RUNNING is not well where the manifest has a health check: only a restart finds out that the host is mended."""
    require("cc")
    wrapper, new = neither_will_be_well(host)
    calls, pid = wrapper.restarts(), host.pid("manager")
    (host.root / "needed").touch()
    assert host.sync(HEALTH_TIMEOUT="1").returncode == 1
    assert host.run("status", "--check").returncode == 1
    assert (wrapper.restarts(), host.pid("manager")) == (calls, pid), "the pause is not over"
    assert run_later(host, 65, "sync", HEALTH_TIMEOUT="1").returncode == 0
    assert wrapper.restarts() == calls + 2 and (host.root / "well").exists()
    assert re.search(r"manager: runs again, pid \d+, after 1 failed", host.log())
    assert host.disk_md5("manager") == new and held(host) == []


def test_a_restart_of_the_previous_release_that_is_cut_off_leaves_nothing_stopped(host: Host) -> None:
    """bin-proxy and its supervisorctl die between the stop and the start: the next run takes that for no decision."""
    require("cc")
    wrapper, _ = neither_will_be_well(host)
    ctl = " ".join([*SUPERVISORCTL, "-c", str(host.conf)])
    wrapper.before("restart", f"{ctl} stop manager\nkill -9 $PPID\nexit 1")
    assert run_later(host, 65, "sync").returncode == -signal.SIGKILL
    eventually(lambda: host.service_state("manager") == "STOPPED")
    wrapper.hook.unlink()
    (host.root / "needed").touch()
    assert run_later(host, 70, "sync").returncode == 0
    assert host.pid("manager")


def test_a_binary_whose_service_is_down_is_not_well_though_it_is_current(host: Host) -> None:
    """After a rollback by hand where neither release came up, status says why at once."""
    check = {"command": ["/bin/sh", "-c", f"test -e {host.root / 'well'}"]}
    (host.root / "well").touch()
    deploy(host, good("v1"), entry(healthCheck=check))
    host.server.publish("manager", good("v2"))
    assert host.sync().returncode == 0
    wrapper = Wrapper(host)
    wrapper.before("restart", f"rm -f {host.root / 'well'}")
    assert host.run("rollback", "manager", HEALTH_TIMEOUT="1").returncode == 1
    assert host.disk_md5("manager") == md5(good("v2"))
    done = host.run("status", "--json", "--check")
    [row] = json.loads(done.stdout)["binaries"]
    assert (done.returncode, row["state"]) == (1, "current")
    assert "health check" in row["error"] and row["retryAt"]


def test_the_previous_release_is_started_again_though_bin_manager_is_down(host: Host) -> None:
    """A service that is down does not wait for an answer about its release."""
    release, wrapper, _ = neither_will_come_up(host)
    assert host.sync().returncode == 1
    wrapper.hook.unlink()
    (host.root / "needed").touch()
    host.server.stop()
    assert run_later(host, 65, "sync").returncode == 1
    assert host.pid("manager") and host.disk_md5("manager") == md5(release("v1"))
    assert re.search(r"manager: runs again, pid \d+, after 1 failed", host.log())


@pytest.mark.parametrize("how", ["rm", "truncate -s 1"])
def test_without_a_release_to_go_back_to_the_way_forward_is_free(host: Host, how: str) -> None:
    """The backup is gone or damaged when it is needed: said once, its restart tried again; another release is taken."""
    deploy(host, good("v1"), startretries="0")
    backup = host.state / "backups" / "manager" / md5(good("v1"))
    bad = host.server.publish("manager", script(f"{how} {backup}\nexit 1", "v2"))
    done = host.sync()
    assert done.returncode == 1 and str(backup) in one_line(done)
    assert host.disk_md5("manager") == host.reported("manager") == bad and host.strays() == []
    again = host.sync()
    assert (again.returncode, again.stderr) == (1, "")
    assert host.outcomes() == {"manager": "failed"} and held(host) == []
    new = host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == host.reported("manager") == new and host.strays() == []


def test_while_the_previous_release_does_not_run_another_release_is_tried_at_once(host: Host) -> None:
    """The way forward is never blocked: another MD5 may be the repair."""
    neither_will_come_up(host)
    assert host.sync().returncode == 1
    new = host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == new


# health


def web(port: int, status: int, tag: str) -> bytes:
    """A release that serves HTTP and always answers `status`."""
    lines = [f"#!{sys.executable}", f"# {tag}", "from http.server import BaseHTTPRequestHandler, HTTPServer"]
    lines += ["class Answer(BaseHTTPRequestHandler):", "    def do_GET(self):", f"        self.send_response({status})"]
    lines += ["        self.send_header('Content-Length', '0')", "        self.end_headers()"]
    lines += ["    def log_message(self, *args): pass"]
    lines += [f"HTTPServer(('127.0.0.1', {port}), Answer).serve_forever()"]
    return "\n".join(lines).encode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_a_service_that_stays_running_and_does_not_answer_well_is_rolled_back(host: Host, kind: str) -> None:
    """RUNNING is not enough where the manifest has a health check."""
    port = free_port()
    check = {"http": f"http://127.0.0.1:{port}/health"} if kind == "http" else {"tcp": f"127.0.0.1:{port}"}
    deploy(host, web(port, 200, "v1"), entry(healthCheck=check))
    bad = host.server.publish("manager", web(port, 500, "v2") if kind == "http" else good("v2"))
    done = host.sync(HEALTH_TIMEOUT="2")
    assert done.returncode == 1 and (str(port) in one_line(done))
    assert host.disk_md5("manager") == md5(web(port, 200, "v1")) and host.pid("manager")
    assert held(host) == [bad]
    new = host.server.publish("manager", web(port, 204, "v3"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.disk_md5("manager") == new


def test_a_health_check_must_pass_again_at_the_end_of_the_window(host: Host) -> None:
    """A service that is well at first and not any more when the window is over is rolled back."""
    well = host.root / "well"
    old = script(f"touch {well}\nexec {sleeper(host)}", "v1")
    check = {"command": ["/bin/sh", "-c", f"test -e {well}"]}
    deploy(host, old, entry(healthCheck=check, minHealthySeconds=2))
    bad = script(f"touch {well}\n(sleep 2; rm {well}) &\nexec {sleeper(host)}", "v2")
    host.server.publish("manager", bad)
    done = host.sync(HEALTH_TIMEOUT="3")
    assert done.returncode == 1 and "health" in one_line(done)
    assert host.disk_md5("manager") == md5(old) and held(host) == [md5(bad)]
    assert host.pid("manager") and well.exists()


def test_a_health_check_of_an_ipv6_address_without_a_port_asks_the_usual_one() -> None:
    """The end of the address is not taken for a port."""
    wrong = probe(HealthCheck("http", "http://[::1]/health"), 5.0)
    assert wrong is None or "not known" not in wrong


def test_a_binary_has_its_own_window_and_its_own_health_timeout(host: Host) -> None:
    """minHealthySeconds and healthTimeout of an entry win over the settings, for that entry alone."""
    late = host.root / "late"
    for name in ("watched", "unwatched", "patient", "hasty"):
        host.install(name, good("v1"))
        host.program(name, autorestart="false", startsecs="0")
    check = {"command": ["/bin/sh", "-c", f"test -e {late}"]}
    late.touch()
    host.write_manifest(
        {"name": "watched", "minHealthySeconds": 4},
        {"name": "unwatched"},
        {"name": "hasty", "healthCheck": check, "healthTimeout": 0.5},
        {"name": "patient", "healthCheck": check, "healthTimeout": 30},
    )
    host.start_supervisord()
    for name in ("watched", "unwatched", "patient", "hasty"):
        host.await_running(name)
    for name in ("watched", "unwatched"):
        host.server.publish(name, script("sleep 2\nexit 1", "v2"))
    for name in ("patient", "hasty"):
        # Becomes well some seconds after its start.
        host.server.publish(name, script(f"rm -f {late}\n(sleep 3; touch {late}) &\nexec {sleeper(host)}", "v2"))
    found = host.outcomes("--only", "watched", "--only", "unwatched", MIN_HEALTHY_SECONDS="0.3")
    assert found == {"watched": "rolled-back", "unwatched": "updated"}
    assert host.outcomes("--only", "hasty", MIN_HEALTHY_SECONDS="0.3", HEALTH_TIMEOUT="20") == {"hasty": "rolled-back"}
    eventually(late.exists)
    found = host.outcomes("--only", "patient", MIN_HEALTHY_SECONDS="0.3", HEALTH_TIMEOUT="0.5")
    assert found == {"patient": "updated"}


def test_a_health_check_for_a_binary_without_a_service_is_asked_too(host: Host) -> None:
    """Something else than supervisord may run the binary: its check decides all the same."""
    well = host.root / "well"
    well.touch()
    host.install("manager", good("v1"))
    check = {"command": ["/bin/sh", "-c", f"test -e {well} && ! grep -q BAD {host.bin / 'manager'}"]}
    host.write_manifest(entry(service=False, healthCheck=check))
    bad = host.server.publish("manager", good("BAD"))
    assert host.outcomes(HEALTH_TIMEOUT="4") == {"manager": "rolled-back"}
    assert host.disk_md5("manager") == md5(good("v1")) and held(host) == [bad]


# verifyCommand


def test_a_release_that_its_verify_command_refuses_is_never_swapped_in(manager_host: Host) -> None:
    """Non-zero: the file and the process stay what they are, the release is held and not fetched again."""
    host = manager_host
    host.write_manifest(entry(verifyCommand=["/bin/sh", "-c", "echo the signature is wrong >&2; exit 3"]))
    pid, inode = host.pid("manager"), (host.bin / "manager").stat().st_ino
    bad = host.server.publish("manager", good("v2"))
    done = host.sync()
    assert done.returncode == 1 and "the signature is wrong" in one_line(done)
    assert (host.pid("manager"), (host.bin / "manager").stat().st_ino) == (pid, inode)
    assert held(host) == [bad] and host.strays() == []
    assert host.outcomes() == {"manager": "held"}
    assert host.server.downloads == 1


def test_a_verify_command_that_cannot_run_is_the_hosts_fault(manager_host: Host) -> None:
    """Nothing is swapped, nothing is held; once it can run, the release is installed."""
    host = manager_host
    verify = host.root / "verify"
    host.write_manifest(entry(verifyCommand=[str(verify), "{file}"]))
    pid, new = host.pid("manager"), host.server.publish("manager", good("v2"))
    done = host.sync()
    assert done.returncode == 1 and str(verify) in one_line(done)
    assert host.pid("manager") == pid and host.disk_md5("manager") == md5(good("v1")) and held(host) == []
    verify.write_text(f'#!/bin/sh\nmd5sum "$1" > {host.root}/seen\nchmod -x {verify}\n')
    verify.chmod(0o755)
    assert host.outcomes() == {"manager": "updated"}
    assert (host.root / "seen").read_text().split()[0] == new
    assert Path((host.root / "seen").read_text().split()[1]).parent == host.bin
    assert host.server.downloads == 1, "what was staged is not fetched again"


def test_a_verify_command_may_run_the_staged_file_itself(manager_host: Host) -> None:
    """`["{file}", "--version"]` runs the release before it is installed."""
    host = manager_host
    host.write_manifest(entry(verifyCommand=["{file}", "--version"]))
    bad = host.server.publish("manager", FOREIGN)
    pid = host.pid("manager")
    assert host.sync().returncode == 1
    assert host.pid("manager") == pid and host.disk_md5("manager") == md5(good("v1"))
    assert bad not in (host.disk_md5("manager"), host.reported("manager"))
    new = host.server.publish("manager", good("v3"))
    assert host.outcomes() == {"manager": "updated"}
    assert host.running_md5("manager") == new


# a password for supervisord


def command_lines() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.mark.parametrize("password", ["correct", "wrong"])
def test_a_supervisor_with_a_password_works_and_tells_it_to_nobody(manager_host: Host, password: str) -> None:
    """Reached over HTTP by a config file of its own; the password is in no output, log, file or command line."""
    host, secret, port = manager_host, f"pass{os.getpid()}word", free_port()
    host.stop_supervisord()
    host.extra_conf = [f"[inet_http_server]\nport=127.0.0.1:{port}\nusername=operator\npassword={secret}"]
    host.start_supervisord()
    host.await_running("manager")
    given = secret if password == "correct" else f"not{secret}"
    conf = host.root / "ctl.conf"
    conf.write_text(f"[supervisorctl]\nserverurl=http://127.0.0.1:{port}\nusername=operator\npassword={given}\n")
    conf.chmod(0o600)
    host.settings["SUPERVISORCTL"] = " ".join([*SUPERVISORCTL, "-c", str(conf)])
    new = host.server.publish("manager", good("v2"))

    seen: set[str] = set()
    child = subprocess.Popen(
        host.command("-v", "sync"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=host.environment(),
        cwd=Path(__file__).parent.parent,
    )
    while child.poll() is None:
        seen.update(command_lines())
        time.sleep(0.02)
    output = child.communicate()[0]

    assert child.returncode == (0 if password == "correct" else 1), output
    assert host.disk_md5("manager") == (new if password == "correct" else md5(good("v1")))
    state = "".join(path.read_text(errors="replace") for path in host.state.glob("*.json"))
    assert any("supervisorctl" in line for line in seen)
    assert secret not in output + host.log() + state + "".join(seen)
    if password == "wrong":
        assert host.server.downloads == 0 and re.search("401|unauthorized|supervisor", output, re.I)


def test_nothing_of_ours_is_left_running(manager_host: Host) -> None:
    """After a good update and a bad one, only what supervisord runs is there."""
    host = manager_host
    host.server.publish("manager", script(f"exec {sleeper(host)}", "v2"))
    assert host.outcomes() == {"manager": "updated"}
    # supervisord may have started it once more by the time that it is stopped, and its own child is its own affair.
    dies = f"trap 'kill $!; exit 1' TERM\n{sleeper(host)} &\nsleep 1.2\nkill $!\nexit 1"
    host.server.publish("manager", script(dies, "v3"))
    assert host.outcomes() == {"manager": "rolled-back"}
    eventually(lambda: sleepers(host) == [host.pid("manager")])
    assert not [line for line in command_lines() if "supervisorctl" in line and str(host.root) in line]
    assert supervisord_pid(host)
