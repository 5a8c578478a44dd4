"""The two requests to bin-manager, with their retries, limits and TLS: the only module that uses requests."""

from __future__ import annotations

import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from bin_proxy import __version__
from bin_proxy.errors import BinManagerError, CorruptDownload, Unreachable, cause
from bin_proxy.manifest import Binary, parse_json
from bin_proxy.settings import Settings
from bin_proxy.tls import certificates

if TYPE_CHECKING:
    from bin_proxy.staging import Part

_T = TypeVar("_T")
_TRIES = 3
_LARGEST_ANSWER = 256 * 1024
_CHUNK = 512 * 1024
_REDIRECTS = 5
# What a release tells of itself; all but the MD5 may be absent or null.
_FIELDS = {"md5": (str, "[0-9a-f]{32}"), "sha256": (str, "[0-9a-f]{64}"), "size": (int, "[0-9]{1,18}")}


@dataclass(frozen=True)
class Release:
    """What bin-manager says a binary should be; sha256 and size (in bytes) where it tells them."""

    md5: str
    sha256: str | None = None
    size: int | None = None


@dataclass(eq=False)
class _Failed(Exception):
    """A try failed.

    Args:
        error: what to raise if it was the last.
        after: the pause in seconds that the server asks for.
        again: another try may mend it.
        common: it strikes every binary alike, so that the others need not find out by themselves.
    """

    error: BinManagerError
    after: float = 0.0
    again: bool = True
    common: bool = False


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class BinManager:
    """bin-manager as its clients see it. Threads may share one.

    Args:
        settings: the URL, the credentials, the timeouts and the number of requests side by side.
        tell: called with one line about each request, for --verbose; the lines hold no secret.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None] = lambda line: None) -> None:
        self._settings, self._tell = settings, tell
        parts = urlsplit(settings.api)
        self._where = parts.netloc.rpartition("@")[2]
        self._api = parts._replace(netloc=self._where).geturl()
        pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        basic = f"Basic {b64encode(pair.encode()).decode()}" if parts.username is not None else ""
        self._authorization = f"Bearer {settings.token}" if settings.token else basic
        self._verify = certificates(settings)
        with_key = (settings.client_cert, settings.client_key)
        self._cert = with_key if settings.client_key else settings.client_cert or None
        # No session: it would take credentials from .netrc, keep cookies, and read the whole body of each redirect.
        self._adapter = HTTPAdapter(pool_connections=4, pool_maxsize=settings.jobs)
        self._home: tuple[str, str | None, int | None] | None = None  # as sent: a host is written in several ways
        self._proxies = get_environ_proxies(self._api)  # once, not for each request
        self._answered, self._silences, self._patience = False, count(1), settings.http_timeout
        self._down: BinManagerError | None = None

    def latest(self, binary: Binary) -> Release:
        """Ask for the release that `binary` should be.

        Raises:
            Unreachable: no answer, after retries; asking for other binaries is then not tried again in this run.
            BinManagerError: an answer that is not a release.
        """
        deadline = time.monotonic() + 3 * self._settings.http_timeout

        def ask() -> Release:
            with self._get(f"releases/{binary.version}/{binary.name}/md5", {}) as response:
                if response.status_code != 200:
                    raise self._refusal(response, deadline)
                return _parse_release(self._read(response, deadline))

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
            # For a cache in between: the path is the same for every release of that version.
            headers = {"X-Release-MD5": release.md5, **({"Range": f"bytes={start}-"} if start else {})}
            with self._get(f"releases/{binary.version}/{binary.name}/download", headers) as response:
                status, told = response.status_code, response.headers.get("Content-Range", "")
                if status == 416 or (status == 206 and not told.startswith(f"bytes {start}-")):
                    part.restart()  # so that the next try asks for the whole
                    text = "bin-manager does not send the rest of a download that was asked for"
                    raise _Failed(BinManagerError(text))
                if status not in (200, 206):
                    raise self._refusal(response, deadline)
                total = _expected(response, start, release)
                if status == 200 and start:
                    part.restart()
                if total is not None:
                    part.expect(total)
                for chunk in self._chunks(response, deadline):
                    part.write(chunk)
                if total is not None and part.offset < total:
                    text = f"bin-manager at {self._where} closed the connection in the middle of a download"
                    raise _Failed(Unreachable(text))

        self._retrying(fetch, deadline, lambda: part.offset)

    def _retrying(self, action: Callable[[], _T], deadline: float, progress: Callable[[], int] = lambda: 0) -> _T:
        """Call `action` until it succeeds; give up after a few failures in a row between which nothing progressed."""
        if self._down:
            raise self._down
        failures, seen = 0, progress()
        while True:
            try:
                return action()
            except _Failed as error:
                failed = error
            except BinManagerError as error:
                failed = _Failed(error, again=False)
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                failed = self._translated(error)
            secret = self._authorization.partition(" ")[2]  # which a server may have echoed
            told = type(failed.error)(str(failed.error).replace(secret, "***")) if secret else failed.error
            failures = 1 if progress() > seen else failures + 1
            seen = progress()
            pause = max(failed.after, 0.15 * 2**failures)
            too_long = pause > self._settings.http_timeout or time.monotonic() + pause > deadline
            if failures == _TRIES or too_long or not failed.again:
                self._down = told if failed.common else self._down
                raise told
            self._tell(f"{told}; trying again in {pause:.1f} s")
            time.sleep(pause)

    def _translated(self, error: Exception) -> _Failed:
        """What went wrong on the way, from the first byte of the request to the last of the body."""
        request = getattr(error, "request", None)
        url = str(request.url) if request is not None else self._api
        own = not self._home or _origin(url) == self._home  # else it is not bin-manager's fault that this binary fails
        where = (
            f"bin-manager at {self._where}"
            if own
            else f"{urlsplit(url).netloc.rpartition('@')[2]}, to which bin-manager redirects,"
        )
        again, common = True, own
        if isinstance(error, requests.exceptions.SSLError):
            text, again = f"TLS with {where} failed: {cause(error)}", "CERTIFICATE_VERIFY_FAILED" not in str(error)
        elif isinstance(error, (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)):
            text, again, common = f"bin-manager at {self._where} does not answer in time", False, False
            # A server that answers nobody would cost every binary a timeout, so after a few the others get less.
            if next(self._silences) >= self._settings.jobs and not self._answered:
                self._patience = self._settings.http_timeout / 5
        elif isinstance(error, ValueError):  # a hostile Location, among others
            return _Failed(BinManagerError(f"bin-manager's answer cannot be followed: {cause(error)}"), again=False)
        else:
            refused = isinstance(error, requests.exceptions.ConnectionError)
            refused = refused and not isinstance(next(iter(error.args), None), urllib3.exceptions.ProtocolError)
            what, common = "cannot be reached" if refused else "dropped the connection", own and refused
            text = f"{where} {what}: {cause(error)}"
        return _Failed(Unreachable(text), again=again, common=common)

    def _get(self, path: str, headers: dict[str, str]) -> requests.Response:
        """GET `path`, redirects followed; the credentials go to the API's own origin alone."""
        url, safe = f"{self._api}/{path}", {"http", "https"}
        always = {"User-Agent": f"bin-proxy/{__version__}", "Accept-Encoding": "identity"}
        for _ in range(_REDIRECTS + 1):
            # Judged as it will be sent: two parsers that read one address differently would send the token astray.
            request = requests.Request("GET", url, {**always, **headers}).prepare()
            url = str(request.url)
            origin = _origin(url)
            if origin[0] not in safe:
                raise BinManagerError("bin-manager redirects to something that is neither http nor as safe as https")
            safe &= {origin[0], "https"}
            self._home = self._home or origin
            if self._authorization and origin == self._home:
                request.headers["Authorization"] = self._authorization
            how = (
                self._patience,
                self._verify,
                self._cert,
                self._proxies if origin == self._home else get_environ_proxies(url),
            )
            response = self._adapter.send(request, True, *how)
            self._answered, self._patience = True, self._settings.http_timeout
            if not response.is_redirect:
                break
            response.close()
            url = urljoin(url, response.headers["Location"])
        else:
            raise BinManagerError(f"bin-manager redirects more than {_REDIRECTS} times")
        self._tell(f"GET {path}: HTTP {response.status_code}")
        if response.status_code == 429 or response.status_code >= 500:
            with response:
                error = self._refusal(response, time.monotonic() + self._settings.http_timeout)
                raise _Failed(error, after=_retry_after(response))
        return response

    def _refusal(self, response: requests.Response, deadline: float) -> BinManagerError:
        """What an answer that is no success says, as far as it comes: its status alone is worth telling."""
        body = b""
        with suppress(BinManagerError, OSError, urllib3.exceptions.HTTPError):
            body = self._read(response, deadline)
        return _failure(response.status_code, body)

    def _chunks(self, response: requests.Response, deadline: float) -> Iterator[bytes]:
        # read1 hands out what has arrived, so that a slow link loses nothing when it drops (urllib3 before 2: read).
        read = getattr(response.raw, "read1", response.raw.read)
        while chunk := read(_CHUNK, decode_content=False):
            yield chunk
            if time.monotonic() > deadline:
                raise Unreachable(f"bin-manager at {self._where} is too slow: the time for this request is over")

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        body = b""
        for chunk in self._chunks(response, deadline):
            body += chunk
            if len(body) > _LARGEST_ANSWER:
                raise BinManagerError(f"bin-manager's answer is larger than {_LARGEST_ANSWER} bytes")
        return body


def _retry_after(response: requests.Response) -> float:
    """Retry-After in seconds (RFC 9110, 10.2.3: seconds or a date); 0 without one."""
    try:
        return float(urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", "")))
    except (urllib3.exceptions.InvalidHeader, TypeError, ValueError, OverflowError):
        return 0.0


def _failure(status: int, body: bytes) -> BinManagerError:
    """An answer that is no success, with the code and message that came."""
    told = ""
    with suppress(ValueError, AttributeError):
        answer = parse_json(body.decode())
        words = [f"code {str(answer['code'])[:40]}"] if answer.get("code") is not None else []
        words += [str(answer["message"])[:200]] if answer.get("message") else []
        told = f" ({': '.join(words)})" if words else ""
    return BinManagerError(f"bin-manager answered HTTP {status}{told}")


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
    data = answer.get("data")
    if not isinstance(data, dict):
        raise BinManagerError("bin-manager answered HTTP 200 without data")
    found: dict[str, str | None] = {}
    for key, (kind, pattern) in _FIELDS.items():
        value = data.get(key)
        match = re.fullmatch(pattern, str(value).strip().lower()) if type(value) is kind else None
        if not match and (value is not None or key == "md5"):
            raise BinManagerError(f"bin-manager answered HTTP 200 with a {key} that is none: {str(value)[:80]!r}")
        found[key] = match and match[0]
    return Release(str(found["md5"]), found["sha256"], data.get("size"))


def _expected(response: requests.Response, start: int, release: Release) -> int | None:
    """How many bytes the whole release has; None where neither the headers nor bin-manager's answer tell."""
    if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise BinManagerError("bin-manager sent the download compressed, though asked not to")
    length = re.fullmatch(r"[0-9]{1,15}", response.headers.get("Content-Length", ""))
    partial = response.status_code == 206
    told = re.fullmatch(r"bytes [0-9-]*/([0-9]{1,15})", response.headers.get("Content-Range", ""))
    total = release.size
    if partial and told:
        total = int(told[1])
    elif length:
        total = int(length[0]) + (start if partial else 0)
    if release.size not in (None, total):
        raise CorruptDownload(f"bin-manager announced {release.size} bytes and sends {total}")
    return total
