"""Owns the security of a connection: the address, TLS and the token.

Rule: a connection beyond this machine needs TLS and a token, unless the caller sets `insecure`.
"""

import functools
import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

import grpc

from lattice_client.errors import SecurityError, TargetError

log = logging.getLogger(__name__)

PLAIN_SCHEMES = ("http://", "grpc://")
TLS_SCHEMES = ("https://", "grpcs://")
RESOLVERS = ("dns:///", "dns:", "ipv4:", "ipv6:")
NAMED_RESOLVERS = re.compile(r"dns:(?://[^/]*/)?|ipv[46]:")
OTHER_RESOLVERS = re.compile("(?:unix|unix-abstract|vsock|xds|google-c2p):")
UNKNOWN_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
EXAMPLE = "such as 127.0.0.1:50051"
TLS_PORT = 443
MAX_PORT = 65535
# The hosts by which a server listens on all its addresses.
ANY = frozenset({"0.0.0.0", "[::]", "::", "*"})
# A name or an IPv4 address; in clusters names may have underscores.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PRINTABLE = re.compile(r"[!-~]+")
# The name of a tenant in UTF-8, percent-encoded, because headers are ASCII.
TENANT_HEADER = "lattice-tenant"


class SecurityOptions(TypedDict, total=False):
    """The security options of a connection. An option that is missing or None is read from the environment.

    Attributes:
        token: the token of the server, or of the caller; LATTICE_TOKEN.
        tls_ca: a PEM file with the authorities that may have signed the server's certificate; LATTICE_TLS_CA. Without
            it, a target `grpcs://host:port` trusts the authorities of this system.
        tls_cert: a PEM file with the client's certificate, for servers that require one; LATTICE_TLS_CERT.
        tls_key: the key of that certificate; LATTICE_TLS_KEY.
        insecure: allow a connection beyond this machine without TLS or a token; LATTICE_INSECURE=1.
    """

    token: str | None
    tls_ca: str | Path | None
    tls_cert: str | Path | None
    tls_key: str | Path | None
    insecure: bool | None


@dataclass(frozen=True, slots=True)
class Security:
    """How to connect to a server. Without `credentials` the connection is not encrypted.

    Calls are about `tenant` only, if there is one.
    """

    address: str
    credentials: grpc.ChannelCredentials | None
    token: str | None = field(repr=False)
    is_local: bool
    tenant: str

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers of each call."""
        token = None if self.token is None else f"Bearer {self.token}"
        found = {"authorization": token, TENANT_HEADER: quote(self.tenant)}
        return tuple((name, value) for name, value in found.items() if value)


def secure(
    target: str,
    *,
    tenant: str = "",
    token: str | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    insecure: bool | None = None,
) -> Security:
    """Return how to connect to a target; see `SecurityOptions`. The server finds resources of `tenant` only.

    Raises:
        TargetError: the target is not an address.
        SecurityError: the connection would not be secure.
    """
    token = token or os.environ.get("LATTICE_TOKEN") or None
    if token is not None and not isinstance(token, str):
        raise SecurityError(f"the token must be a text, not a {type(token).__name__}")
    if token is not None and not PRINTABLE.fullmatch(token):
        raise SecurityError("the token, or LATTICE_TOKEN, must be printable ASCII without spaces or line breaks")
    address, has_tls_scheme = _split(target)
    address = _checked(address, target, TLS_PORT if has_tls_scheme else None)
    is_local = is_on_this_machine(address)
    credentials = None
    if not address.startswith("unix:"):
        authority = tls_ca or os.environ.get("LATTICE_TLS_CA")
        certificate = tls_cert or os.environ.get("LATTICE_TLS_CERT")
        key = tls_key or os.environ.get("LATTICE_TLS_KEY")
        if has_tls_scheme or authority or certificate or key:
            credentials = _credentials(authority, certificate, key)
    missing = [name for name, found in (("TLS", credentials), ("a token", token)) if found is None]
    if missing and not is_local:
        if not (os.environ.get("LATTICE_INSECURE") == "1" if insecure is None else insecure):
            ways = {
                "TLS": "LATTICE_TLS_CA (tls_ca) to its authority's certificate, or the target to grpcs://host:port",
                "a token": "LATTICE_TOKEN (token) to its token",
            }
            wanted = ", and ".join(ways[name] for name in missing)
            text = f"{address} is not this machine and would be dialled without {' and '.join(missing)}: set {wanted}"
            raise SecurityError(f"{text}; LATTICE_INSECURE=1 (insecure) dials it anyway")
        _warn(address, " and ".join(missing))
    return Security(address, credentials, token, is_local, tenant)


def is_on_this_machine(address: str) -> bool:
    """Whether an address, as gRPC resolves it, certainly belongs to this machine."""
    if address.startswith("unix:"):
        return True
    for prefix in RESOLVERS:
        if address.startswith(prefix):
            address = address.removeprefix(prefix)
            break
    # Several colons without brackets are an address without a port.
    host = address if address.count(":") > 1 and not address.startswith("[") else re.sub(r":\d+$", "", address)
    try:
        return host == "localhost" or ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _checked(address: str, target: str, default_port: int | None) -> str:
    """Return an address with a host and a port, where gRPC would otherwise assume a port. Raises TargetError."""
    if OTHER_RESOLVERS.match(address):
        return address
    prefix = found.group() if (found := NAMED_RESOLVERS.match(address)) else ""
    endpoints = address.removeprefix(prefix).split(",") if prefix else [address]
    return prefix + ",".join(_endpoint(endpoint, target, default_port) for endpoint in endpoints)


def _endpoint(endpoint: str, target: str, default_port: int | None) -> str:
    """Return `host:port`. Raises TargetError."""
    if endpoint.count(":") > 1 and not endpoint.startswith("["):
        raise TargetError(f"the target {target!r} has colons in its host: write an IPv6 address as [::1]:50051")
    host, colon, port = endpoint.rpartition(":") if not endpoint.endswith("]") else (endpoint, "", "")
    if not colon:
        host = endpoint
        if default_port is None or not host:
            raise TargetError(f"the target {target!r} has no port: write host:port, {EXAMPLE}")
        port = str(default_port)
    if not host:
        raise TargetError(f"the target {target!r} has no host: write host:port, {EXAMPLE}")
    if not (port.isascii() and port.isdigit() and len(port) <= len(str(MAX_PORT)) and 0 < int(port) <= MAX_PORT):
        raise TargetError(f"the target {target!r} has port {port!r}: a port is a number from 1 to {MAX_PORT}")
    if host in ANY:
        way = f"127.0.0.1:{port} leads to a server on this machine"
        raise TargetError(f"the target {target!r} is an address to listen on, not to connect to: {way}")
    if not _is_host(host):
        text = f"has the host {host!r}, which is neither a name nor an address"
        raise TargetError(f"the target {target!r} {text}: write host:port, {EXAMPLE} or [::1]:50051")
    return f"{host}:{port}"


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return NAME.fullmatch(host) is not None
    try:
        return host.endswith("]") and ip_address(host[1:-1]).version == 6
    except ValueError:
        return False


def _split(target: str) -> tuple[str, bool]:
    if not isinstance(target, str):
        raise TargetError(f"a target must be a text, host:port, {EXAMPLE}, not a {type(target).__name__}")
    target = target.strip()
    if not PRINTABLE.fullmatch(target):
        raise TargetError(f"the target {target!r} is no address: write host:port, {EXAMPLE}")
    for scheme in (*PLAIN_SCHEMES, *TLS_SCHEMES):
        if target.startswith(scheme):
            return target.removeprefix(scheme).rstrip("/"), scheme in TLS_SCHEMES
    if (found := UNKNOWN_SCHEME.match(target)) and not (NAMED_RESOLVERS.match(target) or OTHER_RESOLVERS.match(target)):
        known = ", ".join([*PLAIN_SCHEMES[::-1], *TLS_SCHEMES[::-1], "unix:"])
        text = f"has the scheme {found.group(1)!r}, which is not known: host:port needs none; known are {known}"
        raise TargetError(f"the target {target!r} {text}")
    return target.rstrip("/"), False


def _credentials(
    authority: str | Path | None, certificate: str | Path | None, key: str | Path | None
) -> grpc.ChannelCredentials:
    if (certificate is None) != (key is None):
        given, missing = ("KEY", "CERT") if certificate is None else ("CERT", "KEY")
        raise SecurityError(f"LATTICE_TLS_{given} (tls_{given.lower()}) needs LATTICE_TLS_{missing}")
    # gRPC reports a wrong file only with the first call, and without the cause.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except (OSError, ValueError, TypeError) as error:
            raise SecurityError(f"LATTICE_TLS_CA (tls_ca) {authority}: no certificates in PEM: {error}") from None
    if certificate is not None and key is not None:
        try:
            context.load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ValueError, TypeError) as error:
            names = f"LATTICE_TLS_CERT (tls_cert) {certificate}, LATTICE_TLS_KEY (tls_key) {key}"
            raise SecurityError(f"{names}: no certificate with its key, in PEM and unencrypted: {error}") from None
    read = [None if path is None else Path(path).read_bytes() for path in (authority, key, certificate)]
    return grpc.ssl_channel_credentials(*read)


@functools.cache
def _warn(address: str, missing: str) -> None:
    text = "%s is dialled without %s: others can read the messages, or answer instead of the server"
    log.warning(text, address, missing)
