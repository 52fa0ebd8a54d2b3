"""TLS of the gateway: certificate and key from credentials or files, changed under running connections."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_llm.config import Gateway
from spark_llm.errors import ConfigError

CERTIFICATE, KEY = "tls-certificate", "tls-key"
"""Names of the systemd credentials."""


@dataclass(frozen=True)
class Files:
    """PEM files: the certificate with its chain, and its key without a passphrase."""

    certificate: Path
    key: Path


def files(gateway: Gateway, environ: Mapping[str, str]) -> Files | None:
    """Where certificate and key lie: as configured, else systemd's credentials; None means plain HTTP.

    Raises:
        ConfigError: one of the two is missing.
    """
    certificate, key = gateway.tls_certificate, gateway.tls_key
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not certificate and not key and folder:
        certificate, key = (
            str(path) if (path := Path(folder) / name).is_file() else ""
            for name in (CERTIFICATE, KEY)
        )
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise ConfigError(
            f"TLS has a {'certificate' if certificate else 'key'} but no "
            f"{'key' if certificate else 'certificate'}",
            hint="Set both gateway.tls_certificate and gateway.tls_key, or both credentials, or neither.",
        )
    return Files(Path(certificate), Path(key))


def context(found: Files) -> ssl.SSLContext:
    """A server's context, TLS 1.2 or newer.

    Raises:
        ConfigError: the files cannot be read, or do not belong together.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    refresh(made, found)
    return made


def refresh(live: ssl.SSLContext, found: Files) -> None:
    """Read the files again into ``live``: later handshakes use them, connections that are open keep theirs.

    They are tried on a context of their own first, so that a bad pair changes nothing.

    Raises:
        ConfigError: the files cannot be read, or do not belong together.
    """
    try:
        for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), live):
            target.load_cert_chain(found.certificate, found.key, password=_no_passphrase)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS: {found.certificate} and {found.key}: {error.strerror or error}",
            hint="Both must be PEM, readable for the service, without a passphrase, and belong together.",
        ) from error


def _no_passphrase() -> str:
    """Without this, OpenSSL would ask on the terminal and hang."""
    return ""
