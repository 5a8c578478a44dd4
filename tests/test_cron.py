"""A real cron daemon runs the example's line, on a host where everything is at its default place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require, require_root
from tests.host import Host, eventually, good, md5

REPOSITORY = Path(__file__).parent.parent

# Mounts that only cron and its children see, and a PID namespace that ends with them: the machine's own /etc, crontabs,
# /usr/local/bin and mail stay as they are.
MACHINE = r"""
set -eu
root=$1
mkdir "$root/private"
mount -t tmpfs tmpfs "$root/private"
own() {  # a copy of a folder that is ours alone
    upper=$root/private$1/upper work=$root/private$1/work
    mkdir -p "$upper" "$work"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$upper,workdir=$work" "$1" 2>/dev/null || {
        cp -a "$1/." "$upper"
        mount --bind "$upper" "$1"
    }
    mountpoint -q "$1"  # or nothing of it may be touched
}
own /etc
own /usr/local/bin
own /usr/sbin
for folder in /var/spool/cron /var/log /var/lib /run; do mount -t tmpfs -o mode=755 tmpfs "$folder"; done
mkdir /var/spool/cron/crontabs
rm -rf /etc/cron.d /etc/bin-proxy /etc/supervisord.conf /usr/sbin/sendmail
: > /etc/crontab
sed -i /pam_loginuid/d /etc/pam.d/cron  # not to be had in a container
cp -R --no-preserve=ownership "$root/machine/." /
cd /
/usr/local/bin/supervisord -n -c /etc/supervisord.conf > /dev/null 2>&1 &
exec cron -f
"""


class Machine:
    """A host that cron keeps at its releases; `files` are what an operator put on it, by path."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.process: subprocess.Popen[bytes] | None = None

    def put(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        file = self.host.root / "machine" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        file.chmod(mode)

    def put_program(self, name: str, module: str) -> None:
        """What pip makes of an entry point."""
        code = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom {module} import main\nmain()\n"
        self.put(f"/usr/local/bin/{name}", f"#!{sys.executable}\n{code}", 0o755)

    def boot(self) -> None:
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, "sh", "-c", MACHINE, "sh", str(self.host.root)],
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
        )

    def read(self, path: str) -> str:
        """A file as the machine sees it."""
        inside = self.pid_of(b"cron\0-f\0")
        file = Path(f"/proc/{inside}/root{path}")
        return file.read_text() if inside and file.exists() else ""

    def pid_of(self, command: bytes) -> int:
        """The PID, here, of a process of the machine."""
        try:
            ours = Path(f"/proc/{self.process.pid}/ns/pid_for_children").stat().st_ino if self.process else 0
        except FileNotFoundError:  # it has made the namespace, and no process in it yet
            return 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (path / "cmdline").read_bytes() == command and (path / "ns" / "pid").stat().st_ino == ours:
                    return int(path.name)
            except OSError:
                continue
        return 0

    def running_md5(self) -> str | None:
        pid = self.pid_of(b"/usr/local/bin/manager\x001000000\0")
        try:
            return md5(Path(f"/proc/{pid}/exe").read_bytes()) if pid else None
        except OSError:
            return None

    def close(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)  # all its processes end with it
            self.process.wait()


@pytest.fixture
def machine(host: Host) -> Iterator[Machine]:
    made = Machine(host)
    try:
        yield made
    finally:
        made.close()


def test_cron_updates_what_runs_and_mails_trouble_only(machine: Machine) -> None:
    """From /etc/cron.d, with cron's bare environment and every setting but bin-manager's address at its default."""
    require("unshare", "cron", "mount")
    require_root()
    entries = [{"name": name, "version": "latest", "currentMd5": ""} for name in ("manager", "ghost")]
    machine.put("/etc/bin-proxy/bin-manifests.json", json.dumps({"binaries": entries}))
    machine.put("/etc/bin-proxy/config", f"export BIN_MANAGER_API='{machine.host.server.api}'\nMIN_HEALTHY_SECONDS=1\n")
    machine.put("/etc/cron.d/bin-proxy", (REPOSITORY / "packaging" / "crontab.example").read_bytes())
    machine.put("/usr/local/bin/manager", good("v1"), 0o755)
    machine.put_program("bin-proxy", "bin_proxy.cli")
    machine.put_program("supervisorctl", "supervisor.supervisorctl")
    machine.put_program("supervisord", "supervisor.supervisord")
    machine.host.program("manager", command="/usr/local/bin/manager 1000000")
    machine.host.write_conf()
    machine.put("/etc/supervisord.conf", machine.host.conf.read_bytes())
    mail = machine.host.root / "mail"
    machine.put("/usr/sbin/sendmail", f"#!/bin/sh\ncat >> {mail}\n", 0o755)

    machine.host.server.publish("manager", good("v1"))
    machine.boot()
    eventually(lambda: machine.running_md5() == md5(good("v1")), 30)
    before = machine.pid_of(b"/usr/local/bin/manager\x001000000\0")
    latest = machine.host.server.publish("manager", good("v2"))
    eventually(lambda: machine.running_md5() == latest, 150)
    assert machine.pid_of(b"/usr/local/bin/manager\x001000000\0") != before
    eventually(lambda: mail.exists() and mail.read_text().partition("\n\n")[2].endswith("\n"), 30)

    reported = json.loads(machine.read("/etc/bin-proxy/bin-manifests.json"))["binaries"]
    assert [entry["currentMd5"] for entry in reported] == [latest, ""]
    assert f"manager: updated {md5(good('v1'))} -> {latest}" in machine.read("/var/log/bin-proxy.log")
    head, _, body = mail.read_text().partition("\n\n")
    assert "/usr/local/bin/bin-proxy sync" in head
    assert body.count("\n") == 1 and body.startswith("bin-proxy: ghost: ") and "404" in body
