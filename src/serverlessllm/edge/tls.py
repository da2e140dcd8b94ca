"""Certificates of a listener."""

from __future__ import annotations

import ssl
from pathlib import Path


def server_tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """What a listener shows its clients: the chain of `certificate` (PEM), TLS 1.2 or newer.
    None when it speaks plain HTTP.

    Raises:
        ValueError: a file cannot be read, is not what it should be, or the two do not belong
            together.
    """
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, certificate, key)
    return context


def load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Have new connections see this certificate; those that are open keep theirs.

    Raises:
        ValueError: as `server_tls`; the context is as it was.
    """
    for path in (certificate, key):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"TLS: {path} cannot be read: {error.strerror}") from error
    # A fresh context first: a pair that does not fit would leave half of itself in ours.
    for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
        try:
            target.load_cert_chain(certificate, key, password=_refuse_passphrase)
        except ssl.SSLError as error:
            reason = (error.reason or "").replace("_", " ").lower() or "not PEM"
            raise ValueError(
                f"TLS: {certificate} and {key} are not a certificate and its private key: {reason}"
            ) from error


def _refuse_passphrase() -> str:
    raise ValueError("TLS: the private key has a passphrase, and nobody is here to type it")
