"""Owns the parts of a connection that run handles share. Rule: the handles of runs know these, and no client."""

from dataclasses import dataclass
from typing import Self

from lattice_client.graph.environment import Env
from lattice_client.runs.artifacts import Transfer
from lattice_client.runs.calls import Calls
from lattice_client.runs.reader import Reader
from lattice_client.runs.submission import Starter
from lattice_client.transport.channel import Channel
from lattice_client.transport.requests import check_seconds


@dataclass(frozen=True, slots=True)
class RunApi:
    """The calls of one server, grouped: payloads, starting runs, reading runs, and all others."""

    channel: Channel
    transfer: Transfer
    starter: Starter
    reader: Reader
    calls: Calls

    @classmethod
    def over(cls, channel: Channel, admission_timeout_s: float, trust_pickles: bool, env: Env) -> Self:
        """Return the calls over a channel; see `AsyncLatticeClient` for the settings."""
        check_seconds(admission_timeout_s, "admission_timeout")
        transfer = Transfer(channel, trust_pickles)
        starter = Starter(channel, transfer, admission_timeout_s, env)
        return cls(channel, transfer, starter, Reader(channel, transfer), Calls(channel))
