"""Where each setting comes from: a command-line option, the environment, the config file, the default."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bin_proxy.errors import UsageError

DEFAULT_CONFIG = "/etc/bin-proxy/config"
# cron's PATH is /usr/bin:/bin (crontab(5)); supervisorctl from pip or a distribution may lie in any of these.
_USUAL_FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Those that requests and OpenSSL look for.
_EXPORTED = re.compile(r"(?i:(?:https?|all|no)_proxy)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_FILE|SSL_CERT_DIR")
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Every setting, checked. Times are in seconds."""

    api: str
    bin_dir: str
    manifest: str
    log_file: str
    state_dir: str
    supervisorctl: tuple[str, ...]
    supervisorctl_chosen: bool
    token: str = field(repr=False)
    ca_bundle: str
    client_cert: str
    client_key: str
    http_timeout: float
    download_timeout: float
    max_download_mib: int
    restart_timeout: float
    min_healthy: float
    health_timeout: float
    backups_keep: int
    jobs: int
    metrics_file: str
    config: str
    config_found: bool


def _text(value: str) -> str:
    if any(not char.isprintable() for char in value):
        raise ValueError("holds a control character")
    return value


def _path(value: str) -> str:
    return os.path.abspath(_text(value)) if value else ""


def _url(value: str) -> str:
    try:
        parts = urlsplit(_text(value))
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or set(value) & set(" \\?#"):  # without the value, which may hold a password
        raise ValueError("must be an http:// or https:// URL with a host, without ? and #")
    return value.rstrip("/")


def number(least: float, most: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """A parser of numbers, or of whole numbers, from `least` to `most`; it raises ValueError."""

    def parse(value: str) -> float:
        try:
            found = kind(value)
        except ValueError:
            found = math.nan
        if not least <= found <= most:
            what = "a whole number" if kind is int else "a number of seconds"
            raise ValueError(f"must be {what} from {least:g} to {most:g}, not {value[:40]!r}")
        return found

    return parse


def _command(value: str) -> tuple[str, ...]:
    words = shlex.split(_text(value))
    if not words:
        raise ValueError("must be a command")
    return tuple(words)


_timeout = number(0.05, 604800)

# name: (field, default, parser)
TABLE: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "BIN_MANAGER_API": ("api", "http://localhost:8080/api/v1", _url),
    "BIN_DIR": ("bin_dir", "/usr/local/bin", _path),
    "BIN_MANIFESTS": ("manifest", "/etc/bin-proxy/bin-manifests.json", _path),
    "LOG_FILE": ("log_file", "/var/log/bin-proxy.log", _path),
    "STATE_DIR": ("state_dir", "/var/lib/bin-proxy", _path),
    "SUPERVISORCTL": ("supervisorctl", "supervisorctl", _command),
    "BIN_MANAGER_TOKEN": ("token", "", str),
    "BIN_MANAGER_TOKEN_FILE": ("token_file", "", _path),
    "BIN_MANAGER_CA_BUNDLE": ("ca_bundle", "", _path),
    "BIN_MANAGER_CLIENT_CERT": ("client_cert", "", _path),
    "BIN_MANAGER_CLIENT_KEY": ("client_key", "", _path),
    "HTTP_TIMEOUT": ("http_timeout", "10", _timeout),
    "DOWNLOAD_TIMEOUT": ("download_timeout", "600", _timeout),
    "MAX_DOWNLOAD_MIB": ("max_download_mib", "4096", number(1, 1 << 24, int)),
    "RESTART_TIMEOUT": ("restart_timeout", "120", _timeout),
    "MIN_HEALTHY_SECONDS": ("min_healthy", "5", number(0, 86400)),
    "HEALTH_TIMEOUT": ("health_timeout", "60", _timeout),
    "BACKUPS_KEEP": ("backups_keep", "3", number(0, 1000, int)),
    "JOBS": ("jobs", "8", number(1, 256, int)),
    "METRICS_FILE": ("metrics_file", "", _path),
}


def load_settings(options: Mapping[str, str | None], environ: dict[str, str]) -> Settings:
    """Work out every setting.

    Args:
        options: what the command line gave, by setting name (`BIN_DIR` …) or `CONFIG`; None where it gave nothing.
        environ: the process environment; proxy and CA variables of the config file are put into it, as sourcing the
            file and exporting them would.

    Raises:
        UsageError: with every fault that was found, each naming where the value came from.
    """
    faults: list[str] = []
    chosen_config = options.get("CONFIG") or environ.get("BIN_PROXY_CONFIG")
    config = os.path.abspath(chosen_config or DEFAULT_CONFIG)
    in_file, found = _read_config(config, bool(chosen_config), faults)
    chosen: dict[str, Any] = {"config": config, "config_found": found}
    for name, (key, default, parse) in TABLE.items():
        value, origin = options.get(name) or environ.get(name), name
        if not value and name in in_file:
            value, line = in_file[name]
            origin = f"{config}:{line}: {name}"
        try:
            chosen[key] = parse(value or default)
        except ValueError as error:
            faults.append(f"{origin} {error}")
        if name == "SUPERVISORCTL":
            chosen["supervisorctl_chosen"] = bool(value)
    for name, (value, line) in in_file.items():
        if options.get(name) or environ.get(name):
            continue
        if value is None or not value.isprintable():
            faults.append(f"{config}:{line}: {name} needs a shell to be worked out; write the value itself")
        elif name not in TABLE and value:
            environ[name] = value
    if not faults:
        _finish(chosen, environ.get("PATH", ""), faults)
    if faults:
        raise UsageError(*faults)
    return Settings(**chosen)


def _read_config(path: str, must_exist: bool, faults: list[str]) -> tuple[dict[str, tuple[str | None, int]], bool]:
    try:
        if doubts := untrusted(path):
            faults += doubts
            return {}, True
        with open(path, "rb") as file:
            text = file.read(_MIB).decode()
    except FileNotFoundError:
        if must_exist:
            faults.append(f"config file {path} does not exist")
        return {}, False
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return {}, False
    from bin_proxy.config_file import parse_config  # many hosts have none

    found = {entry.name: (entry.value, entry.line) for entry in parse_config(text)}
    return {name: value for name, value in found.items() if name in TABLE or _EXPORTED.fullmatch(name)}, True


def _finish(chosen: dict[str, Any], search_path: str, faults: list[str]) -> None:
    """Find supervisorctl and read the token: what needs the disk once every value is known to be well formed."""
    command = chosen["supervisorctl"]
    where = search_path + os.pathsep + _USUAL_FOLDERS
    executable = shutil.which(command[0], path=where)
    chosen["supervisorctl"] = (os.path.abspath(executable), *command[1:]) if executable else ()
    if chosen["supervisorctl_chosen"] and not executable:
        faults.append(f"SUPERVISORCTL {command[0]!r} cannot be found or run; correct it, or leave it out")
    token_file = chosen.pop("token_file")
    token = chosen["token"].strip()
    if token_file and not token:
        try:
            doubts = untrusted(token_file)
            if not doubts:
                with open(token_file, encoding="utf-8") as file:
                    token = file.read(65536).strip()
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"token file {token_file} cannot be read: {getattr(error, 'strerror', None) or error}")
        else:
            faults += doubts if doubts or token else [f"token file {token_file} is empty"]
    if not token.isascii() or any(not "!" <= char <= "~" for char in token):
        faults.append("the bin-manager token holds a character that no HTTP header may carry")
    chosen["token"] = token
    if chosen["client_key"] and not chosen["client_cert"]:
        faults.append("BIN_MANAGER_CLIENT_KEY is set, BIN_MANAGER_CLIENT_CERT is not")
    for key, name in (("ca_bundle", "CA_BUNDLE"), ("client_cert", "CLIENT_CERT"), ("client_key", "CLIENT_KEY")):
        if chosen[key] and not os.access(chosen[key], os.R_OK):
            faults.append(f"BIN_MANAGER_{name} {chosen[key]} cannot be read")


def untrusted(path: str, *, folder: bool = False) -> list[str]:
    """Why not to take orders from a file or folder: above all that others than root could write it or swap it.

    Every folder and every link on the way is looked at.

    Returns:
        one line for each reason, with the command that mends it; only root is that careful.

    Raises:
        OSError: something on the way cannot be looked at.
    """
    kind = os.stat(path).st_mode
    if not folder and not stat.S_ISREG(kind) and not stat.S_ISCHR(kind):  # a pipe would be waited for without end
        return [f"{path} cannot be read: it is not a regular file"]
    if os.geteuid() != 0:
        return []
    trusted = {0, int(os.environ["SUDO_UID"]) if os.environ.get("SUDO_UID", "").isdecimal() else os.getuid()}
    faults: list[str] = []
    here, rest = "/", os.path.abspath(path).split("/")[1:]
    for _ in range(200):
        status = os.lstat(here)
        if stat.S_ISCHR(status.st_mode):
            break  # /dev/null is everybody's, and empty
        quoted, what = shlex.quote(here), path if not rest else f"{here}, which leads to {path},"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid not in trusted:
            faults.append(f"{what} belongs to user {status.st_uid}, not to root: chown -h root {quoted}")
        if not stat.S_ISLNK(status.st_mode) and not sticky and _others_write(here, status):
            faults.append(f"others may write {what}: chmod go-w {quoted}")
        if stat.S_ISLNK(status.st_mode):
            target = os.path.join(os.path.dirname(here), os.readlink(here))
            here, rest = "/", [*os.path.normpath(target).split("/")[1:], *rest]
        elif rest:
            here, rest = os.path.join(here, rest[0]), rest[1:]
        else:
            break
    return faults


def _others_write(path: str, status: os.stat_result) -> bool:
    """Whether a group other than root's, or everybody, may write, or an ACL names somebody who may."""
    by_group = status.st_mode & stat.S_IWGRP and (status.st_gid != 0 or "system.posix_acl_access" in os.listxattr(path))
    return bool(status.st_mode & stat.S_IWOTH or by_group)
