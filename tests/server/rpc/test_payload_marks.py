"""The level that produced a value, in messages."""

import pytest
from lattice.v1 import payload_pb2

from lattice_server.core.errors import InvalidError
from lattice_server.core.model import Artifact, Isolation, Payload
from lattice_server.rpc.convert.payloads import payload_from_proto, payload_to_proto


@pytest.mark.parametrize("level", list(Isolation))
@pytest.mark.parametrize("content", ["1", b"1", Artifact("a", 1, "n")])
def test_value_keeps_the_level_that_produced_it(content: str | bytes | Artifact, level: Isolation) -> None:
    payload = Payload("application/x", content, level)
    message = payload_pb2.Payload.FromString(payload_to_proto(payload).SerializeToString())
    assert payload_from_proto(message, "field", 100) == payload


def test_value_is_refused_when_its_level_is_unknown() -> None:
    message = payload_pb2.Payload(media_type="application/json", json="1", produced_at=99)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match="produced_at"):
        payload_from_proto(message, "field", 100)
