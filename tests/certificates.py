"""Certificates made up for a test: an authority that signed a server's and a caller's, and one that signed nothing."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Files in PEM."""

    ca: Path
    cert: Path
    key: Path
    caller_cert: Path
    caller_key: Path
    stranger_ca: Path


def certificates(folder: Path, *server_names: str) -> Certificates:
    """Make certificates in a folder, the server's for these names, or for this machine."""
    names = ("ca", "cert", "key", "caller_cert", "caller_key", "stranger_ca")
    found = Certificates(*(folder / f"{name}.pem" for name in names))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(found.ca)
    trustme.CA().cert_pem.write_to_path(found.stranger_ca)
    server, caller = (
        authority.issue_cert(*(server_names or ("127.0.0.1", "localhost"))),
        authority.issue_cert("caller@example.org"),
    )
    for issued, cert, key in ((server, found.cert, found.key), (caller, found.caller_cert, found.caller_key)):
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
    return found
