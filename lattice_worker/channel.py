"""Owns the worker's channel to its server. Rule: every call carries the token, and beyond this machine everything is
encrypted, unless a flag says otherwise."""

import asyncio
import functools
import logging
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import grpc

from lattice_worker.config import WorkerConfig

log = logging.getLogger(__name__)

MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    # Who opens it dials again by itself, soon; the channel's own pauses between tries grow to minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
PLAIN_SCHEMES = ("http://", "grpc://")
TLS_SCHEMES = ("https://", "grpcs://")
PRINTABLE = re.compile(r"[!-~]+")


class ChannelError(Exception):
    """The channel would not be safe, or not as safe as was asked."""


def check_cancelled() -> None:
    """Raise CancelledError if this task is being cancelled: gRPC swallows a cancellation while a call fails."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@asynccontextmanager
async def opened(config: WorkerConfig) -> AsyncIterator[grpc.aio.Channel]:
    """Hold a channel to the server while the block runs. Raises ChannelError."""
    address, credentials = check(config)
    # A connection to this machine must not go through a proxy on another one.
    options = [*OPTIONS, ("grpc.enable_http_proxy", int(not _is_on_this_machine(address)))]
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    async with channel:
        yield cast(grpc.aio.Channel, _Signed(channel, config.token)) if config.token else channel


def check(config: WorkerConfig) -> tuple[str, grpc.ChannelCredentials | None]:
    """Return the server's address, as gRPC reads it, and credentials unless it is plain. Raises ChannelError."""
    if config.token and not PRINTABLE.fullmatch(config.token):
        raise ChannelError("LATTICE_TOKEN must be printable ASCII without spaces or line breaks")
    address = config.target
    for scheme in (*PLAIN_SCHEMES, *TLS_SCHEMES):
        address = address.removeprefix(scheme)
    address = address.rstrip("/")
    if address.startswith("unix:"):
        return address, None
    asks_for_tls = config.tls_ca or config.tls_cert or config.tls_key or config.target.startswith(TLS_SCHEMES)
    credentials = _credentials(config) if asks_for_tls else None
    missing = [name for name, found in (("TLS", credentials), ("a token", config.token)) if not found]
    if missing and not _is_on_this_machine(address):
        without = " and ".join(missing)
        if not config.insecure:
            ways = {"TLS": "LATTICE_TLS_CA, or the address to grpcs://host:port", "a token": "LATTICE_TOKEN"}
            wanted = ", and ".join(ways[name] for name in missing)
            text = f"{address} is not this machine and would be dialled without {without}: set {wanted}"
            raise ChannelError(f"{text}; LATTICE_INSECURE=1 dials it anyway")
        _warn(address, without)
    return address, credentials


def _credentials(config: WorkerConfig) -> grpc.ChannelCredentials:
    if bool(config.tls_cert) != bool(config.tls_key):
        raise ChannelError("LATTICE_TLS_CERT and LATTICE_TLS_KEY need each other")
    # gRPC would say only when dialling that something is wrong, and not what.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if config.tls_ca:
            context.load_verify_locations(config.tls_ca)
    except (OSError, ValueError) as error:
        raise ChannelError(f"LATTICE_TLS_CA {config.tls_ca}: no certificates in PEM: {error}") from None
    try:
        if config.tls_cert:
            context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:
        names = f"LATTICE_TLS_CERT {config.tls_cert}, LATTICE_TLS_KEY {config.tls_key}"
        raise ChannelError(f"{names}: no certificate with its key, in PEM and unencrypted: {error}") from None
    paths = (config.tls_ca, config.tls_key, config.tls_cert)
    return grpc.ssl_channel_credentials(*(Path(path).read_bytes() if path else None for path in paths))


def _is_on_this_machine(address: str) -> bool:
    """Whether an address is known to be on this machine."""
    if address.startswith("unix:"):
        return True
    # Several colons without brackets are an address without a port.
    host = address if address.count(":") > 1 and not address.startswith("[") else re.sub(r":\d+$", "", address)
    try:
        return host == "localhost" or ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


@functools.cache
def _warn(address: str, without: str) -> None:
    log.warning("%s is dialled without %s: others may read the messages, or answer in its place", address, without)


class _Signed:
    """A channel for stubs, whose every call carries a token."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, kind: str) -> Any:
        make = getattr(self._channel, kind)
        return lambda *args, **kwargs: functools.partial(make(*args, **kwargs), metadata=self._metadata)
