"""Clients of two tenants: names of resources are those of the client's own tenant, on a server without tokens too."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from lattice_client import LatticeClient, NotFoundError, task
from tests.e2e.rooms import WAIT_S

NAME = "gpt"
NAMES = (f"red {uuid4().hex}", f"grün & blau/{uuid4().hex}")


@pytest.fixture
def tenants(address: str) -> Iterator[list[LatticeClient]]:
    """Two clients, each of which has a model by the same name; the name of the second tenant is not ASCII."""
    clients = [LatticeClient(address, tenant=name) for name in NAMES]
    for client in clients:
        client.llm.start(NAME, base_url="http://127.0.0.1:9/v1")
    yield clients
    for client in clients:
        client.services.stop(NAME, timeout=WAIT_S)
        client.close()


@task(cpu=0.01)
def ready() -> str:
    return "ready"


def test_services_are_those_of_the_tenant(tenants: list[LatticeClient]) -> None:
    red, green = tenants
    assert [service.spec.name for service in red.services.list()] == [NAME]
    for _ in range(2):  # The second time there is none left.
        red.services.stop(NAME, timeout=WAIT_S)
    assert red.services.list() == []
    with pytest.raises(NotFoundError):
        red.services.get(NAME)
    assert [service.spec.name for service in green.services.list()] == [NAME]


def test_runs_are_those_of_the_tenant(tenants: list[LatticeClient], client: LatticeClient) -> None:
    for one in tenants:
        workflow = one.create_workflow()
        workflow.add_task(ready)
        run = workflow.run(run_id="same")
        assert run.result(timeout=WAIT_S) == {"result": "ready"}
    for one, name in zip(tenants, NAMES, strict=True):
        assert [(found.run_id, found.tenant) for found in one.list_runs()] == [("same", name)]
    assert set(NAMES) <= {found.tenant for found in client.list_runs() if found.run_id == "same"}
    tenants[0].delete_run("same")
    with pytest.raises(NotFoundError):
        tenants[0].get_run("same").status()
    assert tenants[1].get_run("same").status() == "succeeded"
