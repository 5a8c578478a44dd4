"""The two requests to bin-manager, with their retries, limits and TLS: the only module that uses requests."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from bin_proxy import __version__
from bin_proxy.config.manifest import parse_json
from bin_proxy.config.settings import Settings
from bin_proxy.errors import BinManagerError, Unreachable, cause
from bin_proxy.policy.model import Binary, Release
from bin_proxy.server.tls import certificates

if TYPE_CHECKING:
    from bin_proxy.host.part import Part

_T = TypeVar("_T")
_TRIES = 3
_LARGEST_ANSWER = 256 * 1024
_CHUNK = 512 * 1024
_REDIRECTS = 5


@dataclass(eq=False)
class _Failed(Exception):
    """A try failed with `error`; the next makes sense `after` so many seconds: infinitely many mean never."""

    error: BinManagerError
    after: float = 0.0


class BinManager:
    """bin-manager as its clients see it. Threads may share one.

    Args:
        settings: the URL, the credentials, the timeouts and the number of requests side by side.
        tell: called with one line about each request, for --verbose; the lines hold no secret.
        until: called with the time (of the monotonic clock) at which what the thread does next must be over, and with
            infinity when it is: headers that drip and a name server that is silent escape every timeout.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None], until: Callable[[float], None]) -> None:
        self._settings, self._tell, self._until = settings, tell, until
        self._verify = certificates(settings)
        cert = settings.client_cert
        self._cert = (cert, settings.client_key or cert) if cert else None
        # No session: it would take credentials from .netrc, keep cookies, and read the whole body of each redirect.
        self._adapter = HTTPAdapter(pool_connections=4, pool_maxsize=settings.jobs)
        self._home = ""  # scheme, host and port as sent: a host is written in several ways
        self._proxies = get_environ_proxies(settings.api)  # once, not for each request
        self._unanswered = 0  # requests in a row, whichever binary they were for

    def latest(self, binary: Binary) -> Release:
        """Ask for the release that `binary` should be.

        Raises:
            Unreachable: no answer, after retries.
            BinManagerError: an answer that is not a release.
        """
        deadline = time.monotonic() + 3 * self._timeout()

        def ask() -> Release:
            with self._get(f"releases/{binary.version}/{binary.name}/md5", {}) as response:
                return _parse_release(_read(response))

        return self._retrying(ask, deadline)

    def download(self, binary: Binary, release: Release, part: Part) -> None:
        """Fetch the bytes of `release` into `part`, going on from where it stands; the caller verifies them.

        A connection that drops is taken up again for as long as each brings something (DOWNLOAD_TIMEOUT at most).

        Raises:
            Unreachable, BinManagerError: the download did not end; what came is in the part.
            BinProxyError: what the part raised.
        """
        deadline = time.monotonic() + self._settings.download_timeout

        def fetch() -> None:
            start = part.offset
            headers = {"X-Release-MD5": release.md5}  # for a cache in between: all releases share the path
            if start:
                headers["Range"] = f"bytes={start}-"
            path = f"releases/{binary.version}/{binary.name}/download"
            with self._get(path, headers) as response:
                goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                if start and not goes_on:
                    part.restart()
                if response.status_code != 200 and not goes_on:  # the next try asks for the whole
                    raise _Failed(Unreachable("bin-manager does not send the rest of a download that was asked for"))
                if response.raw.length_remaining is not None:
                    part.expect(part.offset + response.raw.length_remaining)
                # read1 hands out what has arrived, so that a slow link loses nothing when it drops (urllib3 2).
                read = getattr(response.raw, "read1", response.raw.read)
                while chunk := read(_CHUNK, decode_content=False):
                    part.write(chunk)
                    if time.monotonic() > deadline:
                        raise TimeoutError
                if part.total is not None and part.offset < part.total:  # of which urllib3 1 says nothing
                    raise ConnectionError("the connection was closed in the middle of a download")

        self._retrying(fetch, deadline, lambda: part.offset)

    def _retrying(self, action: Callable[[], _T], deadline: float, progress: Callable[[], int] = lambda: 0) -> _T:
        """Call `action` until it succeeds; give up after a few failures in a row between which nothing progressed."""
        failures, seen = 0, progress()
        self._until(deadline + 1)
        while True:
            try:
                result = action()
                self._until(math.inf)
                return result
            except _Failed as error:
                failed = error
            except BinManagerError as error:
                failed = _Failed(error, math.inf)
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                failed = self._translated(error)
            failures = 1 if progress() > seen else failures + 1
            seen = progress()
            pause = max(failed.after, 0.15 * 2**failures)
            told = str(failed.error)
            if self._settings.token:  # which a server may have echoed
                told = told.replace(self._settings.token, "***")
            too_late = pause > self._settings.http_timeout or time.monotonic() + pause > deadline
            if failures == _TRIES or too_late or self._answers_nobody():
                raise type(failed.error)(told)
            self._tell(f"{told}; trying again in {pause:.1f} s")
            time.sleep(pause)

    def _answers_nobody(self) -> bool:
        """Whether so many requests in a row failed that the others get a single try and less time.

        None goes unasked, as the trouble may be that of the first few alone; nor do hundreds wait in vain for long.
        """
        return self._unanswered > 2 * self._settings.jobs

    def _timeout(self) -> float:
        return self._settings.http_timeout / (5 if self._answers_nobody() else 1)

    def _translated(self, error: Exception) -> _Failed:
        """What went wrong on the way, from the first byte of the request to the last of the body."""
        request = getattr(error, "request", None)
        where = urlsplit(str(request.url) if request is not None else self._settings.api).netloc.rpartition("@")[2]
        if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
            return _Failed(Unreachable(f"bin-manager does not answer in time at {where}"), math.inf)
        tls = isinstance(error, requests.exceptions.SSLError)
        what = "TLS with bin-manager fails" if tls else "bin-manager cannot be reached"
        return _Failed(Unreachable(f"{what} at {where}: {cause(error)}"))

    def _get(self, path: str, headers: dict[str, str]) -> requests.Response:
        """GET `path`, redirects followed; the token goes to the API's own origin alone."""
        url = f"{self._settings.api}/{path}"
        safe = {"http", "https"}
        headers |= {"User-Agent": f"bin-proxy/{__version__}", "Accept-Encoding": "identity"}
        for _ in range(_REDIRECTS + 1):
            # Judged as it will be sent: two parsers that read one address differently would send the token astray.
            request = requests.Request("GET", url, headers).prepare()
            url = str(request.url)
            parts = urlsplit(url)
            if parts.scheme not in safe:
                raise BinManagerError("bin-manager redirects to something that is neither http nor as safe as https")
            safe &= {parts.scheme, "https"}
            origin = f"{parts.scheme}://{parts.netloc}"
            self._home = self._home or origin
            own = origin == self._home
            if self._settings.token and own:
                request.headers["Authorization"] = f"Bearer {self._settings.token}"
            proxies = self._proxies if own else get_environ_proxies(url)
            self._unanswered += 1
            response = self._adapter.send(request, True, self._timeout(), self._verify, self._cert, proxies)
            self._unanswered = 0
            if not response.is_redirect:
                break
            response.close()
            url = urljoin(url, response.headers["Location"])
        else:
            raise BinManagerError(f"bin-manager redirects more than {_REDIRECTS} times")
        status = response.status_code
        self._tell(f"GET {path}: HTTP {status}")
        if status not in ((200, 206, 400, 412, 416, 501) if "Range" in headers else (200,)):
            passing = status == 429 or status >= 500
            raise _Failed(_refusal(response), _retry_after(response) if passing else math.inf)
        return response


def _read(response: requests.Response) -> bytes:
    body = b""
    while chunk := response.raw.read(_LARGEST_ANSWER, decode_content=False):
        body += chunk
        if len(body) > _LARGEST_ANSWER:
            raise BinManagerError(f"bin-manager's answer is larger than {_LARGEST_ANSWER} bytes")
    return body


def _refusal(response: requests.Response) -> BinManagerError:
    """What an answer that is no success says, as far as it comes: its status alone is worth telling."""
    body = b""
    with response, suppress(BinManagerError, OSError, urllib3.exceptions.HTTPError):
        body = _read(response)
    return _failure(response.status_code, body)


def _retry_after(response: requests.Response) -> float:
    """Retry-After in seconds (RFC 9110, 10.2.3: seconds or a date); 0 without one."""
    try:
        return float(urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", "")))
    except (urllib3.exceptions.InvalidHeader, TypeError, ValueError, OverflowError):
        return 0.0


def _failure(status: int, body: bytes) -> BinManagerError:
    """An answer that is no success, with the code and message that came."""
    told = f"bin-manager answered HTTP {status}"
    with suppress(ValueError, AttributeError):
        answer = parse_json(body.decode())
        for key in ("code", "message"):
            told += f", {key} {str(answer[key])[:200]}" if answer.get(key) is not None else ""
    return BinManagerError(told)


def _parse_release(body: bytes) -> Release:
    """Read the answer to the question for the MD5.

    Raises:
        BinManagerError: it is anything but a release.
    """
    try:
        answer = parse_json(body.decode())
    except ValueError as error:
        raise BinManagerError(f"bin-manager answered HTTP 200 with something that is not JSON: {error}") from None
    if not isinstance(answer, dict) or type(answer.get("code")) is not int or answer["code"] not in (0, 200):
        raise _failure(200, body)
    data = answer["data"] if isinstance(answer.get("data"), dict) else {}
    found: dict[str, str | None] = {}
    for key, pattern in (("md5", "[0-9a-f]{32}"), ("sha256", "[0-9a-f]{64}"), ("size", "[0-9]{1,18}")):
        told = str(data.get(key))
        text = told.strip().lower()
        absent = data.get(key) is None and key != "md5"
        if not absent and not re.fullmatch(pattern, text):
            raise BinManagerError(f"bin-manager answered HTTP 200 with a {key} that is none: {told[:80]!r}")
        found[key] = None if absent else text
    return Release(str(found["md5"]), found["sha256"], int(found["size"]) if found["size"] else None)
