"""The credentials go to bin-manager's own origin and to nobody else: no other host, no log, no child, no file."""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.faults import answering
from tests.host import SUPERVISORCTL, Host, good, md5, running_host
from tests.pki import Pki
from tests.proxy import Proxy
from tests.server import BinManagerServer, redirect_to

TOKEN = "s3cret-T0ken.of/the+host="
BASIC = "Basic " + b64encode(b"robot:pass:w\xf6rd").decode()
DOWNLOAD = BinManagerServer.download_path("tool")


@pytest.fixture
def tool(host: Host) -> Host:
    """A host with "tool" v1, whose bin-manager wants a token and has v2."""
    host.install("tool", good("v1"))
    host.server.publish("tool", good("v2"))
    host.write_manifest({"name": "tool", "service": False})
    host.settings["BIN_MANAGER_TOKEN"] = TOKEN
    return host


@pytest.fixture
def elsewhere() -> Iterator[BinManagerServer]:
    """A server of somebody else, on another address, that has the release, too."""
    server = BinManagerServer(address="127.0.0.2")
    server.publish("tool", good("v2"))
    yield server
    server.stop()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    require("openssl")
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def secure_server(pki: Pki) -> Iterator[BinManagerServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.server, pki.server.with_suffix(".key"))
    server = BinManagerServer(context=context)
    server.publish("tool", good("v2"))
    yield server
    server.stop()


def sent_to(server: BinManagerServer) -> list[str | None]:
    """The Authorization of each request that came."""
    return [headers.get("Authorization") for _, headers in server.requests]


def all_text(host: Host) -> str:
    """Everything that lies on the host, but what the operator wrote."""
    own = {host.root / "config", host.root / "token"}
    found = [path for path in host.root.rglob("*") if path.is_file() and path not in own]
    return "".join(f"{path}\n{path.read_bytes().decode('latin-1')}\n" for path in found)


def test_every_request_bears_the_token(tool: Host) -> None:
    assert tool.sync().returncode == 0
    assert sent_to(tool.server) == [f"Bearer {TOKEN}"] * 2


def test_a_host_written_in_another_way_is_the_same_origin(tool: Host) -> None:
    """Names are normalised before they are sent: escapes, and those of other scripts."""
    assert tool.sync(BIN_MANAGER_API=tool.server.api.replace("127.0.0.1", "loc%61lhost")).returncode == 0
    assert sent_to(tool.server) == [f"Bearer {TOKEN}"] * 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_loses_the_token(tool: Host, elsewhere: BinManagerServer, status: int) -> None:
    """The redirect is followed, as object stores want it, without the credentials."""
    tool.server.always[DOWNLOAD] = redirect_to(elsewhere.api + "/releases/latest/tool/download", status)
    assert tool.sync().returncode == 0
    assert tool.disk_md5("tool") == md5(good("v2"))
    assert sent_to(elsewhere) == [None]


def test_a_redirect_to_another_port_loses_the_token(tool: Host) -> None:
    other = BinManagerServer()
    try:
        other.publish("tool", good("v2"))
        tool.server.always[DOWNLOAD] = redirect_to(other.api + "/releases/latest/tool/download")
        assert tool.sync().returncode == 0
        assert sent_to(other) == [None]
    finally:
        other.stop()


def test_a_redirect_of_the_md5_loses_the_token_too(tool: Host, elsewhere: BinManagerServer) -> None:
    tool.server.always["*"] = redirect_to(elsewhere.api + "/releases/latest/tool/md5")
    tool.sync()
    assert sent_to(elsewhere)
    assert set(sent_to(elsewhere)) == {None}


def test_a_redirect_within_the_origin_keeps_the_token(tool: Host) -> None:
    tool.server.publish("renamed", good("v2"))
    tool.server.always[DOWNLOAD] = redirect_to("/api/v1/releases/latest/renamed/download")
    assert tool.sync().returncode == 0
    assert sent_to(tool.server) == [f"Bearer {TOKEN}"] * 3


@pytest.mark.parametrize(
    "trick",
    [
        "http://{evil}\\@{own}/x",
        "http://{evil}\\\\@{own}/x",
        "http://{evil}%5C@{own}/x",
        "http://{own}@{evil}/x",
        "http://{own}%2F@{evil}/x",
        "http://{evil}#@{own}/x",
        "http://{evil}?@{own}/x",
        "http://{evil};@{own}/x",
        "//{evil}\\@{own}/x",
        "\\\\{evil}/x",
        "/\\{evil}/x",
        "http:\\\\{evil}\\@{own}/x",
        "http:{evil}/x",
        "http:///{evil}/x",
        " http://{evil}/x",
        "\thttp://{evil}/x",
        "http://{evil}\t@{own}/x",
        "http://{evil} @{own}/x",
        "http://user:word@{evil}/x",
        "HTTP://{evil}/x",
    ],
)
def test_an_address_that_can_be_read_in_two_ways(tool: Host, elsewhere: BinManagerServer, trick: str) -> None:
    """Wherever the request really goes decides, not how another parser reads the Location."""
    evil, own = elsewhere.api.split("/")[2], tool.server.api.split("/")[2]
    tool.server.always[DOWNLOAD] = redirect_to(trick.format(evil=evil, own=own))
    done = tool.sync()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not any(TOKEN in str(headers) for _, headers in elsewhere.requests)
    assert tool.disk_md5("tool") == md5(good("v1"))


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
def test_https_is_never_left_for_http(
    tool: Host, secure_server: BinManagerServer, elsewhere: BinManagerServer, pki: Pki, scheme: str
) -> None:
    """A redirect from https to plain http is refused, so that neither bytes nor token travel in the clear."""
    secure_server.always[DOWNLOAD] = redirect_to(elsewhere.api + "/releases/latest/tool/download")
    api = secure_server.api.replace("https", scheme)
    done = tool.sync(BIN_MANAGER_API=api, BIN_MANAGER_CA_BUNDLE=str(pki.ca))
    assert done.returncode == 1
    assert "redirect" in done.stderr
    assert elsewhere.requests == []
    assert tool.disk_md5("tool") == md5(good("v1"))


def settings_with(host: Host, source: str) -> dict[str, str]:
    """The credentials of bin-manager, given in one of the ways there are."""
    if source == "environment":
        return {"BIN_MANAGER_TOKEN": TOKEN}
    if source == "API's URL":
        return {"BIN_MANAGER_API": host.server.api.replace("//", "//robot:pass%3Aw%C3%B6rd@")}
    if source == "config file":
        (host.root / "config").write_text(f"export BIN_MANAGER_TOKEN='{TOKEN}'\n")
        return {}
    (host.root / "token").write_text(TOKEN + "\n")
    (host.root / "token").chmod(0o600)
    return {"BIN_MANAGER_TOKEN_FILE": str(host.root / "token")}


@pytest.mark.parametrize("source", ["environment", "token file", "config file", "API's URL"])
def test_the_token_is_nowhere_to_be_seen(source: str) -> None:
    """Not in a log, an output, a state file, an argument, or the environment of anything that bin-proxy starts."""
    with running_host("manager") as host:
        dump = host.root / "dump"
        dump.write_text(
            f"#!/bin/sh\nenv >> {host.root}/seen\ntr '\\0' ' ' < /proc/$PPID/cmdline >> {host.root}/seen\n"
            f'[ "$1" = ctl ] || exit 0\nshift\nexec {" ".join(SUPERVISORCTL)} -c {host.conf} "$@"\n'
        )
        dump.chmod(0o755)
        health = {"command": [str(dump)]}
        entry = {"name": "manager", "currentMd5": "", "healthCheck": health, "verifyCommand": [str(dump), "{file}"]}
        host.write_manifest(entry)
        settings = settings_with(host, source) | {"SUPERVISORCTL": f"{dump} ctl", "MIN_HEALTHY_SECONDS": "0.3"}
        done = host.sync("--dry-run", **settings)
        outputs = done.stdout + done.stderr
        host.server.publish("manager", good("v2"))
        done = host.run("-v", "sync", "--json", **settings)
        outputs += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        assert "GET releases/latest/manager/md5" in outputs
        assert sent_to(host.server)[-1] in (f"Bearer {TOKEN}", BASIC)
        host.server.always["*"] = answering(403, {"code": 7, "message": "no"})
        done = host.sync("--json", **settings)
        outputs += done.stdout + done.stderr
        assert done.returncode == 1
        host.server.stop()
        done = host.run("-v", "sync", **settings)
        outputs += done.stdout + done.stderr
        assert done.returncode == 1
        seen = (host.root / "seen").read_text()
        assert "PATH=" in seen
        assert "bin_proxy" in seen
        for secret in (TOKEN, "w%C3%B6rd", "wörd", "w\\xf6rd", BASIC.split()[1]):
            assert secret not in outputs
            assert secret not in all_text(host)


@pytest.mark.parametrize("where", ["message", "md5", "download"])
def test_a_bin_manager_that_echoes_the_token(tool: Host, where: str) -> None:
    """What bin-manager says is logged, but not our token when it says that."""
    if where == "md5":
        tool.server.extra[("latest", "tool")] = {"md5": TOKEN}
    else:
        path = DOWNLOAD if where == "download" else BinManagerServer.md5_path("tool")
        answer = {"code": 401, "message": f"bad token {TOKEN}", "data": None}
        tool.server.always[path] = answering(401, answer)
    done = tool.sync()
    outputs = done.stdout + done.stderr
    assert done.returncode == 1
    assert "bin-manager answered HTTP" in outputs
    done = tool.run("-v", "sync", "--json")
    assert TOKEN not in outputs + done.stdout + done.stderr + all_text(tool)


@pytest.mark.parametrize("written", [TOKEN, TOKEN + "\n", TOKEN + "\r\n", f"  {TOKEN}  \n\n"])
def test_blanks_around_a_token_in_a_file_do_not_count(tool: Host, written: str) -> None:
    (tool.root / "token").write_bytes(written.encode())
    del tool.settings["BIN_MANAGER_TOKEN"]
    assert tool.sync(BIN_MANAGER_TOKEN_FILE=str(tool.root / "token")).returncode == 0
    assert set(sent_to(tool.server)) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "token", ["half\nother", "half\r\nX-Evil: other", "half other", "half\0other", "hälf", "half\x7f"]
)
@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_token_that_no_header_may_carry_is_refused_unseen(tool: Host, token: str, source: str) -> None:
    """Exit 2, nothing asked, and the message does not show it."""
    del tool.settings["BIN_MANAGER_TOKEN"]
    (tool.root / "token").write_text(token)
    settings = {"BIN_MANAGER_TOKEN_FILE": str(tool.root / "token")}
    if source == "environment":
        settings = {"BIN_MANAGER_TOKEN": token.replace("\0", "\1")}
    done = tool.sync(**settings)
    assert (done.returncode, done.stdout, tool.server.requests) == (2, "", [])
    assert "token" in done.stderr
    assert not any(piece in done.stderr for piece in ("half", "other", "Evil", "lf"))


def test_a_netrc_file_is_nobodys_business(tool: Host) -> None:
    """curl and requests would take credentials from ~/.netrc and replace ours; bin-proxy does not."""
    (tool.root / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tool.root / ".netrc").chmod(0o600)
    where = {"HOME": str(tool.root), "NETRC": str(tool.root / ".netrc")}
    assert tool.sync(**where).returncode == 0
    assert sent_to(tool.server) == [f"Bearer {TOKEN}"] * 2
    assert tool.sync(BIN_MANAGER_TOKEN="", **where).returncode == 0
    assert sent_to(tool.server)[-1] is None


def test_credentials_in_the_url_are_basic(tool: Host, elsewhere: BinManagerServer) -> None:
    """user:password@ in the API's URL, percent-encoded, is sent as Basic, and not after a redirect elsewhere."""
    tool.server.always[DOWNLOAD] = redirect_to(elsewhere.api + "/releases/latest/tool/download")
    done = tool.sync(**settings_with(tool, "API's URL"), BIN_MANAGER_TOKEN="")
    assert done.returncode == 0
    assert set(sent_to(tool.server)) == {BASIC}
    assert sent_to(elsewhere) == [None]


@pytest.mark.parametrize(
    "url",
    [
        "http://robot:geh/eim@h:80/api",
        "http://robot:gehei℀m@h/api",
        "http://robot:geheim@h:99999/api",
        "http://robot:geheim@/x",
    ],
)
def test_a_bad_url_is_refused_without_its_password(tool: Host, url: str) -> None:
    done = tool.sync(BIN_MANAGER_API=url)
    assert done.returncode == 2
    assert "BIN_MANAGER_API" in done.stderr
    assert "geh" not in done.stderr


# proxies


@pytest.mark.parametrize("where", ["environment", "config file"])
def test_a_proxy_is_used(tool: Host, proxy: Proxy, where: str) -> None:
    settings = {"HTTP_PROXY": f"http://{proxy.where}"}
    if where == "config file":
        (tool.root / "config").write_text(f"http_proxy=http://{proxy.where}\n")
        settings = {}
    assert tool.sync(**settings).returncode == 0
    assert tool.disk_md5("tool") == md5(good("v2"))
    assert [head.split()[1] for head in proxy.heads] == [
        f"{tool.server.api}/releases/latest/tool/{what}" for what in ("md5", "download")
    ]


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy_is_honoured(tool: Host, proxy: Proxy, name: str) -> None:
    done = tool.sync(HTTP_PROXY=f"http://{proxy.where}", **{name: "example.com,127.0.0.1"})
    assert (done.returncode, proxy.heads) == (0, [])


def test_no_proxy_is_honoured_after_a_redirect(tool: Host, proxy: Proxy, elsewhere: BinManagerServer) -> None:
    """A redirect to a host that needs no proxy goes there directly, though the API itself is behind the proxy."""
    tool.server.always[DOWNLOAD] = redirect_to(elsewhere.api + "/releases/latest/tool/download")
    done = tool.sync(HTTP_PROXY=f"http://{proxy.where}", NO_PROXY="127.0.0.2")
    assert done.returncode == 0
    assert len(elsewhere.requests) == 1
    assert [head.split()[1].rpartition("/")[2] for head in proxy.heads] == ["md5", "download"]
    assert not any("127.0.0.2" in head.split()[1] for head in proxy.heads)


def test_the_proxy_of_https_never_sees_the_token(
    tool: Host, proxy: Proxy, secure_server: BinManagerServer, pki: Pki
) -> None:
    """CONNECT carries the proxy's own credentials and nothing of bin-manager's."""
    done = tool.sync(
        BIN_MANAGER_API=secure_server.api,
        BIN_MANAGER_CA_BUNDLE=str(pki.ca),
        HTTPS_PROXY=f"http://clerk:pr0xy-w0rd@{proxy.where}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sent_to(secure_server) == [f"Bearer {TOKEN}"] * 2
    assert proxy.heads
    for head in proxy.heads:
        assert head.startswith("CONNECT ")
        assert b64encode(b"clerk:pr0xy-w0rd").decode() in head
        assert TOKEN not in head
        assert "\nAuthorization" not in head
    assert not any("Proxy-Authorization" in headers for _, headers in secure_server.requests)


@pytest.mark.parametrize("where", ["127.0.0.1:1", "127.0.0.1:port", "127.0.0.1:99999", "[::1", "no host.example:80"])
@pytest.mark.parametrize("api", ["http", "https"])
def test_a_bad_proxy_is_told_without_its_password(tool: Host, where: str, api: str) -> None:
    url = tool.server.api.replace("http", api)
    settings = {f"{api}_proxy": f"http://clerk:pr0xy-w0rd@{where}", "BIN_MANAGER_API": url}
    done = tool.run("-v", "sync", "--json", **settings)
    assert done.returncode in (1, 2)
    if done.returncode == 1:
        assert json.loads(done.stdout)["results"][0]["outcome"] == "failed"
    text = done.stdout + done.stderr + all_text(tool)
    assert "pr0xy-w0rd" not in text
    assert tool.server.requests == []


def test_the_token_file_is_not_opened_where_the_token_is_given(tool: Host, tmp_path: Path) -> None:
    """The environment wins over the file, also where the file is absent."""
    assert tool.sync(BIN_MANAGER_TOKEN_FILE=str(tmp_path / "absent")).returncode == 0
    assert set(sent_to(tool.server)) == {f"Bearer {TOKEN}"}
