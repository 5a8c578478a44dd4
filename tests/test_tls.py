"""HTTPS to bin-manager: always verified, by the store that was named or the host's own, with a client certificate."""

from __future__ import annotations

import os
import shlex
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require, require_root
from tests.host import Host, good, md5
from tests.pki import Pki, openssl
from tests.server import BinManagerServer, redirect_to

CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
STORES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")

Serve = Callable[..., BinManagerServer]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    require("openssl")
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def serve(host: Host) -> Iterator[Serve]:
    """Start an HTTPS bin-manager that has release v2 of "tool", and point the host at it."""
    started: list[BinManagerServer] = []

    def start(
        certificate: Path, clients_of: Path | None = None, newest: int = ssl.TLSVersion.TLSv1_2
    ) -> BinManagerServer:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        if clients_of:
            # In TLS 1.3 a client is refused after its request is on the way, and may see no more than a reset.
            context.maximum_version = ssl.TLSVersion(newest)
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(clients_of)
        server = BinManagerServer(context=context)
        started.append(server)
        server.publish("tool", good("v2"))
        host.settings["BIN_MANAGER_API"] = server.api
        host.install("tool", good("v1"))
        host.write_manifest({"name": "tool", "service": False})
        return server

    yield start
    for server in started:
        server.stop()


def assert_updated(host: Host, **settings: str) -> None:
    done = host.sync(**settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert host.disk_md5("tool") == md5(good("v2"))


def assert_refused(host: Host, *words: str, code: int = 1, **settings: str) -> str:
    """The host is untouched and one line says why; returns it."""
    done = host.sync(**settings)
    assert (done.returncode, done.stdout) == (code, "")
    [line] = done.stderr.splitlines()
    assert any(word in line for word in words), line
    assert host.disk_md5("tool") == md5(good("v1"))
    assert host.strays() == []
    return line


def test_certificate_of_a_known_ca_is_accepted(host: Host, serve: Serve, pki: Pki) -> None:
    """BIN_MANAGER_CA_BUNDLE names the CA that counts."""
    serve(pki.server)
    assert_updated(host, BIN_MANAGER_CA_BUNDLE=str(pki.ca))


@pytest.mark.parametrize("name", CA_VARIABLES)
@pytest.mark.parametrize("where", ["environment", "config file"])
def test_the_variables_that_requests_and_openssl_know(
    host: Host, serve: Serve, pki: Pki, name: str, where: str
) -> None:
    """They keep working, also from the config file that cron used to source."""
    serve(pki.server)
    if where == "environment":
        assert_updated(host, **{name: str(pki.ca)})
    else:
        (host.root / "config").write_text(f"export {name}={pki.ca}\n")
        assert_updated(host)


def test_a_folder_of_certificates(host: Host, serve: Serve, pki: Pki, tmp_path: Path) -> None:
    """SSL_CERT_DIR names a folder as `openssl rehash` makes it."""
    serve(pki.server)
    shown = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", pki.ca], capture_output=True, text=True)
    (tmp_path / f"{shown.stdout.strip()}.0").write_bytes(pki.ca.read_bytes())
    assert_updated(host, SSL_CERT_DIR=str(tmp_path))


def test_the_own_setting_wins_over_the_variables(host: Host, serve: Serve, pki: Pki) -> None:
    """BIN_MANAGER_CA_BUNDLE is about bin-manager, the others about everything."""
    serve(pki.server)
    assert_refused(host, "verify failed", BIN_MANAGER_CA_BUNDLE=str(pki.lonely), REQUESTS_CA_BUNDLE=str(pki.ca))
    assert_updated(host, BIN_MANAGER_CA_BUNDLE=str(pki.ca), REQUESTS_CA_BUNDLE=str(pki.lonely))


def in_a_namespace_whose_store_is(store: Path, host: Host) -> subprocess.CompletedProcess[str]:
    where = next((path for path in STORES if os.path.exists(path)), None)
    assert where, f"none of {STORES} is here: install ca-certificates"
    words = f"mount --bind {store} {where} && exec {shlex.join(host.command('sync'))}"
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parent.parent,
        env=host.environment(),
    )


def test_the_hosts_own_store_is_used_without_any_setting(host: Host, serve: Serve, pki: Pki, tmp_path: Path) -> None:
    """A CA that the operator added to the host's store counts, as for curl; one that is not there does not."""
    require_root()
    require("unshare", "mount")
    serve(pki.server)
    host.sync()  # the trouble is told now, so that below it is not new
    done = in_a_namespace_whose_store_is(pki.lonely, host)
    assert (done.returncode, host.disk_md5("tool")) == (1, md5(good("v1"))), done.stderr
    done = in_a_namespace_whose_store_is(pki.ca, host)
    assert (done.returncode, host.disk_md5("tool")) == (0, md5(good("v2"))), done.stderr


def test_without_its_ca_a_server_is_refused(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.server)
    assert_refused(host, "verify failed")


def test_a_self_signed_certificate_is_refused(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.lonely)
    line = assert_refused(host, "self-signed", "self signed", BIN_MANAGER_CA_BUNDLE=str(pki.ca))
    assert "TLS with bin-manager" in line


def test_a_certificate_for_another_host_is_refused(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.other)
    assert_refused(host, "127.0.0.1", BIN_MANAGER_CA_BUNDLE=str(pki.ca))


def test_an_expired_certificate_is_refused(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.expired)
    assert_refused(host, "expired", BIN_MANAGER_CA_BUNDLE=str(pki.ca))


def test_plain_http_on_the_other_side_is_one_line(host: Host, pki: Pki) -> None:
    """An https URL that leads to a server without TLS fails as one clear line, not by talking http."""
    host.install("tool", good("v1"))
    host.write_manifest({"name": "tool", "service": False})
    assert_refused(host, "TLS", BIN_MANAGER_API=host.server.api.replace("http:", "https:"))
    assert host.server.requests == []


@pytest.mark.parametrize("name", ["BIN_MANAGER_CA_BUNDLE", *CA_VARIABLES])
@pytest.mark.parametrize("kind", ["absent", "no certificate"])
def test_a_bad_ca_file_is_named(host: Host, serve: Serve, pki: Pki, tmp_path: Path, name: str, kind: str) -> None:
    """A CA file that is absent or holds none is one line that names the file, and never means "verify nothing"."""
    serve(pki.server)
    bundle = tmp_path / "bundle.pem"
    if kind != "absent":
        bundle.write_text("this is no certificate\n")
    line = assert_refused(host, name, code=2, **{name: str(bundle)})
    assert str(bundle) in line


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("together", [False, True], ids=["with key file", "key in the certificate's file"])
def test_client_certificate(
    host: Host, serve: Serve, pki: Pki, tmp_path: Path, together: bool, version: ssl.TLSVersion
) -> None:
    """Mutual TLS, with the key in a file of its own or beside the certificate."""
    serve(pki.server, clients_of=pki.ca, newest=version)
    certificate, key = pki.client, pki.client.with_suffix(".key")
    settings = {"BIN_MANAGER_CA_BUNDLE": str(pki.ca), "BIN_MANAGER_CLIENT_CERT": str(certificate)}
    if together:
        both = tmp_path / "both.pem"
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        settings["BIN_MANAGER_CLIENT_CERT"] = str(both)
    else:
        settings["BIN_MANAGER_CLIENT_KEY"] = str(key)
    assert_updated(host, **settings)


def test_no_client_certificate_where_one_is_wanted_is_one_line(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.server, clients_of=pki.ca)
    assert_refused(host, "handshake failure", BIN_MANAGER_CA_BUNDLE=str(pki.ca))


def test_the_wrong_client_certificate_is_one_line(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.server, clients_of=pki.ca)
    assert_refused(
        host,
        "unknown ca",
        "handshake failure",
        BIN_MANAGER_CA_BUNDLE=str(pki.ca),
        BIN_MANAGER_CLIENT_CERT=str(pki.stranger),
        BIN_MANAGER_CLIENT_KEY=str(pki.stranger.with_suffix(".key")),
    )


def test_a_key_of_another_certificate_is_one_line(host: Host, serve: Serve, pki: Pki) -> None:
    serve(pki.server, clients_of=pki.ca)
    assert_refused(
        host,
        "BIN_MANAGER_CLIENT_",
        code=2,
        BIN_MANAGER_CA_BUNDLE=str(pki.ca),
        BIN_MANAGER_CLIENT_CERT=str(pki.client),
        BIN_MANAGER_CLIENT_KEY=str(pki.stranger.with_suffix(".key")),
    )


@pytest.mark.parametrize("together", [False, True], ids=["with key file", "key in the certificate's file"])
def test_an_encrypted_key_asks_nobody(host: Host, serve: Serve, pki: Pki, tmp_path: Path, together: bool) -> None:
    """A key with a passphrase is one line, not a prompt that nobody under cron answers."""
    serve(pki.server, clients_of=pki.ca)
    key = tmp_path / "client.key"
    openssl("ec", "-in", pki.client.with_suffix(".key"), "-aes256", "-passout", "pass:geheim", "-out", key)
    both = tmp_path / "both.pem"
    both.write_bytes(pki.client.read_bytes() + (key.read_bytes() if together else b""))
    settings = {"BIN_MANAGER_CLIENT_CERT": str(both)} | ({} if together else {"BIN_MANAGER_CLIENT_KEY": str(key)})
    assert_refused(host, "BIN_MANAGER_CLIENT_", code=2, BIN_MANAGER_CA_BUNDLE=str(pki.ca), **settings)


def test_a_certificate_that_ends_between_two_requests(host: Host, serve: Serve, pki: Pki) -> None:
    """A server whose certificate was changed for a bad one gets no download, though its MD5 was asked before."""
    first = serve(pki.server)
    assert_updated(host, BIN_MANAGER_CA_BUNDLE=str(pki.ca))
    host.install("tool", good("v1"))
    first.stop()
    serve(pki.other)
    assert_refused(host, "127.0.0.1", BIN_MANAGER_CA_BUNDLE=str(pki.ca))


def test_a_redirect_to_a_bad_certificate_costs_that_binary_alone(host: Host, serve: Serve, pki: Pki) -> None:
    """A download that is sent to a server with a bad certificate fails; the other binaries get theirs."""
    bad = serve(pki.other)
    server = serve(pki.server)
    for name in ("tool", "next"):
        server.publish(name, good("v2"))
        host.install(name, good("v1"))
    host.write_manifest({"name": "tool", "service": False}, {"name": "next", "service": False})
    server.always[server.download_path("tool")] = redirect_to(bad.api + "/releases/latest/tool/download")
    done = host.sync(BIN_MANAGER_CA_BUNDLE=str(pki.ca), JOBS="1")
    [line] = done.stderr.splitlines()
    assert line.startswith("bin-proxy: tool:") and str(bad.port) in line
    assert (host.disk_md5("tool"), host.disk_md5("next")) == (md5(good("v1")), md5(good("v2")))


def test_a_dropped_handshake_is_tried_again(host: Host, serve: Serve, pki: Pki) -> None:
    """A connection that is dropped during the handshake is retried like any dropped connection."""
    server = serve(pki.server)
    assert server.context
    cut: list[str | None] = []

    def cut_first(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        if not cut:
            connection.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        cut.append(name)

    server.context.sni_callback = cut_first
    # Only a name, not an address, is told before the handshake.
    by_name = server.api.replace("127.0.0.1", "localhost")
    assert_updated(host, BIN_MANAGER_CA_BUNDLE=str(pki.ca), BIN_MANAGER_API=by_name)
    assert len(cut) > 1
