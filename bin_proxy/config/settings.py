"""Where each setting comes from: a command-line option, the environment, the config file, the default."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from bin_proxy.config.trust import read_trusted
from bin_proxy.errors import UsageError

DEFAULT_CONFIG = "/etc/bin-proxy/config"
# cron's PATH is /usr/bin:/bin (crontab(5)); supervisorctl from pip or a distribution may lie in any of these.
_USUAL_FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Those that requests and OpenSSL look for.
_EXPORTED = re.compile(r"(?i:(?:https?|all|no)_proxy)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_FILE|SSL_CERT_DIR")


def _path(value: str) -> str:
    return os.path.abspath(value) if value else ""


def is_url(text: str) -> bool:
    """Whether it is an http:// or https:// URL with a host, on one line and without blanks."""
    with suppress(ValueError):  # a port that is none
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        return bool(fits) and text.isprintable() and " " not in text
    return False


def _url(value: str) -> str:
    if not is_url(value) or set(value) & set("\\?#"):
        # Without the value, which may hold a password.
        raise ValueError("must be an http:// or https:// URL with a host, without ? and #")
    return value.rstrip("/")


def number(least: float, most: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    """A parser of numbers, or of whole numbers, from `least` to `most`; it raises ValueError."""

    def parse(value: str) -> float:
        with suppress(ValueError):
            if least <= (found := kind(value)) <= most:
                return found
        raise ValueError(f"{value[:40]!r} is no {kind.__name__} from {least:g} to {most:.9g}")

    return parse


def _command(value: str) -> tuple[str, ...]:
    """Only the default, which is the empty value, need not be there."""
    words = shlex.split(value) if value else ["supervisorctl"]
    program = "".join(words[:1])
    executable = shutil.which(program, path=os.environ.get("PATH", "") + os.pathsep + _USUAL_FOLDERS)
    if value and not executable:
        raise ValueError(f"{program!r} cannot be found or run; correct it, or leave it out")
    return (os.path.abspath(executable), *words[1:]) if executable else ()


_timeout = number(0.05, 604800)


def _from(name: str, default: str, parse: Callable[[str], Any]) -> Any:
    return field(repr="TOKEN" not in name, metadata={name: (default, parse)})


@dataclass(frozen=True)
class Settings:
    """Every setting, checked, with the name it bears outside, its default and its parser. Times are in seconds."""

    config: str
    config_found: bool
    api: str = _from("BIN_MANAGER_API", "http://localhost:8080/api/v1", _url)
    bin_dir: str = _from("BIN_DIR", "/usr/local/bin", _path)
    manifest: str = _from("BIN_MANIFESTS", "/etc/bin-proxy/bin-manifests.json", _path)
    log_file: str = _from("LOG_FILE", "/var/log/bin-proxy.log", _path)
    state_dir: str = _from("STATE_DIR", "/var/lib/bin-proxy", _path)
    supervisorctl: tuple[str, ...] = _from("SUPERVISORCTL", "", _command)
    token: str = _from("BIN_MANAGER_TOKEN", "", str.strip)
    token_file: str = _from("BIN_MANAGER_TOKEN_FILE", "", _path)
    ca_bundle: str = _from("BIN_MANAGER_CA_BUNDLE", "", _path)
    client_cert: str = _from("BIN_MANAGER_CLIENT_CERT", "", _path)
    client_key: str = _from("BIN_MANAGER_CLIENT_KEY", "", _path)
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


def load_settings(options: Mapping[str, Any], environ: MutableMapping[str, str]) -> Settings:
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
    chosen: dict[str, Any] = {"config": config, "config_found": bool(chosen_config) or os.path.lexists(config)}
    in_file = {}
    if chosen["config_found"]:
        from bin_proxy.config.config_file import parse_config  # many hosts have none

        in_file = parse_config(read_trusted("BIN_PROXY_CONFIG", config).removeprefix("\ufeff"))
    faults: list[str] = []
    exported = [name for name in in_file if _EXPORTED.fullmatch(name)]
    for name in [*TABLE, *exported]:
        value, origin = options.get(name) or environ.get(name), name
        if not value and name in in_file:
            value, line = in_file[name]
            origin = f"{config}:{line}: {name}"
            if value is None or not value.isprintable():
                faults.append(f"{origin} needs a shell to be worked out; write the value itself, above any if or loop")
                continue
        key, default, parse = TABLE.get(name, (name, "", str))
        try:
            chosen[key] = parse(value or default)
        except ValueError as error:
            faults.append(f"{origin} {error}")
    if faults:
        raise UsageError(*faults)
    environ.update({name: chosen.pop(name) for name in exported})
    if chosen["token_file"] and not chosen["token"]:
        chosen["token"] = read_trusted("BIN_MANAGER_TOKEN_FILE", chosen["token_file"]).strip()
    if (chosen["token"] or chosen["token_file"]) and not re.fullmatch("[!-~]+", chosen["token"]):
        raise UsageError("the bin-manager token is empty, or holds a character that no HTTP header may carry")
    if chosen["client_key"] and not chosen["client_cert"]:
        raise UsageError("BIN_MANAGER_CLIENT_KEY is set, BIN_MANAGER_CLIENT_CERT is not")
    return Settings(**chosen)
