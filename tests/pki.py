"""Certificates made with openssl: a CA, servers good and bad, clients."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CONFIG = """
[ca]
default_ca = own
[own]
database = {folder}/index
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
[req]
distinguished_name = name
[name]
[v3_ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign, digitalSignature
subjectAltName = DNS:localhost, IP:127.0.0.1
subjectKeyIdentifier = hash
"""
_EXTENSIONS = """
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""
_LOCAL = "DNS:localhost, IP:127.0.0.1"


def openssl(*arguments: str | Path) -> None:
    """Run openssl and show what it said where it fails."""
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _key(path: Path) -> None:
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


class Pki:
    """A CA in a folder; `ca` is its certificate. The attributes name PEM files, NAME.key lies beside NAME.pem.

    server: for localhost and 127.0.0.1. other: for elsewhere.example. expired: over since 2021. lonely: signed by
    itself. client: for a client. stranger: a client of another CA.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = self._authority("ca")
        self._authority("foreign")
        self.server = self.issue("server")
        self.other = self.issue("other", names="DNS:elsewhere.example")
        self.expired = self.issue("expired", start="20200101000000Z", end="20210101000000Z")
        self.client = self.issue("client", usage="clientAuth", names="DNS:client.example")
        self.stranger = self.issue("stranger", usage="clientAuth", names="DNS:client.example", by="foreign")
        self.lonely = self._authority("lonely")

    def _authority(self, name: str) -> Path:
        folder, pem = self._folder / f"{name}-ca", self._folder / f"{name}.pem"
        folder.mkdir()
        (folder / "index").touch()
        (folder / "config").write_text(_CONFIG.format(folder=folder))
        _key(pem.with_suffix(".key"))
        openssl(
            *("req", "-new", "-x509", "-config", folder / "config", "-extensions", "v3_ca", "-days", "30"),
            *("-subj", f"/CN=bin-proxy test {name}", "-key", pem.with_suffix(".key"), "-out", pem),
        )
        return pem

    def issue(
        self,
        name: str,
        *,
        usage: str = "serverAuth",
        names: str = _LOCAL,
        start: str = "20240101000000Z",
        end: str = "20990101000000Z",
        by: str = "ca",
    ) -> Path:
        """A certificate and its key."""
        pem, folder = self._folder / f"{name}.pem", self._folder / f"{by}-ca"
        request, extensions = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extensions.write_text(_EXTENSIONS.format(usage=usage, names=names))
        _key(pem.with_suffix(".key"))
        config = ("-config", folder / "config")
        openssl("req", "-new", *config, "-subj", f"/CN={name}", "-key", pem.with_suffix(".key"), "-out", request)
        openssl(
            *("ca", "-batch", "-notext", *config, "-extfile", extensions, "-startdate", start, "-enddate", end),
            *("-cert", self._folder / f"{by}.pem", "-keyfile", self._folder / f"{by}.key"),
            *("-in", request, "-out", pem),
        )
        return pem
