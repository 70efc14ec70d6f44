"""Spare sealed processes: handed out once, by policy."""

import asyncio
import dataclasses

import pytest

from lattice_worker.sandbox import spares
from lattice_worker.sandbox.policy import SECCOMP, SUBPROCESS, Policy, policy_of
from lattice_worker.sandbox.spares import Spares
from lattice_worker.sandbox.supervisor import SandboxError
from tests.worker.processes import settle


class Fake:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.is_fit = True

    def kill(self) -> None:
        self.is_fit = False


class Makes:
    def __init__(self) -> None:
        self.made: list[Fake] = []
        self.error: Exception | None = None

    async def __call__(self, policy: Policy) -> Fake:
        if self.error is not None:
            raise self.error
        self.made.append(Fake(policy))
        return self.made[-1]


ONE, OTHER = policy_of(SECCOMP), policy_of(SUBPROCESS)


def test_spare_is_never_handed_out_twice() -> None:
    async def scenario() -> list[Fake]:
        waiting = Spares(make := Makes(), 1)
        taken = [await waiting.take(ONE) for _ in range(3)]
        await settle(lambda: len(make.made) > len(taken))
        taken += [await waiting.take(ONE), await waiting.take(OTHER)]
        waiting.close()
        return taken

    taken = asyncio.run(scenario())
    assert len({id(process) for process in taken}) == 5
    assert [process.policy for process in taken] == [ONE] * 4 + [OTHER]


def test_spare_is_of_an_equal_policy() -> None:
    async def scenario() -> None:
        waiting = Spares(Makes(), 1)
        waiting.add(ONE, spare := Fake(ONE))
        assert waiting.take_waiting(dataclasses.replace(ONE, read_paths=("/other",))) is None
        assert waiting.take_waiting(dataclasses.replace(ONE)) is spare
        assert waiting.take_waiting(ONE) is None
        waiting.close()

    asyncio.run(scenario())


def test_spare_is_not_handed_out_when_it_has_died() -> None:
    async def scenario() -> None:
        waiting = Spares(Makes(), 1)
        waiting.add(ONE, spare := Fake(ONE))
        spare.kill()
        assert waiting.take_waiting(ONE) is None
        waiting.close()

    asyncio.run(scenario())


def test_spares_end_when_their_policy_is_idle_or_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        waiting = Spares(Makes(), 1)
        waiting.add(ONE, one := Fake(ONE))
        waiting.add(OTHER, other := Fake(OTHER))
        waiting.drop(lambda policy: policy == OTHER)
        assert (one.is_fit, other.is_fit) == (True, False)
        monkeypatch.setattr(spares, "IDLE_S", 0.0)
        waiting.add(ONE, Fake(ONE))
        await settle(lambda: not one.is_fit)
        assert waiting.take_waiting(ONE) is None
        waiting.close()

    asyncio.run(scenario())


def test_spares_of_the_least_recently_used_policy_are_evicted_over_the_limit() -> None:
    async def scenario() -> list[bool]:
        waiting = Spares(Makes(), 1)
        policies = [dataclasses.replace(ONE, memory_bytes=number) for number in range(spares.MAX_POLICIES + 1)]
        made = [Fake(policy) for policy in policies]
        for policy, process in zip(policies[:-1], made[:-1], strict=True):
            waiting.add(policy, process)
        waiting.add(policies[0], Fake(policies[0]))
        waiting.add(policies[-1], made[-1])
        found = [process.is_fit for process in made]
        waiting.close()
        return found

    assert asyncio.run(scenario()) == [True, False, *[True] * (spares.MAX_POLICIES - 1)]


def test_attempt_that_finds_no_spare_does_not_compete_with_the_next_spare() -> None:
    async def scenario() -> list[int]:
        async def start(policy: Policy) -> Fake:
            nonlocal starting
            starting += 1
            found.append(starting)
            await asyncio.sleep(0)
            starting -= 1
            return Fake(policy)

        found: list[int] = []
        starting = 0
        waiting = Spares(start, 1)
        await waiting.take(ONE)
        await settle(lambda: len(found) == 2)
        waiting.close()
        return found

    assert asyncio.run(scenario()) == [1, 1]


def test_error_reaches_the_attempt_when_no_sandbox_can_be_made() -> None:
    async def scenario() -> None:
        waiting = Spares(make := Makes(), 1)
        make.error = SandboxError("no")
        with pytest.raises(SandboxError):
            await waiting.take(ONE)
        waiting.close()

    asyncio.run(scenario())
