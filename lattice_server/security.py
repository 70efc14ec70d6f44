"""Reads and checks the flags of tokens and TLS. Rule: a flag that cannot be satisfied is an error that names it.

Messages never show a secret.
"""

import re
import ssl
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from lattice_server.config import ServerTls

TOKEN = "LATTICE_TOKEN"
MAX_TOKEN = 4096
PRINTABLE = re.compile(r"[!-~]+")


class SecurityError(Exception):
    """A flag or its file is wrong, or a flag is missing; the message names it."""


def read_token(path: Path | None, environment: Mapping[str, str]) -> str | None:
    """Return the token in a file, or else in the environment; None when neither is given. Raises SecurityError."""
    if path is None:
        if TOKEN not in environment:
            return None
        source, text = TOKEN, environment[TOKEN]
    else:
        source = f"--token-file {path}"
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise SecurityError(f"{source}: {_reason(error)}") from None
    if not text:
        raise SecurityError(f"{source}: it is empty, and an empty token is none")
    if len(text) > MAX_TOKEN:
        raise SecurityError(f"{source}: a token has at most {MAX_TOKEN} characters")
    if not PRINTABLE.fullmatch(text):
        raise SecurityError(f"{source}: a token is printable ASCII without spaces or line breaks")
    return text


def read_tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """Return the contents of the files if they match; None without files. Raises SecurityError."""
    if certificate is None and key is None:
        if client_ca is not None:
            raise SecurityError("--tls-ca makes callers show certificates: that needs --tls-cert and --tls-key")
        return None
    if certificate is None or key is None:
        given, missing = ("--tls-key", "--tls-cert") if certificate is None else ("--tls-cert", "--tls-key")
        raise SecurityError(f"{given} needs {missing}")
    pair, callers = f"--tls-cert {certificate} --tls-key {key}", f"--tls-ca {client_ca}"
    try:
        # Python would ask the terminal for the password of a key that has one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise SecurityError(f"{pair}: no certificate with its key, in PEM and unencrypted: {_reason(error)}") from None
    if client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(client_ca)
        except (OSError, ValueError) as error:
            raise SecurityError(f"{callers}: no certificates in PEM: {_reason(error)}") from None
    authority = None if client_ca is None else client_ca.read_bytes()
    return ServerTls(certificate.read_bytes(), key.read_bytes(), authority, (certificate, key, client_ca))


def check_exposure(host: str, tls: ServerTls | None, has_tokens: bool, *, is_allowed: bool) -> str | None:
    """Return a warning when serving on an address is unsafe but allowed. Raises SecurityError when it is not."""
    missing = [name for name, is_found in (("TLS", tls is not None), ("a token", has_tokens)) if not is_found]
    if is_loopback(host) or not missing:
        return None
    what = f"serving on {host} without {' and '.join(missing)}"
    if not is_allowed:
        flags = {"TLS": "--tls-cert and --tls-key", "a token": f"--tokens-file, --token-file or {TOKEN}"}
        wanted = ", and ".join(flags[name] for name in missing)
        raise SecurityError(f"{what} would let others run code here: give {wanted}, or --insecure to serve anyway")
    return f"{what}: everyone who reaches this address can run code here, or read the traffic of others"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return reason.lower().replace("_", " ") if isinstance(error, ssl.SSLError) else reason
