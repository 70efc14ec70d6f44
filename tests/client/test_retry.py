"""Retrying an ended run: only its unfinished tasks run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from lattice_client import LatticeClient, LatticeWorkflow, NotFoundError, PreconditionError, Run, TaskFailedError, task
from tests.client.shell import call

BAD = {3, 77, 150, 299}


@task
async def numbers(count: int) -> list[int]:
    return list(range(count))


@task
def work(number: int, folder: str) -> int:
    with open(Path(folder) / "started", "a", encoding="utf-8") as log:
        log.write(f"{number}\n")
    if number in BAD and not (Path(folder) / "mended").exists():
        raise ValueError(f"{number} is bad")
    return 2 * number


@task
def total(found: list[int], folder: str) -> int:
    with open(Path(folder) / "started", "a", encoding="utf-8") as log:
        log.write("total\n")
    return sum(found)


def started(folder: Path) -> list[str]:
    """Return the tasks started since the last call."""
    path = folder / "started"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


@pytest.fixture
def failed(client: LatticeClient, tmp_path: Path) -> Run:
    """A run in which 4 of 300 items of a map failed, with the reasons gone since."""
    workflow = client.create_workflow("retry", failure_policy="finish_independent")
    listed = workflow.add_task(numbers, {"count": 300})
    mapped = workflow.map(work, {"number": listed.output}, {"folder": str(tmp_path)})
    workflow.add_task(total, {"found": mapped.output, "folder": str(tmp_path)})
    run = workflow.run(labels={"kind": "retry"}, priority=2)
    with pytest.raises(TaskFailedError):
        run.result(timeout=60)
    assert len(started(tmp_path)) == 300
    (tmp_path / "mended").touch()
    return run


def test_only_unfinished_functions_start(failed: Run, tmp_path: Path, client: LatticeClient) -> None:
    again = failed.retry()
    assert again.result(timeout=60) == {"result": 2 * sum(range(300))}
    assert sorted(started(tmp_path)) == sorted([*map(str, BAD), "total"])
    about = client.describe_run(again)
    assert (about.retried_run_id, about.priority, dict(about.labels)) == (failed, 2, {"kind": "retry"})
    events = [event.type for event in again.events()]
    assert (events.count("task_started"), events.count("task_succeeded")) == (5, 303)
    assert again.output("work[5]") == 10
    with pytest.raises(TaskFailedError):
        failed.result()


def test_retry_starts_one_run_when_its_id_is_repeated(failed: Run, client: LatticeClient) -> None:
    name = f"{failed}-again"
    assert [client.retry_run(failed, name), client.retry_run(failed, name)] == [name, name]
    assert client.get_run(name).result(timeout=60) == {"result": 2 * sum(range(300))}


def test_the_command_retries_a_run(failed: Run, client: LatticeClient) -> None:
    done = call(client.target, "runs", "retry", failed, "--json")
    assert done.exit_code == 0
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["retried_run_id"] == failed
    assert client.get_run(found["run_id"]).result(timeout=60)
    told = call(client.target, "runs", "retry", failed).stdout
    assert told.endswith("shows it.\n")
    assert f"retries run {failed}" in told


def test_retry_raises_when_the_run_has_not_ended_or_does_not_exist(client: LatticeClient, waiting: Run) -> None:
    with pytest.raises(PreconditionError, match="is running; it can be retried when it has ended") as caught:
        waiting.retry()
    assert caught.value.reason == "RUN_NOT_ENDED"
    with pytest.raises(NotFoundError):
        client.retry_run("nothing")


def test_retry_takes_large_outputs_of_the_first_run(client: LatticeClient, tmp_path: Path) -> None:
    @task
    def make(folder: str) -> bytes:
        with open(Path(folder) / "started", "a", encoding="utf-8") as log:
            log.write("make\n")
        return b"x" * 3_000_000

    @task
    def size(data: bytes, folder: str) -> int:
        if not (Path(folder) / "mended").exists():
            raise ValueError
        return len(data)

    workflow: LatticeWorkflow = client.create_workflow()
    made = workflow.add_task(make, {"folder": str(tmp_path)})
    workflow.add_task(size, {"data": made.output, "folder": str(tmp_path)})
    run = workflow.run()
    with pytest.raises(TaskFailedError):
        run.result(timeout=60)
    (tmp_path / "mended").touch()
    assert run.retry().result(timeout=60) == {"result": 3_000_000}
    assert started(tmp_path) == ["make"]


def test_the_command_lists_runs_by_state_and_label(failed: Run, client: LatticeClient) -> None:
    again = failed.retry()
    again.result(timeout=60)

    def listed(*flags: str) -> list[str]:
        done = call(client.target, "runs", "list", "--json", *flags)
        assert done.exit_code == 0, done.stderr
        return [json.loads(line)["run_id"] for line in done.stdout.splitlines()]

    assert listed("--label", "kind=retry", "--limit", "2") == [again, failed]
    assert again not in listed("--label", "kind=retry", "--state", "failed", "--state", "cancelled")
    assert listed("--label", "kind=retry", "--label", "x=y") == []
    assert "is not KEY=VALUE" in call(client.target, "runs", "list", "--label", "kind").stderr
