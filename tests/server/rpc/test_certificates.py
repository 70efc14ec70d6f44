"""A certificate that is replaced while a server runs: which callers see, and which connections stay."""

import shutil
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from lattice.v1 import cluster_pb2

from lattice_server.security import read_tls
from tests.certificates import Certificates, certificates
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller

WITHIN_S = 20.0
FILES = ("cert", "key", "ca")


@dataclass
class Scene:
    """A server, its files, and two sets of certificates of two authorities."""

    address: str
    folder: Path
    old: Certificates
    new: Certificates

    def copy(self, source: Certificates, *names: str) -> None:
        """Put files in the place of those there are."""
        for name in names:
            draft = self.folder / f"{name}.new"
            shutil.copy(getattr(source, name), draft)
            draft.replace(self.folder / f"{name}.pem")

    def shown(self) -> bytes:
        """Return the certificate that a new connection is shown, in PEM."""
        host, _, port = self.address.rpartition(":")
        return ssl.get_server_certificate((host, int(port)), timeout=WITHIN_S).encode()

    def shows(self, wanted: Certificates) -> bool:
        """Whether a set's certificate is shown soon."""
        deadline = time.monotonic() + WITHIN_S
        while not (found := first(wanted.cert.read_bytes()) == first(self.shown())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def first(chain: bytes) -> str:
    """Return the first certificate of a chain, in DER."""
    end = b"-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert((chain.partition(end)[0] + end).decode().strip() + "\n").hex()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A server with TLS."""
    folders = [tmp_path / name for name in ("old", "new", "served")]
    for folder in folders:
        folder.mkdir()
    found = Scene("", folders[2], certificates(folders[0]), certificates(folders[1]))
    found.copy(found.old, *FILES)
    tls = read_tls(folders[2] / "cert.pem", folders[2] / "key.pem", None)
    with serving_aside(NoWorkers(), tls=tls) as found.address:
        yield found


def test_new_certificate_is_used_when_its_key_matches(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    trusted = grpc.ssl_channel_credentials(scene.old.ca.read_bytes())
    with grpc.secure_channel(scene.address, trusted) as channel:
        caller = Caller(channel)
        info = cluster_pb2.GetServerInfoRequest()
        assert caller.cluster.GetServerInfo(info).version
        assert scene.shows(scene.old)
        scene.copy(scene.new, "cert")
        deadline = time.monotonic() + WITHIN_S
        while "stays as it was" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        assert scene.shows(scene.old), "a certificate without its key is not shown"
        scene.copy(scene.new, "key")
        assert scene.shows(scene.new)
        assert caller.cluster.GetServerInfo(info).version
    with grpc.secure_channel(scene.address, grpc.ssl_channel_credentials(scene.new.ca.read_bytes())) as channel:
        assert Caller(channel).cluster.GetServerInfo(info, timeout=WITHIN_S, wait_for_ready=True).version
