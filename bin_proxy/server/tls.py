"""Which certificates bin-manager must show, and which it is shown."""

from __future__ import annotations

import os
import ssl

from bin_proxy.config.settings import Settings
from bin_proxy.errors import UsageError, cause

# Where Debian and Alpine, RHEL, and SUSE keep the store that curl uses.
_HOST_STORES = "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"


def certificates(settings: Settings) -> str | bool:
    """The CA file or folder to verify against; True leaves it to the one that requests brings along.

    Raises:
        UsageError: a file of certificates cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    known = {**os.environ, "BIN_MANAGER_CA_BUNDLE": settings.ca_bundle}
    names = ("BIN_MANAGER_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
    name, store = next(((name, known[name]) for name in names if known.get(name)), ("", ""))
    try:
        what = f"{name} {store}"
        if store:
            context.load_verify_locations(**{"capath" if os.path.isdir(store) else "cafile": store})
        what = f"BIN_MANAGER_CLIENT_CERT {settings.client_cert}"
        if settings.client_cert:  # without the password, OpenSSL would ask whoever stands at the terminal
            context.load_cert_chain(settings.client_cert, settings.client_key or None, password=lambda: "")
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} cannot be used: {cause(error)}") from None
    stores = (ssl.get_default_verify_paths().cafile, *_HOST_STORES)
    return store or next((found for found in stores if found and os.path.isfile(found)), True)
