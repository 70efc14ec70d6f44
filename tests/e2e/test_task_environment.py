"""The environment of tasks: plain variables and secrets, from client, workflow and server, and where no secret is."""

import asyncio
import os
import re
import resource
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from click.testing import CliRunner

from lattice_client import (
    InvalidArgumentError,
    LatticeClient,
    TaskDefinitionError,
    TaskFailedError,
    context,
    secret,
    task,
)
from lattice_client.cli.main import main
from tests.commands import START
from tests.e2e.net import starting
from tests.e2e.rooms import WAIT_S, Room, enter, entered
from tests.e2e.test_llms import SERVER as ENGINE
from tests.e2e.test_llms import post
from tests.e2e.test_restarts import Head

CANARY = "key-of-the-client"
SERVERS = "key-of-the-server"
# These are in no output of a task, since outputs are kept as they are.
UNTOLD, UNTOLD_OF_SERVER = "canary/4711/of-the-client", "canary/0815/of-the-server"
# What shows them: parts of them as they are, in a URL and in base64.
TRACES = (
    b"canary/4711",
    b"canary/0815",
    b"canary%2F",
    b"Y2FuYXJ5LzQ3MTEvb2Y",
    b"NhbmFyeS80NzExL29m",
    b"jYW5hcnkvNDcxMS9vZ",
)


@dataclass(frozen=True)
class Server:
    """A server with a journal, a secrets file, metrics and a log of all."""

    folder: Path
    address: str
    metrics_url: str
    process: "subprocess.Popen[str]"

    def log(self) -> bytes:
        return (self.folder / "log").read_bytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("environment")
    secrets = folder / "secrets.toml"
    secrets.write_text(f'[search]\nkey = "{SERVERS}"\nuntold = "{UNTOLD_OF_SERVER}"\n')
    secrets.chmod(0o600)
    flags = ["--executor", "local", "--num-cpus", "4", "--journal", str(folder / "journal"), "--secrets", str(secrets)]
    flags += ["--metrics", "prometheus", "--log-level", "debug"]
    with starting("local"), (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*START, "--head", "--port", "0", *flags], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
    address, url = (re.search(pattern, "".join(lines)) for pattern in (r"127\.0\.0\.1:\d+", r"http://\S+"))
    assert address
    assert url
    yield Server(folder, address.group(), url.group(), process)
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def search(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[LatticeClient]:
    """A client of the tenant `search`, whose process has the secret `CANARY`."""
    monkeypatch.setenv("CANARY", CANARY)
    with LatticeClient(server.address, tenant="search") as client:
        yield client


def seen(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


NAMES = ("WHO", "CITY", "KEY", "OWN")


@task(cpu=0.1, env={"OWN": "task", "KEY": secret("CANARY")})
def look(names: list[str]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def test_variables_of_client_workflow_and_task_add_up_and_the_nearest_wins(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", CANARY)
    with LatticeClient(server.address, tenant="search", env={"WHO": "client", "CITY": "client"}) as client:
        workflow = client.create_workflow(env={"CITY": "workflow", "OWN": "workflow"})
        workflow.add_task(look, {"names": list(NAMES)})
        found = workflow.run().result(timeout=WAIT_S)["result"]
        assert found == {"WHO": "client", "CITY": "workflow", "KEY": CANARY, "OWN": "task"}
        assert client.run_task(look, {"names": list(NAMES)})["result"]["WHO"] == "client"
        plain = client.run_task(task(cpu=0.1)(look.function), {"names": list(NAMES)})["result"]
        assert plain == {"WHO": "client", "CITY": "client", "KEY": None, "OWN": None}


@pytest.mark.parametrize("level", ["none", "subprocess", "seccomp"])
def test_a_task_has_its_secret_at_each_level_and_the_next_one_has_it_not(search: LatticeClient, level: str) -> None:
    with_secret = task(isolation=level, cpu=0.1, env={"KEY": secret("CANARY")})(look.function)
    without = task(isolation=level, cpu=0.1)(look.function)
    for _ in range(2):
        assert search.run_task(with_secret, {"names": ["KEY"]})["result"] == {"KEY": CANARY}
        assert search.run_task(without, {"names": ["KEY"]})["result"] == {"KEY": None}


def test_coroutines_with_different_environments_do_not_share_a_process(search: LatticeClient) -> None:
    async def read(number: int) -> list[Any]:
        await asyncio.sleep(0.1)
        return [os.environ.get("NUMBER"), os.getpid(), number]

    workflow = search.create_workflow()
    for number in range(3):
        workflow.add_task(task(env={"NUMBER": str(number)})(read), {"number": number}, task_id=f"t{number}")
    found = [one["result"] for one in workflow.run().result(timeout=WAIT_S).values()]
    assert [one[0] for one in found] == [str(one[2]) for one in found]
    assert len({one[1] for one in found}) == 3


def test_a_secret_of_the_server_is_for_its_tenant_only(server: Server, search: LatticeClient) -> None:
    wants = task(cpu=0.1, env={"KEY": secret("key")})(look.function)
    assert search.run_task(wants, {"names": ["KEY"]})["result"] == {"KEY": SERVERS}
    for tenant in ("", "other"):
        with (
            LatticeClient(server.address, tenant=tenant) as other,
            pytest.raises(InvalidArgumentError, match="no secret 'key'"),
        ):
            other.run_task(wants, {"names": ["KEY"]})
    # The value of one run's caller is not another run's.
    with (
        LatticeClient(server.address, tenant="search") as again,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("CANARY")
        with pytest.raises(InvalidArgumentError, match="no secret 'CANARY'"):
            again.run_task(look, {"names": ["KEY"]})


OF_SERVER = {"LANG": "C.UTF-8", "TZ": "UTC", "PROVIDER_KEY": "x", "LATTICE_OWN": "y", "HOME": "/"}
OF_EACH_TASK = {"PATH", "LANG", "TZ", "LATTICE_WORKER_ID", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HOME"}
OF_SANDBOXES = {"TMPDIR", "USER", "LOGNAME"}
THREADS = {f"{library}_NUM_THREADS" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


def test_a_task_has_the_variables_that_its_documentation_names(short_path: Path) -> None:
    env = OF_SERVER | {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(short_path)}
    command = [*START, "--head", "--port", "0", "--executor", "local", "--num-cpus", "1"]
    with starting("local"):
        server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().strip().rpartition(" ")[2]

    def variables() -> dict[str, str]:
        return dict(os.environ)

    try:
        with LatticeClient(address) as client:
            found = {
                level: client.run_task(task(isolation=level)(variables), {})["result"]
                for level in ("none", "subprocess", "seccomp")
            }
    finally:
        server.terminate()
        server.wait(30)
    # gRPC's is a setting of the worker's own.
    of_worker = {"PROVIDER_KEY", "XDG_RUNTIME_DIR", "GRPC_VERBOSITY"}
    assert found["none"].keys() == OF_EACH_TASK | {"LATTICE_TARGET"} | of_worker
    assert (found["none"]["LATTICE_TARGET"], found["none"]["CUDA_VISIBLE_DEVICES"]) == (address, "")
    for level in ("subprocess", "seccomp"):
        assert found[level].keys() == OF_EACH_TASK | OF_SANDBOXES | THREADS
        assert (found[level]["USER"], found[level]["OMP_NUM_THREADS"]) == ("task", "1")


@task(cpu=0.1, env={"KEY": secret("UNTOLD"), "SERVERS": secret("untold")})
def tell(room: str) -> str:
    import base64
    import json
    import resource
    import subprocess
    from urllib.parse import quote

    value = os.environ["KEY"]
    print(f"the key is {value}, quoted {quote(value)}, in JSON {json.dumps([value])}")
    print(base64.b64encode(b"x" + value.encode()).decode())
    print(value[:9], end="", flush=True)
    print(value[9:], flush=True)
    os.write(2, f"raw {value} and {os.environ['SERVERS']}\n".encode())
    subprocess.run(["sh", "-c", "echo child $KEY"], check=True)
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
    enter(room, "tell")
    raise ValueError(f"refused: {value}")


def shown_of_processes(server: Server, *names: str) -> list[str]:
    """Return files of this name below /proc of all processes that the server started and that have not ended."""
    found = []
    for one in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [Path(f"/proc/{one.pid}/{name}").read_bytes().decode(errors="replace") for name in names]
    assert found
    return found


def test_server_stores_shows_and_writes_no_secret(
    server: Server, search: LatticeClient, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTOLD", UNTOLD)
    workflow = search.create_workflow("named")
    workflow.add_task(tell, {"room": room})
    stored = workflow.store()
    run = workflow.run()
    entered(run, "tell")
    texts = [
        *(str(one) for one in (search.describe_run(run), search.explain(run, "tell"), search.run_graph(run))),
        *(str(one) for one in (search.list_tasks(run, with_outputs=True), search.list_runs(), search.nodes())),
        *(str(one) for one in (search.list_workflows(), search.server_info(), stored)),
        urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode(),
    ]
    # What `ps` shows of the processes of the server, and of their environments.
    texts += shown_of_processes(server, "cmdline", "environ", "comm")
    room.open()
    with pytest.raises(TaskFailedError) as caught:
        run.result(timeout=WAIT_S)
    assert caught.value.kind == "USER_ERROR"
    assert "ValueError: refused: ***" in str(caught.value)
    texts += [str(caught.value), repr(caught.value.__cause__)]
    events = list(run.events())
    texts += [str(event) for event in events]
    written = "".join(event.data.get("text", "") for event in events if event.type == "task_log")
    assert "the key is ***, quoted ***, in JSON" in written
    assert "child ***" in written
    assert "raw *** and ***" in written
    for text in (*texts, written):
        assert not [found for found in TRACES if found in text.encode()], text[:300]
    for path in server.folder.rglob("*"):
        if path.is_file() and path.name != "secrets.toml":
            assert not [found for found in TRACES if found in path.read_bytes()], path


@task(cpu=0.1)
def ask_provider(room: str) -> list[Any]:
    found = context.llm("gpt")
    answer = post(found.base_url, found.api_key, "chat/completions", {"model": "gpt", "messages": [{"content": "who"}]})
    enter(room, "asked")
    return [found.base_url, found.api_key, *answer]


def test_keys_of_models_and_secrets_of_services_are_stored_and_shown_nowhere(
    server: Server, search: LatticeClient, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTOLD", UNTOLD)
    engine = [sys.executable, ENGINE, "{host}", "{port}"]
    settings: dict[str, Any] = {"cpu": 0.1, "timeout": WAIT_S}
    (instance,) = search.llm.start("tiny", command=engine, env={"KEY": secret("UNTOLD")}, **settings).instances
    url = f"http://{instance.endpoint}/v1"
    search.llm.start("gpt", base_url=url, api_key=secret("UNTOLD"), requests_per_minute=60, timeout=WAIT_S)
    workflow = search.create_workflow()
    workflow.add_task(ask_provider, {"room": room})
    run = workflow.run()
    entered(run, "ask_provider")
    texts = [str(search.llm.list()), str(search.services.get("gpt")), str([*search.services.logs("tiny")])]
    for run_id in (instance.run_id, str(run)):
        texts += [str(search.describe_run(run_id)), str(search.run_graph(run_id)), str(search.list_tasks(run_id))]
    texts.append(urllib.request.urlopen(server.metrics_url, timeout=WAIT_S).read().decode())
    texts += shown_of_processes(server, "cmdline")
    room.open()
    base_url, _, status, answer = run.result(timeout=WAIT_S)["result"]
    assert status == 200
    # No process that has one leaves a core file: the engine and the gateway, by the ports on which they listen.
    for port in (int(instance.endpoint.rpartition(":")[2]), urlsplit(base_url).port):
        (owner,) = {
            one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port
        }
        assert resource.prlimit(owner, resource.RLIMIT_CORE) == (0, 0)
    for text in (*texts, answer):
        assert not [found for found in TRACES if found in text.encode()], text[:300]
    for path in server.folder.rglob("*"):
        if path.is_file() and path.name != "secrets.toml":
            assert not [found for found in TRACES if found in path.read_bytes()], path
    # A task of another tenant has neither the model nor its key.
    with (
        LatticeClient(server.address, tenant="other") as other,
        pytest.raises(TaskFailedError, match="there is no service 'gpt'"),
    ):
        other.run_task(ask_provider, {"room": room})
    for service in search.services.list():
        search.services.stop(service.spec.name, timeout=WAIT_S)


def test_a_process_with_a_secret_is_hidden_from_its_user(search: LatticeClient) -> None:
    def dumpable() -> int:
        import ctypes

        return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE

    assert search.run_task(task(env={"KEY": secret("CANARY")})(dumpable))["result"] == 0
    assert search.run_task(task(env={"KEY": "plain"})(dumpable))["result"] == 1


def test_a_batch_has_one_environment(search: LatticeClient) -> None:
    def read(number: list[int]) -> list[Any]:
        return [[os.environ["CITY"], len(number)] for _ in number]

    workflow = search.create_workflow()
    for number in range(4):
        batched = task(batch_size=4, batch_timeout=1.0, env={"CITY": "ab"[number % 2]})(read)
        workflow.add_task(batched, {"number": number}, task_id=f"t{number}")
    found = workflow.run().result(timeout=WAIT_S)
    assert [found[f"t{number}"]["result"][0] for number in range(4)] == ["a", "b", "a", "b"]


def test_a_wrong_environment_is_refused() -> None:
    for env in ({"1A": "x"}, {"LATTICE_X": "x"}, {"A": 1}, {"A": "\0"}, ["A"]):
        with pytest.raises(TaskDefinitionError, match="env"):
            task(env=env)(look.function)  # type: ignore[arg-type]  # as a caller without a type checker


@task(cpu=0.1, env={"KEY": secret("CANARY")})
def look_or_fail(folder: str) -> str:
    if not (Path(folder) / "works").exists():
        raise ValueError("it does not work yet")
    return os.environ["KEY"]


def test_a_retried_run_has_its_secrets_from_the_client_that_retries_it(
    server: Server, search: LatticeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = search.create_workflow()
    workflow.add_task(look_or_fail, {"folder": str(tmp_path)})
    run = workflow.run()
    with pytest.raises(TaskFailedError, match="not work yet"):
        run.result(timeout=WAIT_S)
    (tmp_path / "works").touch()
    with LatticeClient(server.address, tenant="search") as other:
        # Without `secrets` a client sends no variable that another caller's run names.
        with pytest.raises(InvalidArgumentError, match="CANARY again"):
            other.retry_run(str(run))
        with pytest.raises(TaskDefinitionError, match="NO_SUCH"):
            other.retry_run(str(run), secrets=["NO_SUCH"])
        assert other.retry_run(str(run), secrets=["CANARY"]).result(timeout=WAIT_S) == {"result": CANARY}
    with LatticeClient(server.address, tenant="search", env={"OTHER": secret("CANARY")}) as other:
        assert other.retry_run(str(run)).result(timeout=WAIT_S) == {"result": CANARY}
    again = run.retry()
    assert again.result(timeout=WAIT_S) == {"result": CANARY}
    # Tasks whose results are taken over need none.
    monkeypatch.delenv("CANARY")
    assert again.retry().result(timeout=WAIT_S) == {"result": CANARY}
    shown = CliRunner(env={"LATTICE_TARGET": server.address}).invoke(
        main, ["runs", "retry", "--secret", "NO_SUCH", "x"]
    )
    assert "NO_SUCH" in shown.output


@task(cpu=0.1)
def stay(room: str) -> str:
    enter(room, "stay")
    return "KEY"


@pytest.mark.timeout(180)
def test_a_repeated_start_sends_the_secret_that_a_killed_server_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: Room
) -> None:
    monkeypatch.setenv("CANARY", CANARY)
    head = Head(tmp_path / "journal")
    head.start()
    try:
        with LatticeClient(head.address) as client:
            workflow = client.create_workflow()
            first = workflow.add_task(stay, {"room": room})
            workflow.add_task(
                task(env={"KEY": secret("CANARY")})(look.function), {"names": [first.output]}, task_id="k"
            )
            lost, repeated = workflow.run("lost"), workflow.run("repeated")
            entered(lost, "stay")
            entered(repeated, "stay")
            head.restart()
            assert str(workflow.run("repeated")) == "repeated"
            room.open()
            assert client.get_run("repeated").result(timeout=WAIT_S) == {"result": {"KEY": CANARY}}
            with pytest.raises(TaskFailedError) as caught:
                client.get_run("lost").result(timeout=WAIT_S)
            assert caught.value.kind == "SECRET_MISSING"
            found = client.retry_run("lost", secrets=["CANARY"]).result(timeout=WAIT_S)
            assert found == {"result": {"KEY": CANARY}}
    finally:
        head.stop()
