"""One look at whether a service is well, by the `healthCheck` of its manifest entry."""

from __future__ import annotations

import http.client
import threading
from contextlib import closing
from urllib.parse import urlsplit

from bin_proxy.errors import BinProxyError
from bin_proxy.manifest import HealthCheck
from bin_proxy.process import run


def probe(check: HealthCheck, timeout: float) -> str | None:
    """Check once, within `timeout` seconds for the whole of it, however it drips.

    Returns:
        what is wrong, or None where all is well.
    """
    if check.kind == "command":
        try:
            done = run(check.target, timeout)
        except BinProxyError as error:
            return str(error)
        if done.code is None:
            return f"{check.target[0]} did not end within {timeout:g} s"
        return None if done.code == 0 else f"{check.target[0]} exited {done.code}: {done.last_words}"
    found = [f"{check.target} did not answer within {timeout:g} s"]

    def ask() -> None:
        try:
            found.append(_connect(check.kind, str(check.target), timeout))
        except (OSError, http.client.HTTPException, ValueError) as error:
            found.append(f"{check.target}: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}")

    # A socket's timeout counts from byte to byte, so an answer that drips needs somebody to walk away from it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[-1] or None


def _connect(kind: str, target: str, timeout: float) -> str:
    parts = urlsplit(target if kind == "http" else f"//{target}")
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with closing(connect(str(parts.hostname), parts.port or connect.default_port, timeout=timeout)) as connection:
        if kind == "tcp":
            connection.connect()
            return ""
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        status = connection.getresponse().status
    return "" if 200 <= status < 400 else f"{target} answered HTTP {status}"
