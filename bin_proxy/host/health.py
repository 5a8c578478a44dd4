"""One look at whether a service is well, by the `healthCheck` of its manifest entry."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit

import urllib3

from bin_proxy.errors import HostError, cause
from bin_proxy.host.process import run
from bin_proxy.policy.model import HealthCheck


def probe(check: HealthCheck, timeout: float) -> str | None:
    """Check once, within `timeout` seconds for the whole of it, however it drips.

    Returns:
        what is wrong, or None where all is well.
    """
    if check.kind == "command":
        try:
            done = run(check.target, timeout)
        except HostError as error:
            return str(error)
        return None if done.code == 0 else f"{check.target[0]} {done.ending}"
    target, found = str(check.target), [f"{check.target} did not answer within {timeout:g} s"]

    def ask() -> None:
        try:
            found.append(_connect(check.kind, target, timeout))
        except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
            found.append(f"{target}: {cause(error)}")

    # A socket's timeout counts from byte to byte, so an answer that drips needs somebody to walk away from it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[-1] or None


def _connect(kind: str, target: str, timeout: float) -> str:
    if kind == "tcp":
        parts = urlsplit(f"//{target}")
        socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout).close()
        return ""
    with urllib3.PoolManager(cert_reqs="CERT_REQUIRED", retries=False) as pool:
        status = pool.request("GET", target, timeout=timeout, redirect=False, preload_content=False).status
    return "" if 200 <= status < 400 else f"{target} answered HTTP {status}"
