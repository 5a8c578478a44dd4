"""Where each setting comes from: a command-line option, the environment, the config file, the default."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from bin_proxy.errors import UsageError

DEFAULT_CONFIG = "/etc/bin-proxy/config"
# cron's PATH is /usr/bin:/bin (crontab(5)); supervisorctl from pip or a distribution may lie in any of these.
_USUAL_FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Those that requests and OpenSSL look for.
_EXPORTED = re.compile(r"(?i:(?:https?|all|no)_proxy)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_FILE|SSL_CERT_DIR")


def _text(value: str) -> str:
    if not value.isprintable():
        raise ValueError("holds a control character")
    return value


def _path(value: str) -> str:
    return os.path.abspath(_text(value)) if value else ""


def _readable(value: str) -> str:
    path = _path(value)
    if path and not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read")
    return path


def _url(value: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(_text(value))
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not set(value) & set(" \\?#"):
            return value.rstrip("/")
    # Without the value, which may hold a password.
    raise ValueError("must be an http:// or https:// URL with a host, without ? and #")


def number(least: float, most: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """A parser of numbers, or of whole numbers, from `least` to `most`; it raises ValueError."""

    def parse(value: str) -> float:
        with suppress(ValueError):
            if least <= (found := kind(value)) <= most:
                return found
        what = "a whole number" if kind is int else "a number of seconds"
        raise ValueError(f"must be {what} from {least:g} to {most:.9g}, not {value[:40]!r}")

    return parse


def _command(value: str) -> tuple[str, ...]:
    return tuple(shlex.split(_text(value)))


_timeout = number(0.05, 604800)


def _from(name: str, default: str, parse: Callable[[str], Any]) -> Any:
    return field(repr="TOKEN" not in name, metadata={name: (default, parse)})


@dataclass(frozen=True)
class Settings:
    """Every setting, checked, with the name it bears outside, its default and its parser. Times are in seconds."""

    config: str
    config_found: bool
    supervisorctl_chosen: bool
    api: str = _from("BIN_MANAGER_API", "http://localhost:8080/api/v1", _url)
    bin_dir: str = _from("BIN_DIR", "/usr/local/bin", _path)
    manifest: str = _from("BIN_MANIFESTS", "/etc/bin-proxy/bin-manifests.json", _path)
    log_file: str = _from("LOG_FILE", "/var/log/bin-proxy.log", _path)
    state_dir: str = _from("STATE_DIR", "/var/lib/bin-proxy", _path)
    supervisorctl: tuple[str, ...] = _from("SUPERVISORCTL", "supervisorctl", _command)
    token: str = _from("BIN_MANAGER_TOKEN", "", str.strip)
    token_file: str = _from("BIN_MANAGER_TOKEN_FILE", "", _path)
    ca_bundle: str = _from("BIN_MANAGER_CA_BUNDLE", "", _readable)
    client_cert: str = _from("BIN_MANAGER_CLIENT_CERT", "", _readable)
    client_key: str = _from("BIN_MANAGER_CLIENT_KEY", "", _readable)
    http_timeout: float = _from("HTTP_TIMEOUT", "10", _timeout)
    download_timeout: float = _from("DOWNLOAD_TIMEOUT", "600", _timeout)
    max_download_mib: int = _from("MAX_DOWNLOAD_MIB", "4096", number(1, 1 << 24, int))
    restart_timeout: float = _from("RESTART_TIMEOUT", "120", _timeout)
    min_healthy: float = _from("MIN_HEALTHY_SECONDS", "5", number(0, 86400))
    health_timeout: float = _from("HEALTH_TIMEOUT", "60", _timeout)
    backups_keep: int = _from("BACKUPS_KEEP", "3", number(0, 1000, int))
    jobs: int = _from("JOBS", "8", number(1, 256, int))
    metrics_file: str = _from("METRICS_FILE", "", _path)


# name: (field, default, parser)
TABLE: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    name: (item.name, *rest) for item in fields(Settings) for name, rest in item.metadata.items()
}


def load_settings(options: Mapping[str, str | None], environ: MutableMapping[str, str]) -> Settings:
    """Work out every setting.

    Args:
        options: what the command line gave, by setting name (`BIN_DIR` …) or `CONFIG`; None where it gave nothing.
        environ: the process environment; proxy and CA variables of the config file are put into it, as sourcing the
            file and exporting them would.

    Raises:
        UsageError: with every fault that was found, each naming where the value came from.
    """
    chosen_config = options.get("CONFIG") or environ.get("BIN_PROXY_CONFIG")
    config = os.path.abspath(chosen_config or DEFAULT_CONFIG)
    faults: list[str] = []
    text = _read("config file", config, faults, needed=bool(chosen_config))
    in_file = {}
    if text:
        from bin_proxy.config_file import parse_config  # many hosts have none

        in_file = {one.name: one for one in parse_config(text) if one.name in TABLE or _EXPORTED.fullmatch(one.name)}
    chosen: dict[str, Any] = {"config": config, "config_found": text is not None}
    for name in {**TABLE, **in_file}:
        value, origin = options.get(name) or environ.get(name), name
        if not value and name in in_file:
            value, origin = in_file[name].value, f"{config}:{in_file[name].line}: {name}"
            if value is None or not value.isprintable():
                faults.append(f"{origin} needs a shell to be worked out; write the value itself")
                continue
        if name in TABLE:
            key, default, parse = TABLE[name]
            try:
                chosen[key] = parse(value or default)
            except ValueError as error:
                faults.append(f"{origin} {error}")
        elif value:
            environ[name] = value
        if name == "SUPERVISORCTL":
            chosen["supervisorctl_chosen"] = bool(value)
    faults = faults or _finish(chosen, environ.get("PATH", ""))
    if faults:
        raise UsageError(*faults)
    return Settings(**chosen)


def _read(what: str, path: str, faults: list[str], *, needed: bool = True) -> str | None:
    try:
        if doubts := untrusted(path):
            faults += doubts
            return None
        with open(path, "rb") as file:
            return file.read(1 << 20).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if needed or not isinstance(error, FileNotFoundError):
            faults.append(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return None


def _finish(chosen: dict[str, Any], search_path: str) -> list[str]:
    """Find supervisorctl and read the token: what needs the disk once every value is known to be well formed."""
    faults: list[str] = []
    command, token_file = chosen["supervisorctl"], chosen["token_file"]
    program = "".join(command[:1])
    executable = shutil.which(program, path=search_path + os.pathsep + _USUAL_FOLDERS)
    chosen["supervisorctl"] = (os.path.abspath(executable), *command[1:]) if executable else ()
    if chosen["supervisorctl_chosen"] and not executable:
        faults.append(f"SUPERVISORCTL {program!r} cannot be found or run; correct it, or leave it out")
    if token_file and not chosen["token"]:
        text = _read("token file", token_file, faults)
        chosen["token"] = (text or "").strip()
        if text is not None and not chosen["token"]:
            faults.append(f"token file {token_file} is empty")
    if not all("!" <= char <= "~" for char in chosen["token"]):
        faults.append("the bin-manager token holds a character that no HTTP header may carry")
    if chosen["client_key"] and not chosen["client_cert"]:
        faults.append("BIN_MANAGER_CLIENT_KEY is set, BIN_MANAGER_CLIENT_CERT is not")
    return faults


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
    trusted = {"0", os.environ.get("SUDO_UID", str(os.getuid()))}
    faults: list[str] = []
    here, rest = "/", os.path.abspath(path).split("/")[1:]
    for _ in range(1000):  # somebody may swap links meanwhile
        status = os.lstat(here)
        if stat.S_ISCHR(status.st_mode):
            break  # /dev/null is everybody's, and empty
        quoted, what = shlex.quote(here), f"{here}, which leads to {path}," if rest else path
        if str(status.st_uid) not in trusted:
            faults.append(f"{what} belongs to user {status.st_uid}, not to root: chown -h root {quoted}")
        if stat.S_ISLNK(status.st_mode):
            target = os.path.join(os.path.dirname(here), os.readlink(here))
            here, rest = "/", [*target.split("/")[1:], *rest]
            continue
        if _others_write(here, status):
            faults.append(f"others may write {what}: chmod go-w {quoted}")
        if not rest:
            break
        here, rest = os.path.normpath(os.path.join(here, rest[0])), rest[1:]  # no link, so .. is the folder above
    return faults


def _others_write(path: str, found: os.stat_result) -> bool:
    """Whether a group other than root's, or everybody, may write, or an ACL names somebody who may."""
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    by_group = found.st_mode & stat.S_IWGRP and (found.st_gid != 0 or "system.posix_acl_access" in os.listxattr(path))
    return not sticky and bool(found.st_mode & stat.S_IWOTH or by_group)
