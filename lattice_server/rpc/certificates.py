"""Owns the server's certificate. Rule: a new one is used from the next handshake on, and connections stay open."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from lattice_server.config import ServerTls
from lattice_server.security import SecurityError, read_tls
from lattice_server.watching import changes

log = logging.getLogger(__name__)


class Certificates:
    """The server's certificate with its key, and the authority of callers' certificates."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._is_new = False

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials that gRPC serves with."""
        is_asking = self._tls.client_ca is not None
        # None means no change; the type stubs lack it.
        fetch: Callable[[], Any] = self._fetch
        return grpc.dynamic_ssl_server_credentials(_configuration(self._tls), fetch, is_asking)

    async def reload_on_change(self) -> None:
        """Read the files again whenever one of them changes; never returns. Files that do not match are not used."""
        await asyncio.gather(
            *(self._reload_on_change(number) for number, file in enumerate(self._tls.files) if file is not None)
        )

    async def _reload_on_change(self, number: int) -> None:
        file = self._tls.files[number]
        assert file is not None
        try:
            async for _ in changes(file):
                self._read()
        except OSError as error:
            log.error("%s cannot be watched: %s", file, error.strerror)
        log.error("%s is no longer watched; restart the server to watch it", file)

    def _read(self) -> None:
        certificate, key, client_ca = self._tls.files
        try:
            found = read_tls(certificate, key, client_ca)
        except SecurityError as error:
            # The two files of a pair are written one after the other.
            log.warning("%s; the certificate stays as it was", error)
            return
        except Exception:
            log.exception("%s cannot be read; the certificate stays as it was", certificate)
            return
        if found is not None and found != self._tls:
            log.info("using a new certificate from %s", certificate)
            self._tls, self._is_new = found, True

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new certificate, once; called for each handshake by a thread of gRPC's, which must not wait."""
        if not self._is_new:
            return None
        self._is_new = False
        return _configuration(self._tls)


def _configuration(tls: ServerTls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], tls.client_ca)
