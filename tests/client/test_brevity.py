"""How the result of a short run is asked for; what it is does not depend on it."""

from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import run_pb2

from lattice_client import LatticeClient, TaskFailedError, task
from lattice_client.brevity import BRIEF_S, MAX_KINDS, Brevity, Kind

KIND: Kind = (frozenset({"sha256:a"}), 1)


def ran(took_s: float) -> run_pb2.Run:
    """Return a run that took so many seconds."""
    end = Timestamp()
    end.FromNanoseconds(10**18 + int(took_s * 1e9))
    return run_pb2.Run(create_time=Timestamp(seconds=10**9), end_time=end)


def test_a_kind_is_brief_once_it_is_known_to_be() -> None:
    memory = Brevity()
    assert not memory.is_brief(KIND)
    memory.learn(KIND, ran(BRIEF_S / 2))
    assert memory.is_brief(KIND)
    memory.learn(KIND, ran(1.0))
    assert not memory.is_brief(KIND)


def test_only_so_many_kinds_are_remembered() -> None:
    memory = Brevity()
    for number in range(MAX_KINDS + 1):
        memory.learn((frozenset(), number), ran(0.0))
    assert not memory.is_brief((frozenset(), 0))
    assert memory.is_brief((frozenset(), MAX_KINDS))


def test_results_and_failures_are_the_same_however_they_come(address: str) -> None:
    @task
    def invert(x: int) -> float:
        return 1 / x

    def run(x: int) -> object:
        workflow = client.create_workflow()
        workflow.add_task(invert, {"x": x})
        try:
            return workflow.run().result(timeout=60)
        except TaskFailedError as error:
            return type(error.__cause__)

    with LatticeClient(address) as client:
        results = [run(x) for x in (1, 2, 0, 4) * 10]
    assert results == [{"result": 1.0}, {"result": 0.5}, ZeroDivisionError, {"result": 0.25}] * 10


def test_a_long_run_of_a_kind_that_was_short_is_waited_for_as_any_other(address: str) -> None:
    @task
    def nap(seconds: float) -> float:
        import time

        time.sleep(seconds)
        return seconds

    with LatticeClient(address) as client:
        for seconds in (0.0, 0.0, 0.0, 0.3):
            workflow = client.create_workflow()
            workflow.add_task(nap, {"seconds": seconds})
            run = workflow.run()
            assert run.result(timeout=60) == {"result": seconds}
            assert run.result() == {"result": seconds}, "a result can be asked for again"
            assert [event.type for event in run.events()][-1] == "run_finished"
