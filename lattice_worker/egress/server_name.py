"""The server that a TLS client asks for. Rule: OpenSSL reads the hello; nothing is answered."""

import ssl

HANDSHAKE = 0x16  # The first byte of a TLS connection.
MAX_HELLO_BYTES = 64 * 1024


class HelloError(Exception):
    """The client sent no TLS hello; the message says why."""


class HelloReader:
    """Reads the first message of a TLS client piece by piece."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._is_read = False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = self._take
        self._incoming = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, ssl.MemoryBIO(), server_side=True)
        self._size = 0

    def _take(self, _tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        self._name, self._is_read = name, True
        return ssl.ALERT_DESCRIPTION_USER_CANCELLED  # Ends the handshake here.

    def feed(self, data: bytes) -> str | None:
        """Take the next bytes of the client; return the server in its TLS hello once that is known, empty for none.

        Raises HelloError.
        """
        self._size += len(data)
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            if self._size > MAX_HELLO_BYTES:
                raise HelloError("the first TLS message is too long") from None
            return None
        except ssl.SSLError as error:
            if not self._is_read:
                raise HelloError(f"no TLS hello: {error.reason or error}") from None
        return (self._name or "").lower().removesuffix(".")
