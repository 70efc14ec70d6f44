"""The key of a gateway, and the certificate that the server gives it, for connections to gateways of other nodes.

Rule: both ends of such a connection have a certificate of the server's, and the key is in no file.
"""

import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

# A node that disappears is noticed after about IDLE_S and PROBES times INTERVAL_S.
IDLE_S, INTERVAL_S, PROBES = 5, 2, 3


class Identity:
    """The key of one gateway, and what its connections to other gateways are made with once it has a certificate."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(self._key, SHA256())
        self.request = made.public_bytes(Encoding.PEM).decode()
        self._certificate = self._authority = ""

    def take(self, certificate: str, authority: str) -> None:
        """Take the certificate, and that of the authority which signed it and those of all other gateways."""
        self._certificate, self._authority = certificate, authority

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        """Return how connections from other gateways are accepted, or how connections to them are made."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(cadata=self._authority)
        key = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        # Python's `ssl` takes a key from a file only: this one is in memory, and has no name.
        descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, self._certificate.encode() + key)
            made.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return made


def name_in(certificate: Mapping[str, Any] | None) -> str:
    """Return the name of the gateway at the other end of a connection; empty without a certificate."""
    names = () if certificate is None else certificate.get("subjectAltName", ())
    return next((name for kind, name in names if kind == "DNS"), "")


def keep_alive(connection: socket.socket) -> None:
    """Have a connection, or all connections that a socket accepts, break when the other machine no longer answers."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, IDLE_S), (socket.TCP_KEEPINTVL, INTERVAL_S)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
