"""The two requests to bin-manager, with their retries, limits and TLS: the only module that uses requests."""

from __future__ import annotations

import os
import re
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from bin_proxy import __version__
from bin_proxy.errors import BinManagerError, Unreachable, UsageError
from bin_proxy.manifest import Binary, parse_json
from bin_proxy.settings import Settings

if TYPE_CHECKING:
    from bin_proxy.staging import Part

_T = TypeVar("_T")
_TRIES = 3
_LARGEST_ANSWER = 256 * 1024
_CHUNK = 512 * 1024
_REDIRECTS = 5
_SUCCESS = (0, 200)
# Where Debian, RHEL, SUSE and Alpine keep the store that curl uses.
_HOST_STORES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True)
class Release:
    """What bin-manager says a binary should be; sha256 and size (in bytes) where it tells them."""

    md5: str
    sha256: str | None = None
    size: int | None = None


class _Retry(Exception):
    """This try failed in a way that another may mend.

    Args:
        error: what to raise when no try is left.
        after: the pause in seconds that the server asks for.
        common: it strikes every binary alike, so that the others need not find out by themselves.
    """

    def __init__(self, error: BinManagerError, *, after: float = 0.0, common: bool = False) -> None:
        super().__init__(error)
        self.error, self.after, self.common = error, after, common


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: redirects are followed below, as requests would read the whole body of each, however long."""
        return None


def _certificates(settings: Settings) -> str | bool:
    """The CA file or folder to verify against; True leaves it to the one that requests brings along.

    Raises:
        UsageError: a file of certificates cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    variables = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
    chosen = [("BIN_MANAGER_CA_BUNDLE", settings.ca_bundle), *((name, os.environ.get(name)) for name in variables)]
    name, store = next((one for one in chosen if one[1]), ("", None))
    try:
        what = f"{name} {store}"
        if store:
            folder = os.path.isdir(store)
            context.load_verify_locations(cafile=None if folder else store, capath=store if folder else None)
        what = f"BIN_MANAGER_CLIENT_CERT {settings.client_cert}"
        if settings.client_cert:  # without the password, OpenSSL would ask whoever stands at the terminal
            context.load_cert_chain(settings.client_cert, settings.client_key or None, password=lambda: "")
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be used: {_cause(error)}") from None
    if store:
        return store
    stores = (ssl.get_default_verify_paths().cafile, *_HOST_STORES)
    return next((store for store in stores if store and os.path.isfile(store)), True)


def _authorization(settings: Settings) -> str | None:
    if settings.token:
        return f"Bearer {settings.token}"
    parts = urlsplit(settings.api)
    if parts.username is None:
        return None
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {b64encode(pair.encode()).decode()}"


class BinManager:
    """bin-manager as its clients see it. Threads may share one.

    Args:
        settings: the URL, the credentials, the timeouts and the number of requests side by side.
        tell: called with one line about each request, for --verbose; the lines hold no secret.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None] = lambda line: None) -> None:
        self._settings = settings
        self._tell = tell
        parts = urlsplit(settings.api)
        self._api = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._where = parts.netloc.rpartition("@")[2]
        self._session = _Session()
        self._session.trust_env = (
            False  # no .netrc; proxies and CA come from the lines below, once instead of a request
        )
        self._proxies = get_environ_proxies(self._api)
        self._session.verify = _certificates(settings)
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers = {"User-Agent": f"bin-proxy/{__version__}", "Accept-Encoding": "identity"}
        self._authorization = _authorization(settings)
        if settings.client_cert:
            pair = (settings.client_cert, settings.client_key)
            self._session.cert = pair if settings.client_key else settings.client_cert
        adapter = HTTPAdapter(pool_connections=4, pool_maxsize=settings.jobs)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._lock = threading.Lock()
        self._answered = False
        self._silences = 0
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
                body = self._read(response, deadline)
                return _parse_release(response.status_code, body)

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
                if response.status_code == 416 or (response.status_code == 206 and not _continues(response, start)):
                    part.restart()  # so that the next try asks for the whole
                    raise _Retry(BinManagerError("bin-manager does not send the rest of a download that was asked for"))
                if response.status_code not in (200, 206):
                    raise _failure(response.status_code, self._read(response, deadline))
                total = _expected(response, start, release)
                if response.status_code == 200 and start:
                    part.restart()
                if total is not None:
                    part.expect(total)
                for chunk in self._chunks(response, deadline):
                    part.write(chunk)
                if total is not None and part.offset < total:
                    raise _Retry(
                        Unreachable(f"bin-manager at {self._where} closed the connection in the middle of a download")
                    )

        self._retrying(fetch, deadline, lambda: part.offset)

    def _retrying(self, action: Callable[[], _T], deadline: float, progress: Callable[[], int] = lambda: 0) -> _T:
        """Call `action` until it succeeds; give up after a few failures in a row between which nothing progressed."""
        if self._down:
            raise self._down
        failures, seen = 0, progress()
        while True:
            try:
                return action()
            except _Retry as retry:
                failures = 1 if progress() > seen else failures + 1
                seen = progress()
                pause = max(retry.after, 0.15 * 2**failures)
                too_long = pause > self._settings.http_timeout or time.monotonic() + pause > deadline
                if failures == _TRIES or too_long:
                    if retry.common:
                        self._down = retry.error
                    raise self._redacted(retry.error) from None
                self._tell(f"{self._redacted(retry.error)}; trying again in {pause:.1f} s")
                time.sleep(pause)
            except BinManagerError as error:
                raise self._redacted(error) from None

    @contextmanager
    def _get(self, path: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        """Send a GET and translate whatever goes wrong, from the first byte of the request to the last of the body."""
        timeout = self._settings.http_timeout
        response = None
        try:
            response = self._follow(f"{self._api}/{path}", headers)
            self._tell(f"GET {path}: HTTP {response.status_code}")
            if response.status_code == 429 or response.status_code >= 500:
                error = _failure(response.status_code, self._read(response, time.monotonic() + timeout))
                raise _Retry(error, after=_retry_after(response))
            yield response
        except requests.exceptions.SSLError as error:
            where, own = self._at(error)
            told = Unreachable(f"TLS with {where} failed: {_cause(error)}")
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise _Retry(told, common=own) from None
            self._down = told if own else self._down
            raise told from None
        except (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError, TimeoutError):
            raise self._silent(f"bin-manager at {self._where} said nothing for {timeout:g} s") from None
        except requests.exceptions.ConnectionError as error:
            dropped = isinstance(error.args[0] if error.args else None, urllib3.exceptions.ProtocolError)
            what = "dropped the connection" if dropped else "cannot be reached"
            where, own = self._at(error)
            raise _Retry(Unreachable(f"{where} {what}: {_cause(error)}"), common=own and not dropped) from None
        except ValueError as error:  # what requests and urllib.parse make of a hostile Location, among others
            raise BinManagerError(f"bin-manager's answer cannot be followed: {_cause(error)}") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            told = Unreachable(f"bin-manager at {self._where} dropped the connection: {_cause(error)}")
            raise _Retry(told) from None
        finally:
            if response is not None:
                response.close()

    def _at(self, error: requests.RequestException) -> tuple[str, bool]:
        """Where a request failed, and whether that is bin-manager itself rather than where it redirects to."""
        url = str(error.request.url) if error.request is not None else self._api
        if _origin(url) == _origin(self._api):
            return f"bin-manager at {self._where}", True
        return f"{urlsplit(url).netloc}, to which bin-manager redirects,", False

    def _redacted(self, error: BinManagerError) -> BinManagerError:
        """The same error, should a server have echoed our credentials into its words."""
        text = str(error)
        for secret in (self._settings.token, (self._authorization or "").partition(" ")[2]):
            text = text.replace(secret, "***") if secret else text
        return type(error)(text)

    def _follow(self, url: str, headers: dict[str, str]) -> requests.Response:
        """GET `url`, redirects followed; the credentials go to the API's own origin alone."""
        for _ in range(_REDIRECTS + 1):
            proxies = self._proxies
            own = _origin(url) == _origin(self._api)
            if own and self._authorization:
                headers = {**headers, "Authorization": self._authorization}
            elif not own:
                headers = {key: value for key, value in headers.items() if key != "Authorization"}
                proxies = get_environ_proxies(url)
            timeout = self._settings.http_timeout
            response = self._session.get(url, headers=headers, stream=True, timeout=timeout, proxies=proxies)
            self._answered = True
            if not response.is_redirect:
                return response
            response.close()
            # As requests will send it: two parsers that read one address differently would send the token astray.
            target = str(requests.Request("GET", urljoin(url, response.headers["Location"])).prepare().url)
            if urlsplit(target).scheme not in ("http", "https") or (
                url.startswith("https:") and not target.startswith("https:")
            ):
                raise BinManagerError("bin-manager redirects to something that is neither http nor as safe as https")
            url = target
        raise BinManagerError(f"bin-manager redirects more than {_REDIRECTS} times")

    def _silent(self, text: str) -> Unreachable:
        """A server that answers nobody would cost every binary a timeout: after a few it counts as down."""
        error = Unreachable(text)
        with self._lock:
            self._silences += 1
            if not self._answered and self._silences >= self._settings.jobs:
                self._down = error
        return error

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


def _cause(error: BaseException) -> str:
    """The words of the innermost cause: urllib3 wraps the one that tells something in several that do not."""
    while True:
        inner = getattr(error, "reason", None) or error.__cause__ or next(iter(error.args), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    words = error.args[-1] if error.args and isinstance(error.args[-1], str) else str(error)
    words = re.sub(r"//[^/@\s]*@", "//***@", words)  # a proxy's password
    return re.sub(r"^<?[\w.]+\(.*?\):? |^\[[^]]*\] ", "", words)[:200] or type(error).__name__


def _retry_after(response: requests.Response) -> float:
    """Retry-After in seconds (RFC 9110, 10.2.3: seconds or a date); 0 without one."""
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _failure(status: int, body: bytes) -> BinManagerError:
    """An answer that is no success, with the code and message that came."""
    try:
        answer = parse_json(body.decode())
        told = f" (code {str(answer['code'])[:40]}: {str(answer.get('message', ''))[:200]})"
    except (ValueError, TypeError, KeyError, AttributeError):
        told = ""
    return BinManagerError(f"bin-manager answered HTTP {status}{told}")


def _parse_release(status: int, body: bytes) -> Release:
    """Read the answer to the question for the MD5.

    Raises:
        BinManagerError: it is anything but a release.
    """
    if status != 200:
        raise _failure(status, body)
    try:
        answer = parse_json(body.decode())
    except ValueError as error:
        raise BinManagerError(f"bin-manager answered HTTP 200 with something that is not JSON: {error}") from None
    if not isinstance(answer, dict) or type(answer.get("code")) is not int or answer["code"] not in _SUCCESS:
        raise _failure(status, body)
    data = answer.get("data")
    if not isinstance(data, dict):
        raise BinManagerError("bin-manager answered HTTP 200 without data")
    found: dict[str, str | None] = {}
    for key, digits in (("md5", 32), ("sha256", 64)):
        value = data.get(key)
        text = value.strip().lower() if isinstance(value, str) else ""
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", text) and not (key == "sha256" and value is None):
            raise BinManagerError(f"bin-manager answered HTTP 200 with a {key} that is none: {str(value)[:80]!r}")
        found[key] = text or None
    size = data.get("size")
    if size is not None and (type(size) is not int or not 0 <= size < 2**63):
        raise BinManagerError(f"bin-manager answered HTTP 200 with a size that is none: {str(size)[:80]!r}")
    return Release(str(found["md5"]), found["sha256"], size)


def _continues(response: requests.Response, start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _expected(response: requests.Response, start: int, release: Release) -> int | None:
    """How many bytes the whole release has, by the headers; None where they do not tell."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None
    if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise BinManagerError("bin-manager sent the download compressed, though asked not to")
    if response.status_code == 206:
        told = re.search(r"/([0-9]{1,15})$", response.headers["Content-Range"])
        total = int(told[1]) if told else None if total is None else start + total
    if total is not None and release.size not in (None, total):
        raise BinManagerError(f"bin-manager announced {release.size} bytes and sends {total}")
    return total if total is not None else release.size
