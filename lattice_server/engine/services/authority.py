"""Owns the certificates by which gateways know each other. Rule: its key never leaves this process, and ends with it.

A certificate names one start of one gateway. A gateway asks the server about each certificate it is
shown, so that the certificate of an ended gateway is worth nothing.
"""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The clocks of machines differ; nothing is decided by the dates.
EARLIER, LATER = timedelta(days=2), timedelta(days=3650)
NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Lattice gateways")])


class Authority:
    """Signs the certificates of gateways."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        made = _builder(NAME, self._key.public_key())
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = made.sign(self._key, SHA256()).public_bytes(Encoding.PEM).decode()

    def sign(self, request: str, name: str) -> str:
        """Return the certificate of a gateway with such a name for its signing request, in PEM. Raises ValueError."""
        try:
            found = x509.load_pem_x509_csr(request.encode())
            is_valid, key = found.is_signature_valid, found.public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"this is no request for a certificate: {error}") from error
        if not is_valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("a request for a certificate has to be signed by its own key of an elliptic curve")
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        # Names and uses in the request are ignored.
        made = (
            _builder(x509.Name([]), key)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        )
        return made.sign(self._key, SHA256()).public_bytes(Encoding.PEM).decode()


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(NAME)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + LATER)
    )
