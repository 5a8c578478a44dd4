"""Where each setting comes from, which values are refused, and whose files root takes orders from."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bin_proxy.config.settings import Settings, load_settings
from bin_proxy.errors import UsageError
from tests.conftest import require_root
from tests.host import Host

DEFAULTS: dict[str, Any] = {
    "api": "http://localhost:8080/api/v1",
    "bin_dir": "/usr/local/bin",
    "manifest": "/etc/bin-proxy/bin-manifests.json",
    "log_file": "/var/log/bin-proxy.log",
    "state_dir": "/var/lib/bin-proxy",
    "token": "",
    "ca_bundle": "",
    "client_cert": "",
    "client_key": "",
    "http_timeout": 10.0,
    "download_timeout": 600.0,
    "max_download_mib": 4096,
    "restart_timeout": 120.0,
    "min_healthy": 5.0,
    "health_timeout": 60.0,
    "backups_keep": 3,
    "jobs": 8,
    "metrics_file": "",
}

# name: field, then what option, environment and config file say, and what each is then
LEVELS: dict[str, tuple[str, list[str], list[Any]]] = {
    "BIN_MANAGER_API": (
        "api",
        ["http://o/api", "https://e:1/api/", "http://c/api/v1"],
        ["http://o/api", "https://e:1/api", "http://c/api/v1"],
    ),
    "BIN_DIR": ("bin_dir", ["/o", "/e", "/c"], ["/o", "/e", "/c"]),
    "BIN_MANIFESTS": ("manifest", ["/o.json", "/e.json", "/c.json"], ["/o.json", "/e.json", "/c.json"]),
    "LOG_FILE": ("log_file", ["/o.log", "/e.log", "/c.log"], ["/o.log", "/e.log", "/c.log"]),
    "STATE_DIR": ("state_dir", ["/o", "/e", "/c"], ["/o", "/e", "/c"]),
    "SUPERVISORCTL": (
        "supervisorctl",
        ["/bin/echo o", "/bin/echo 'e e'", "/bin/echo c -c /x"],
        [("/bin/echo", "o"), ("/bin/echo", "e e"), ("/bin/echo", "c", "-c", "/x")],
    ),
    "BIN_MANAGER_TOKEN": ("token", ["o", "e", "c"], ["o", "e", "c"]),
    "BIN_MANAGER_CA_BUNDLE": (
        "ca_bundle",
        ["/bin/true", "/bin/false", "/bin/sh"],
        ["/bin/true", "/bin/false", "/bin/sh"],
    ),
    "BIN_MANAGER_CLIENT_CERT": (
        "client_cert",
        ["/bin/true", "/bin/false", "/bin/sh"],
        ["/bin/true", "/bin/false", "/bin/sh"],
    ),
    "HTTP_TIMEOUT": ("http_timeout", ["1", "2.5", "3"], [1.0, 2.5, 3.0]),
    "DOWNLOAD_TIMEOUT": ("download_timeout", ["1", "2.5", "3"], [1.0, 2.5, 3.0]),
    "MAX_DOWNLOAD_MIB": ("max_download_mib", ["1", "2", "3"], [1, 2, 3]),
    "RESTART_TIMEOUT": ("restart_timeout", ["1", "2.5", "3"], [1.0, 2.5, 3.0]),
    "MIN_HEALTHY_SECONDS": ("min_healthy", ["0", "2.5", "3"], [0.0, 2.5, 3.0]),
    "HEALTH_TIMEOUT": ("health_timeout", ["1", "2.5", "3"], [1.0, 2.5, 3.0]),
    "BACKUPS_KEEP": ("backups_keep", ["0", "2", "5"], [0, 2, 5]),
    "JOBS": ("jobs", ["1", "2", "16"], [1, 2, 16]),
    "METRICS_FILE": ("metrics_file", ["/o.prom", "/e.prom", "/c.prom"], ["/o.prom", "/e.prom", "/c.prom"]),
}


def load(tmp_path: Path, config: str = "", options: dict[str, str] | None = None, **environ: str) -> Settings:
    """The settings, with a config file of this content."""
    file = tmp_path / "config"
    file.write_text(config)
    return load_settings({"CONFIG": str(file), **(options or {})}, environ)


def faults_of(tmp_path: Path, config: str = "", options: dict[str, str] | None = None, **environ: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, config, options, **environ)
    return list(caught.value.faults)


def test_the_defaults_are_those_that_are_documented(tmp_path: Path) -> None:
    """Without any option, variable or line, every setting has its documented default."""
    found = asdict(load(tmp_path))
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", LEVELS)
def test_an_option_wins_over_the_environment_that_over_the_file_that_over_the_default(
    tmp_path: Path, name: str
) -> None:
    """For every setting: command-line option, environment, config file, default, in this order."""
    field, (option, variable, line), (of_option, of_variable, of_line) = LEVELS[name]
    config = f"export {name}={shlex.quote(line)}\n"
    assert getattr(load(tmp_path, config, {name: option}, **{name: variable}), field) == of_option
    assert getattr(load(tmp_path, config, **{name: variable}), field) == of_variable
    assert getattr(load(tmp_path, "", {name: option}), field) == of_option
    assert getattr(load(tmp_path, config), field) == of_line
    # Set to nothing is the same as not set.
    assert getattr(load(tmp_path, config, **{name: ""}), field) == of_line
    assert getattr(load(tmp_path, f"{name}=\n"), field) == getattr(load(tmp_path), field)


def test_a_byte_order_mark_hides_no_setting(tmp_path: Path) -> None:
    """An editor on Windows puts it before the first line, whose name is then not what it seems."""
    assert load(tmp_path, "\ufeffJOBS=3\n").jobs == 3


def test_the_last_line_of_a_name_counts(tmp_path: Path) -> None:
    """As in a file that a shell sources."""
    assert load(tmp_path, "JOBS=2\nJOBS=$x\nJOBS=3\n").jobs == 3
    assert "needs a shell" in faults_of(tmp_path, "JOBS=2\nJOBS=$x\n")[0]


def test_options_of_the_command_line_win(host: Host) -> None:
    """The real command line with every option, against an environment in which all of it is wrong."""
    host.write_manifest({"name": "tool", "service": False})
    host.server.publish("tool", b"tool 1")
    good = dict(host.settings)
    options = ["--config", good["BIN_PROXY_CONFIG"], "--api", good["BIN_MANAGER_API"], "--bin-dir", good["BIN_DIR"]]
    options += ["--manifest", good["BIN_MANIFESTS"], "--log-file", good["LOG_FILE"], "--state-dir", good["STATE_DIR"]]
    wrong = dict.fromkeys(("BIN_DIR", "BIN_MANIFESTS", "LOG_FILE", "STATE_DIR"), "/proc/nowhere")
    wrong |= {"BIN_PROXY_CONFIG": "/proc/nowhere", "BIN_MANAGER_API": "http://127.0.0.1:1/"}
    done = host.run(*options, "sync", **wrong)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (host.bin / "tool").read_bytes() == b"tool 1"
    assert "tool: updated" in host.log() and host.state.is_dir()


def test_the_config_file_is_enough_for_crons_bare_environment(host: Host) -> None:
    """Every setting may come from the file alone."""
    host.write_manifest({"name": "tool", "service": False})
    host.server.publish("tool", b"tool 1")
    config = host.settings.pop("BIN_PROXY_CONFIG")
    Path(config).write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in host.settings.items()))
    host.settings.clear()
    done = host.run("--config", config, "sync", PATH="/usr/bin:/bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "tool: updated" in host.log()


def test_a_chosen_config_file_must_be_there(host: Host) -> None:
    """Only the default file may be absent: one that is named and missing is exit 2, and nothing is asked."""
    host.write_manifest({"name": "tool", "service": False})
    (host.root / "config").unlink()
    by_environment = host.sync()
    by_option = host.run("--config", str(host.root / "other"), "sync")
    for done, path in ((by_environment, host.root / "config"), (by_option, host.root / "other")):
        assert done.returncode == 2 and str(path) in done.stderr and done.stdout == ""
    assert host.server.requests == []


@pytest.mark.skipif(os.path.exists("/etc/bin-proxy/config"), reason="this host has a config file of its own")
def test_the_default_config_file_may_be_absent() -> None:
    """Without a file, an option or a variable the defaults hold."""
    found = load_settings({}, {})
    assert found.config == "/etc/bin-proxy/config"
    assert found.config_found is False


@pytest.mark.parametrize("content", [b"A=1\n\xff\xfe=2\n", b"\x00\x01\x02"])
def test_a_config_file_that_is_no_text_is_a_fault_or_ignored(tmp_path: Path, content: bytes) -> None:
    """Bytes that are no text end in the typed error or in nothing, never in a traceback."""
    file = tmp_path / "config"
    file.write_bytes(content)
    try:
        load_settings({"CONFIG": str(file)}, {})
    except UsageError as error:
        assert str(file) in str(error)


def test_a_folder_in_the_place_of_the_config_file_is_said(tmp_path: Path) -> None:
    """Whatever is wrong with the file is one line."""
    with pytest.raises(UsageError) as caught:
        load_settings({"CONFIG": str(tmp_path)}, {})
    assert len(caught.value.faults) == 1 and str(tmp_path) in str(caught.value)


# Names that are not settings


def test_unknown_names_are_ignored(tmp_path: Path) -> None:
    """The file may hold anything else that cron's job once needed."""
    environ = {"CONFIG": "x"}
    (tmp_path / "config").write_text("MAILTO=ops\nexport LANG=C\nFOO=$(date)\nJOBS=3\nif true; then :; fi\n")
    found = load_settings({"CONFIG": str(tmp_path / "config")}, environ)
    assert found.jobs == 3
    assert environ == {"CONFIG": "x"}


EXPORTED = ["HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy", "http_proxy"]
EXPORTED += ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"]


@pytest.mark.parametrize("name", EXPORTED)
def test_proxy_and_ca_variables_count_as_exported(tmp_path: Path, name: str) -> None:
    """They reach the HTTP client as if cron's shell had exported them, and the environment's own win."""
    (tmp_path / "config").write_text(f"{name}='of the file'\n")
    environ: dict[str, str] = {}
    load_settings({"CONFIG": str(tmp_path / "config")}, environ)
    assert environ == {name: "of the file"}
    environ = {name: "of the environment"}
    load_settings({"CONFIG": str(tmp_path / "config")}, environ)
    assert environ == {name: "of the environment"}


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "REQUESTS_CA_BUNDLE"])
def test_a_proxy_that_only_a_shell_could_work_out_is_a_fault(tmp_path: Path, name: str) -> None:
    """A proxy or CA that would silently not be used is told, unless the environment supplies it."""
    [fault] = faults_of(tmp_path, f"JOBS=2\n{name}=http://$HOST:3128\n")
    assert f"config:2: {name}" in fault
    assert load(tmp_path, f"{name}=http://$HOST:3128\n", **{name: "http://h:3128"}).jobs == 8


def test_the_proxy_of_the_config_file_is_used(host: Host) -> None:
    """A request for a host that nobody serves goes through the proxy that the file names."""
    host.write_manifest({"name": "tool", "service": False})
    (host.root / "config").write_text(f"http_proxy=http://127.0.0.1:{host.server.port}\n")
    done = host.sync(BIN_MANAGER_API="http://bin-manager.invalid/api/v1")
    assert done.returncode == 1
    assert host.server.requests[0][0] == "http://bin-manager.invalid/api/v1/releases/latest/tool/md5"


# Bad values

BAD: dict[str, list[str]] = {
    "BIN_MANAGER_API": [
        *("localhost:8080", "ftp://h/", "http://", "http:///x", "http://h:port/", "http://h/?a=1", "http://h/#f"),
        *("http://h:99999/", "http://[::1/", "http://h/a b", "javascript:1", "http://h/\x00"),
    ],
    "SUPERVISORCTL": ["'open", "   ", "/nowhere/supervisorctl", "no-such-program-anywhere -c x", "/etc/passwd", "/"],
    "BIN_MANAGER_TOKEN": ["two words", "new\nline", "ümlaut", "\x00"],
    "BIN_MANAGER_TOKEN_FILE": ["/nowhere/token"],
    "BIN_MANAGER_CLIENT_KEY": ["/bin/true"],
} | {
    name: ["ten", "-1", "nan", "inf", "1e999", "5s", " ", "0x10"]
    for name in ("HTTP_TIMEOUT", "DOWNLOAD_TIMEOUT", "RESTART_TIMEOUT", "MIN_HEALTHY_SECONDS", "HEALTH_TIMEOUT")
}
BAD |= {name: ["many", "-1", "1.5", "1e3", "99999999999"] for name in ("BACKUPS_KEEP", "JOBS", "MAX_DOWNLOAD_MIB")}
BAD["JOBS"] += ["0"]
BAD["MAX_DOWNLOAD_MIB"] += ["0"]
BAD["HTTP_TIMEOUT"] += ["0"]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values if value]
)
def test_a_bad_value_is_refused_with_its_name(tmp_path: Path, name: str, value: str) -> None:
    """Wherever it comes from, a value that cannot be meant is a usage error that names the setting."""
    named = "token" if "TOKEN" in name else name
    for faults in (faults_of(tmp_path, **{name: value}), faults_of(tmp_path, options={name: value})):
        assert all(named in fault for fault in faults)


def test_the_line_of_a_bad_value_in_the_file_is_told(tmp_path: Path) -> None:
    """A fault of the config file names file and line."""
    [fault] = faults_of(tmp_path, "# c\n\nJOBS=many\n")
    assert fault.startswith(f"{tmp_path / 'config'}:3: JOBS ")


def test_all_bad_values_are_listed(host: Host) -> None:
    """Exit 2, one line for each fault, from the environment and the file alike; nothing asked, nothing touched."""
    host.write_manifest({"name": "tool", "service": False})
    (host.root / "config").write_text("JOBS=many\nBACKUPS_KEEP=-1\nMAX_DOWNLOAD_MIB=$x\n")
    done = host.sync(BIN_MANAGER_API="ftp://h", HTTP_TIMEOUT="soon", SUPERVISORCTL="'open")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    names = ["JOBS", "BACKUPS_KEEP", "MAX_DOWNLOAD_MIB", "BIN_MANAGER_API", "HTTP_TIMEOUT", "SUPERVISORCTL"]
    assert len(lines) == len(names), done.stderr
    for name in names:
        assert len([line for line in lines if re.search(rf"\b{name}\b", line)]) == 1, (name, lines)
    assert host.server.requests == [] and not host.state.exists() and not host.log_path.exists()


@pytest.mark.parametrize("where", ["environment", "config file"])
def test_a_supervisorctl_that_was_set_must_be_found(host: Host, where: str) -> None:
    """Only the default may be absent: one that was set and cannot be found is exit 2."""
    host.write_manifest({"name": "tool"})
    host.server.publish("tool", b"tool 1")
    host.settings.pop("SUPERVISORCTL")
    if where == "environment":
        done = host.sync(SUPERVISORCTL="/opt/nowhere/supervisorctl -c /etc/x")
    else:
        (host.root / "config").write_text("SUPERVISORCTL='/opt/nowhere/supervisorctl -c /etc/x'\n")
        done = host.sync()
    assert done.returncode == 2
    assert "/opt/nowhere/supervisorctl" in done.stderr
    assert host.server.requests == []


def test_supervisorctl_is_found_where_crons_path_does_not_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is looked up on PATH first, then in the usual bin and sbin folders."""
    mine = tmp_path / "ls"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load(tmp_path, SUPERVISORCTL="ls -l").supervisorctl == (str(mine), "-l")
    monkeypatch.setenv("PATH", "/nowhere")
    found = load(tmp_path, SUPERVISORCTL="ls -l").supervisorctl
    assert os.path.basename(found[0]) == "ls" and found[0] != str(mine) and found[1:] == ("-l",)
    monkeypatch.delenv("PATH")
    assert load(tmp_path, SUPERVISORCTL="ls -l").supervisorctl[1:] == ("-l",)


def test_a_token_file_is_read_and_the_token_wins(tmp_path: Path) -> None:
    """White space around the token in the file is no part of it; BIN_MANAGER_TOKEN wins over the file."""
    file = tmp_path / "token"
    file.write_text("  secret-of-the-file\n\n")
    assert load(tmp_path, BIN_MANAGER_TOKEN_FILE=str(file)).token == "secret-of-the-file"
    assert load(tmp_path, BIN_MANAGER_TOKEN_FILE=str(file), BIN_MANAGER_TOKEN="direct").token == "direct"


def test_a_token_is_never_shown(tmp_path: Path) -> None:
    """Neither the settings' representation nor a fault holds the token."""
    assert "s3cr3t" not in repr(load(tmp_path, BIN_MANAGER_TOKEN="s3cr3t"))
    assert "s3cr3t" not in "".join(faults_of(tmp_path, BIN_MANAGER_TOKEN="s3cr3t with blanks"))


# Whose files root takes orders from

KINDS = ["config file", "token file", "manifest"]


def a_host_with(host: Host, kind: str, name: str = "it's here") -> tuple[Path, Path]:
    """Put the file of this kind into a folder of its own; returns folder and file."""
    host.write_manifest({"name": "tool", "service": False})
    host.server.publish("tool", b"tool 1")
    folder = host.root / name
    folder.mkdir()
    file = folder / "a file"
    if kind == "config file":
        file.write_text("JOBS=2\n")
        host.settings["BIN_PROXY_CONFIG"] = str(file)
    elif kind == "token file":
        file.write_text("secret\n")
        host.settings["BIN_MANAGER_TOKEN_FILE"] = str(file)
    else:
        host.manifest_path.rename(file)
        host.settings["BIN_MANIFESTS"] = str(file)
    file.chmod(0o600)
    return folder, file


def spoil(how: str, folder: Path, file: Path) -> None:
    if how == "everybody may write it":
        file.chmod(0o666)
    elif how == "a group may write it":
        os.chown(file, 0, 1234)
        file.chmod(0o660)
    elif how == "it belongs to somebody else":
        os.chown(file, 1234, 0)
    elif how == "everybody may write its folder":
        folder.chmod(0o777)
    elif how == "a group may write its folder":
        os.chown(folder, 0, 1234)
        folder.chmod(0o775)
    elif how == "everybody may write a folder above":
        folder.parent.chmod(0o777)
    elif how == "several":
        file.chmod(0o666)
        os.chown(file, 1234, 1234)
        folder.chmod(0o777)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        "everybody may write it",
        "a group may write it",
        "it belongs to somebody else",
        "everybody may write its folder",
        "a group may write its folder",
        "everybody may write a folder above",
        "several",
    ],
)
def test_root_refuses_a_file_that_others_could_change_and_names_the_remedy(host: Host, kind: str, how: str) -> None:
    """Exit 2, nothing asked, nothing touched; the commands that are named, run as they stand, mend it."""
    require_root()
    folder, file = a_host_with(host, kind)
    spoil(how, folder, file)
    done = host.sync()
    assert done.returncode == 2, done.stderr
    assert host.server.requests == [] and not host.state.exists() and not host.log_path.exists()
    lines = done.stderr.splitlines()
    assert len(lines) == (3 if how == "several" else 1)
    for line in lines:
        command = re.search(r": ((?:chmod|chown) .*)$", line)
        assert command, line
        subprocess.run(["/bin/sh", "-c", command[1]], check=True)
    mended = host.sync()
    assert (mended.returncode, mended.stderr) == (0, "")
    assert (host.bin / "tool").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_to_a_file_that_others_could_change_is_refused_too(host: Host, kind: str) -> None:
    """What counts is the file behind the link, and the folder that the link lies in."""
    require_root()
    folder, file = a_host_with(host, kind)
    elsewhere = host.root / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "target"
    file.rename(target)
    file.symlink_to(target)
    assert host.sync().returncode == 0
    target.chmod(0o666)
    assert host.sync().returncode == 2
    target.chmod(0o600)
    folder.chmod(0o777)
    done = host.sync()
    assert done.returncode == 2 and str(folder) in done.stderr
    folder.chmod(0o755)
    elsewhere.chmod(0o777)
    done = host.sync()
    assert done.returncode == 2 and str(elsewhere) in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_sticky_bit_makes_a_folder_acceptable(host: Host, kind: str) -> None:
    """In a folder such as /tmp nobody can replace the file of another."""
    require_root()
    folder, _ = a_host_with(host, kind)
    folder.chmod(0o1777)
    assert host.sync().returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_invoker_may_own_the_file(host: Host, kind: str) -> None:
    """With sudo, a file of the user who invoked it is taken; one of a third user is not."""
    require_root()
    _, file = a_host_with(host, kind)
    os.chown(file, 1234, 1234)
    assert host.sync(SUDO_UID="1234").returncode == 0
    assert host.sync(SUDO_UID="4321").returncode == 2


def test_only_root_is_that_careful(host: Host) -> None:
    """Another user may take orders from whom it likes."""
    require_root()
    _, file = a_host_with(host, "config file")
    spoil("everybody may write it", file.parent, file)
    subprocess.run(["chown", "-R", "1234:1234", str(host.root)], check=True)
    command = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", *host.command("sync")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
        env=host.environment(SUPERVISORCTL="/bin/true"),  # this Python may lie where only root may look
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (host.bin / "tool").exists()
