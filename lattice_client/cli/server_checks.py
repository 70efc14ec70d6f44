"""Owns the checks of a server from here: its address, TLS, token, versions and clock. Rule: they change nothing."""

import asyncio
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import metadata

from lattice.v1 import cluster_pb2

from lattice_client.cli.findings import ERROR, OK, SKIPPED, WARNING, Finding
from lattice_client.cli.groups import DISTRIBUTION
from lattice_client.cli.options import Server
from lattice_client.client import AsyncLatticeClient
from lattice_client.errors import LatticeError, SecurityError, TargetError
from lattice_client.transport.channel import dial
from lattice_client.transport.security import Security

CONNECT_S, ANSWER_S = 5.0, 15.0
# The version of the protocol that this client speaks.
PROTOCOL_VERSION = 1
MAX_CLOCK_DIFFERENCE_S = 2.0
MIN_CERTIFICATE_DAYS = 14.0
FULL = 0.9
ENDPOINT = re.compile(r"(?P<host>\[[^\]]+\]|[^:/]+):(?P<port>\d+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's description of itself, and the times here before and after the call, in seconds since 1970."""

    info: cluster_pb2.GetServerInfoResponse
    sent_s: float
    received_s: float


async def connection_checks(server: Server) -> AsyncIterator[Finding]:
    """Yield the findings about the connection to a server, up to the first error."""
    try:
        dialled = dial(server.target, **server.security())
    except (TargetError, SecurityError) as error:
        yield Finding("server", "address", ERROR, str(error), "name the server with --addr or LATTICE_TARGET")
        return
    yield Finding("server", "address", OK, f"{dialled.address}, {_manner(dialled)}")
    if (endpoint := ENDPOINT.fullmatch(dialled.address)) is None:
        return
    host, port = endpoint["host"].strip("[]"), int(endpoint["port"])
    found = await asyncio.to_thread(_port_check, host, port)
    yield found
    if found.status == OK and dialled.credentials is not None:
        yield await asyncio.to_thread(_certificate_check, host, port, server.tls_ca)


def _manner(dialled: Security) -> str:
    parts = ["with TLS" if dialled.credentials is not None else "without TLS"]
    parts.append("with a token" if dialled.token is not None else "without a token")
    return ", ".join(parts)


def _port_check(host: str, port: int) -> Finding:
    try:
        with socket.create_connection((host, port), CONNECT_S):
            return Finding("server", "port", OK, f"something listens at {host}:{port}")
    except socket.gaierror as error:
        advice = "check the host name in --addr or LATTICE_TARGET, and this machine's DNS"
        return Finding("server", "port", ERROR, f"the host {host!r} has no address: {error.strerror}", advice)
    except ConnectionRefusedError:
        advice = "start a server there with `lattice start --head`, or name another with --addr or LATTICE_TARGET"
        return Finding("server", "port", ERROR, f"nothing listens at {host}:{port}", advice)
    except OSError as error:
        advice = "check the route and the firewalls between this machine and the server"
        return Finding("server", "port", ERROR, f"{host}:{port} cannot be reached: {error}", advice)


def _certificate_check(host: str, port: int, tls_ca: str | None) -> Finding:
    """Check the certificate of a server, of which gRPC would name no dates."""
    authority = tls_ca or os.environ.get("LATTICE_TLS_CA") or None
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    certificate, key = os.environ.get("LATTICE_TLS_CERT"), os.environ.get("LATTICE_TLS_KEY")
    if certificate and key:
        context.load_cert_chain(certificate, key)
    try:
        with (
            socket.create_connection((host, port), CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            found = secured.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        advice = f"let LATTICE_TLS_CA name the authority of a certificate for {host}"
        text = f"the server's certificate is not accepted: {error.verify_message}"
        return Finding("server", "certificate", ERROR, text, advice)
    except ssl.SSLError as error:
        advice = "the server may serve without TLS: unset LATTICE_TLS_CA, or start it with --tls-cert and --tls-key"
        return Finding("server", "certificate", ERROR, f"no TLS connection: {error.reason or error}", advice)
    except OSError as error:
        return Finding("server", "certificate", ERROR, f"the TLS connection broke: {error}", "see the server's log")
    days = (ssl.cert_time_to_seconds(str(found["notAfter"])) - time.time()) / 86400
    text = f"it is accepted, and valid for {days:.0f} more days"
    if days < MIN_CERTIFICATE_DAYS:
        return Finding("server", "certificate", WARNING, text, "replace it; a server reads a new file by itself")
    return Finding("server", "certificate", OK, text)


async def ask(client: AsyncLatticeClient) -> Answer | Finding:
    """Return the server's description of itself, or why there is none."""
    sent_s = time.time()
    try:
        async with asyncio.timeout(ANSWER_S):
            info = await client.server_info()
    except TimeoutError:
        advice = "it may be overloaded, or the port may be that of another program: see its log"
        return Finding("server", "answer", ERROR, f"no answer within {ANSWER_S:.0f} s", advice)
    except LatticeError as error:
        advice = getattr(error, "advice", "")
        text = str(error).removesuffix(f"; {advice}")
        return Finding("server", "answer", ERROR, text, advice or "see the server's log")
    return Answer(info, sent_s, time.time())


def answer_checks(answer: Answer) -> list[Finding]:
    """Return the findings about the versions, the clock and the stores in the server's description of itself."""
    info = answer.info
    took_ms = (answer.received_s - answer.sent_s) * 1000
    text = f"answered in {took_ms:.0f}ms: {info.executor} executor, process {info.pid}"
    return [
        Finding("server", "answer", OK, text),
        _version_check(info),
        clock_check(answer),
        *(_store_check(store) for store in info.stores),
    ]


def _version_check(info: cluster_pb2.GetServerInfoResponse) -> Finding:
    try:
        own = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        own = "unknown"
    text = f"server {info.version}, client {own}; protocol {info.protocol_version}"
    if info.protocol_version > PROTOCOL_VERSION:
        advice = f"install version {info.version} of the client: pip install {DISTRIBUTION}=={info.version}"
        return Finding("server", "version", ERROR, f"{text}, and this client speaks {PROTOCOL_VERSION}", advice)
    if info.version != own:
        advice = "versions of one protocol work together; tasks behave most alike with equal versions"
        return Finding("server", "version", WARNING, text, advice)
    return Finding("server", "version", OK, text)


def clock_check(answer: Answer) -> Finding:
    """Compare the clocks: the server read its own one at some time between the call and the answer."""
    if not answer.info.HasField("current_time"):
        return Finding("server", "clock", SKIPPED, "the server does not tell its time", "update the server")
    theirs_s = answer.info.current_time.ToNanoseconds() / 1e9
    ahead_s = theirs_s - answer.received_s if theirs_s > answer.received_s else min(0.0, theirs_s - answer.sent_s)
    if abs(ahead_s) <= MAX_CLOCK_DIFFERENCE_S:
        shown = "agrees with this one" if not ahead_s else f"is off by {abs(ahead_s) * 1000:.0f}ms"
        return Finding("server", "clock", OK, f"the server's clock {shown}")
    way = "ahead of" if ahead_s > 0 else "behind"
    text = f"the server's clock is at least {abs(ahead_s):.1f} s {way} this one"
    advice = "synchronise both by NTP: times of runs, and the expiry of tokens and certificates, depend on it"
    return Finding("server", "clock", WARNING, text, advice)


def _store_check(store: cluster_pb2.StoreUsage) -> Finding:
    share = store.used_bytes / store.limit_bytes if store.limit_bytes else 0.0
    text = f"{share:.0%} of {store.limit_bytes / 2**20:.0f} MiB are used"
    if share < FULL:
        return Finding("server", f"store of {store.name}", OK, text)
    advice = "docs/limits.md says which setting of the server bounds it, and what is deleted when it is full"
    return Finding("server", f"store of {store.name}", WARNING, text, advice)
