"""Services: commands and functions that tasks use, their failures, idleness and ends."""

import asyncio
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from lattice.v1 import service_pb2

from lattice_client import AsyncLatticeClient, LatticeClient, ServiceFailedError, TaskFailedError, context, secret, task
from lattice_client.cli.main import main
from tests.e2e.rooms import WAIT_S

SERVING = str(Path(__file__).parent / "serving.py")
COMMAND = [sys.executable, SERVING, "{host}", "{port}"]
READY = service_pb2.INSTANCE_STATE_READY


@task(cpu=0.1)
def ask(name: str, path: str) -> str:
    found = context.service(name)
    with urllib.request.urlopen(f"{found.url}/{path}", timeout=WAIT_S) as response:
        return str(response.read().decode())


@task(cpu=0)
async def ask_async(name: str) -> str:
    found = await context.service_async(name)
    return f"{found.instance_id} {found.host} {found.port > 0}"


@task(cpu=0)
def refused() -> list[str]:
    found = []
    for value in [{"name": ("a", "b")}, ["a"], {"name": {1, 2}}, None]:
        try:
            context.ask("lattice/service.endpoint", value)
        except context.AnswerError as error:
            found.append(f"{error.type}: {error}")
    return found


@pytest.fixture
def started(client: LatticeClient) -> Iterator[Callable[..., service_pb2.Service]]:
    """Starts services of small instances, and stops all when the test ends."""

    def start(name: str, program: Any = COMMAND, **settings: Any) -> service_pb2.Service:
        return client.services.start(name, program, **{"cpu": 0.1, "timeout": WAIT_S, "stop_grace": 5.0} | settings)

    yield start
    for service in client.services.list():
        client.services.stop(service.spec.name, timeout=WAIT_S)
    assert client.services.list() == []


def ready(service: service_pb2.Service) -> list[service_pb2.ServiceInstance]:
    return [one for one in service.instances if one.state == READY]


def until(is_so: Callable[[], Any], what: str) -> Any:
    """Call a condition until its result is true; return the result."""
    ends_at = time.monotonic() + WAIT_S
    while not (found := is_so()):
        assert time.monotonic() < ends_at, f"not within {WAIT_S} s: {what}"
        time.sleep(0.05)
    return found


def restarted(client: LatticeClient, name: str) -> service_pb2.Service | None:
    """Return a service that was restarted, whose failure is shown until the next instance is ready; else None."""
    found = client.services.get(name)
    return found if found.restarts else None


def answer_of(client: LatticeClient, name: str, path: str) -> str:
    return str(client.run_task(ask, {"name": name, "path": path})["result"])


def test_tasks_reach_a_command_by_its_name(client: LatticeClient, started: Callable[..., Any]) -> None:
    service = started("web", health="/health", env={"COLOUR": "blue"})
    (instance,) = ready(service)
    assert service.state == service_pb2.SERVICE_STATE_READY
    assert answer_of(client, "web", "pid").isdigit()
    assert answer_of(client, "web", "env/COLOUR") == "blue"
    assert answer_of(client, "web", "env/LATTICE_SERVICE_PORT") == instance.endpoint.rpartition(":")[2]
    assert client.run_task(ask_async, {"name": "web"})["result"] == "web-1 127.0.0.1 True"
    run = client.describe_run(instance.run_id)
    assert (run.display_name, dict(run.labels)) == ("service web", {"lattice/service": "web"})


def test_a_function_serves_until_it_is_stopped(client: LatticeClient, started: Callable[..., Any]) -> None:
    colour = "green"

    def serve(host: str, port: int) -> None:
        from http.server import BaseHTTPRequestHandler, HTTPServer

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(colour.encode())

        print("the function serves")
        HTTPServer((host, port), Answer).serve_forever()

    started("function", serve)
    assert answer_of(client, "function", "") == "green"
    lines = [line.text for line in client.services.logs("function")]
    assert "the function serves" in lines


def test_an_instance_is_replaced_when_its_program_is_killed(client: LatticeClient, started: Callable[..., Any]) -> None:
    started("web")
    first = int(answer_of(client, "web", "pid"))
    os.kill(first, 9)
    found = until(lambda: restarted(client, "web"), "the end is noticed")
    assert (found.restarts, found.failure.kind) == (1, service_pb2.SERVICE_FAILURE_KIND_SIGNALED)
    client.services.ready("web", timeout=WAIT_S)
    assert int(answer_of(client, "web", "pid")) != first
    assert not client.services.get("web").HasField("failure")


def test_no_process_is_left_when_a_service_is_stopped(
    client: LatticeClient, started: Callable[..., Any], tmp_path: Path
) -> None:
    children = tmp_path / "children"
    started("web", [*COMMAND, "--child", str(children), "--stubborn"], stop_grace=0.2)
    pids = [int(pid) for pid in children.read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    client.services.stop("web", timeout=WAIT_S)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "all processes are gone")
    assert client.nodes()[0].free.cpu == client.nodes()[0].capacity.cpu


def test_no_process_is_left_and_another_instance_starts_when_a_worker_is_killed(
    client: LatticeClient, started: Callable[..., Any], tmp_path: Path
) -> None:
    children = tmp_path / "children"
    started("web", [*COMMAND, "--child", str(children)])
    pids = [int(pid) for pid in children.read_text().split()]
    psutil.Process(client.nodes()[0].worker_pid).kill()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "all processes are gone")
    until(lambda: client.services.get("web").restarts, "the loss is noticed")
    client.services.ready("web", timeout=WAIT_S)
    assert int(answer_of(client, "web", "pid")) not in pids


def test_a_program_that_cannot_start_is_a_typed_error_with_its_last_lines(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    with pytest.raises(ServiceFailedError) as caught:
        started("bad", [sys.executable, "-c", "print('loading'); raise SystemExit(2)"])
    assert (caught.value.kind, caught.value.last_lines) == ("bad_arguments", ("loading",))
    with pytest.raises(ServiceFailedError, match="No such file"):
        started("missing", ["/no/such/program"])
    with pytest.raises(TaskFailedError, match="ServiceFailedError: service 'bad' has no instance"):
        answer_of(client, "bad", "pid")
    with pytest.raises(TaskFailedError, match="there is no service 'none'; this tenant has: bad, missing"):
        answer_of(client, "none", "pid")


def test_start_tells_at_once_that_the_program_exits_and_the_server_tries_again(
    client: LatticeClient, started: Callable[..., Any], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    code = f"import os, sys; print('no'); os.path.exists('{go}') or sys.exit(3); os.execv(sys.argv[1], sys.argv[1:])"
    begun = time.monotonic()
    with pytest.raises(ServiceFailedError, match=r"exited.*services\.ready\('late'\) waits for that") as caught:
        started("late", [sys.executable, "-c", code, *COMMAND])
    assert time.monotonic() - begun < 5.0  # Five starts with their pauses take 15 s or more.
    assert (caught.value.kind, caught.value.last_lines) == ("exited", ("no",))
    found = client.services.get("late")
    assert (found.state, found.failure.exit_status) == (service_pb2.SERVICE_STATE_STARTING, 3)
    go.touch()
    assert client.services.ready("late", timeout=WAIT_S).restarts >= 1


def test_status_names_the_port_on_which_a_service_does_not_listen(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    with pytest.raises(TimeoutError, match=r"'deaf' was not ready within 2 s: it does not listen on port \d+; it cont"):
        started("deaf", [sys.executable, "-c", "import time; time.sleep(600)"], timeout=2.0, start_timeout=4.0)
    until(lambda: client.services.get("deaf").restarts, "its time to start is over")
    failure = client.services.get("deaf").failure
    assert failure.kind == service_pb2.SERVICE_FAILURE_KIND_START_TIMEOUT
    assert "was not ready within 4 s: it does not listen on port" in failure.message


def test_a_question_to_the_server_is_refused_when_its_value_is_no_object_in_json(client: LatticeClient) -> None:
    tuples, items, sets, nothing = client.run_task(refused)["result"]
    assert "takes a dict that JSON can have, and no tuples" in tuples
    assert "takes a dict, not list" in items
    assert "takes a dict that JSON can have" in sets
    assert nothing.startswith("ServiceNotFoundError")


def test_a_service_that_is_stopped_while_it_starts_ends(
    address: str, client: LatticeClient, started: Callable[..., Any]
) -> None:
    async def run() -> None:
        async with AsyncLatticeClient(address) as one, AsyncLatticeClient(address) as other:
            for number in range(40):
                start = one.services.start(f"s{number}", COMMAND, cpu=0.05, wait=False)
                await asyncio.gather(start, other.services.stop(f"s{number}", timeout=WAIT_S))
            for number in range(40):
                await one.services.stop(f"s{number}", timeout=10.0)

    asyncio.run(run())


def test_an_idle_service_has_no_process_until_a_task_uses_it(
    client: LatticeClient, started: Callable[..., Any], tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    started("web", [*COMMAND, "--hold", str(hold)], idle_timeout=0.5)
    until(lambda: client.services.get("web").state == service_pb2.SERVICE_STATE_IDLE, "the service is idle")
    answers = [client.create_workflow() for _ in range(3)]
    runs = []
    for workflow in answers:
        workflow.add_task(ask, {"name": "web", "path": "hold/pid"}, task_name="ask")
        runs.append(workflow.run())
    until(lambda: sum(one.in_flight for one in client.services.get("web").instances) == 3, "all requests are made")
    hold.touch()
    assert len({run.result(timeout=WAIT_S)["result"] for run in runs}) == 1


def test_a_sick_instance_gets_no_tasks_and_is_replaced(
    client: LatticeClient, started: Callable[..., Any], tmp_path: Path
) -> None:
    sick = tmp_path / "sick"
    command = [*COMMAND, "--sick", str(sick)]
    started("web", command, health="/health", health_interval=0.1, health_failures=2)
    sick.touch()
    found = until(lambda: restarted(client, "web"), "the instance is replaced")
    assert found.failure.kind == service_pb2.SERVICE_FAILURE_KIND_UNHEALTHY
    sick.unlink()
    client.services.ready("web", timeout=WAIT_S)


def test_requests_end_before_an_instance_is_stopped(
    client: LatticeClient, started: Callable[..., Any], tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    started("web", [*COMMAND, "--hold", str(hold)])
    workflow = client.create_workflow()
    workflow.add_task(ask, {"name": "web", "path": "hold"}, task_name="ask")
    run = workflow.run()
    until(lambda: client.services.get("web").instances[0].in_flight, "the request is counted")
    with pytest.raises(TimeoutError):
        client.services.stop("web", timeout=0.5)
    assert client.services.get("web").instances[0].state == service_pb2.INSTANCE_STATE_DRAINING
    hold.touch()
    assert run.result(timeout=WAIT_S) == {"result": ""}
    client.services.stop("web", timeout=WAIT_S)


def test_an_instance_waits_for_resources_like_any_task(client: LatticeClient, started: Callable[..., Any]) -> None:
    started("large", cpu=3)
    service = started("web", cpu=3, wait=False)
    (instance,) = until(lambda: client.services.get("web").instances, "the instance is there")
    assert instance.state == service_pb2.INSTANCE_STATE_QUEUED
    assert service.state == service_pb2.SERVICE_STATE_STARTING
    reasons = until(lambda: client.explain(instance.run_id, "instance").reasons, "it is explained")
    assert "cpu" in reasons[0].message.lower()
    client.services.stop("large", timeout=WAIT_S)
    client.services.ready("web", timeout=WAIT_S)
    with pytest.raises(ServiceFailedError, match="cpu"):
        started("huge", cpu=1000)


def test_services_share_a_device_by_its_memory(client: LatticeClient, started: Callable[..., Any]) -> None:
    for name in ("one", "two"):
        started(name, gpu=0.5, gpu_mem=4096)
    devices = {answer_of(client, name, "env/CUDA_VISIBLE_DEVICES") for name in ("one", "two")}
    assert len(devices) == 1
    (other,) = {"0", "1"} - devices
    started("large", gpu=0.25, gpu_mem=6000)
    assert answer_of(client, "large", "env/CUDA_VISIBLE_DEVICES") == other
    started("waiting", gpu=0.25, gpu_mem=4096, wait=False)
    (instance,) = until(lambda: client.services.get("waiting").instances, "the instance is there")
    reasons = until(lambda: client.explain(instance.run_id, "instance").reasons, "it is explained")
    assert "gpu memory" in reasons[0].message.lower()
    client.services.stop("large", timeout=WAIT_S)
    client.services.ready("waiting", timeout=WAIT_S)


def test_a_new_definition_replaces_the_instances_and_an_equal_one_does_not(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    started("web", env={"COLOUR": "blue"})
    first = answer_of(client, "web", "pid")
    started("web", env={"COLOUR": "blue"})
    assert answer_of(client, "web", "pid") == first
    started("web", env={"COLOUR": "red"})
    until(lambda: [one.revision for one in ready(client.services.get("web"))] == [2], "it is replaced")
    assert answer_of(client, "web", "env/COLOUR") == "red"


@pytest.mark.parametrize("colours", [("blue", "blue", "blue"), ("red", "green", "blue")], ids=["equal", "different"])
def test_clients_that_start_a_name_at_once_get_one_instance(
    colours: tuple[str, ...], address: str, client: LatticeClient, started: Callable[..., Any]
) -> None:
    together = Barrier(len(colours))

    def start(colour: str) -> service_pb2.Service:
        with LatticeClient(address) as own:
            together.wait(WAIT_S)
            environment = {"COLOUR": colour}
            return own.services.start("web", COMMAND, cpu=0.1, env=environment, stop_grace=5.0, timeout=WAIT_S)

    with ThreadPoolExecutor(len(colours)) as pool:
        found = list(pool.map(start, colours))
    assert all(map(ready, found))
    # The last definition counts for all of them.
    revision = len(set(colours))
    until(lambda: [one.revision for one in ready(client.services.get("web"))] == [revision], "the others have ended")
    last = client.services.get("web")
    assert last.restarts == 0
    assert answer_of(client, "web", "env/COLOUR") in colours
    assert not last.HasField("failure")
    client.services.stop("web", timeout=WAIT_S)
    assert client.nodes()[0].free.cpu == client.nodes()[0].capacity.cpu


def test_a_secret_is_in_the_environment_and_nowhere_else(
    client: LatticeClient, started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "canary-0123456789")
    service = started("web", env={"KEY": secret("API_KEY")})
    assert answer_of(client, "web", "env/KEY") == "canary-0123456789"
    answer_of(client, "web", "say/the-key-is-canary-0123456789")
    lines = until(lambda: [one.text for one in client.services.logs("web") if "the-key" in one.text], "it is logged")
    assert lines == ["the-key-is-***"]
    (instance,) = ready(service)
    shown = [client.services.get("web"), client.describe_run(instance.run_id)]
    shown += [*client.list_tasks(instance.run_id, with_outputs=True), *client.run_graph(instance.run_id)]
    assert "canary" not in str(shown) + str(list(client.twin.services.__dict__))
    commands = [found.info["cmdline"] or [] for found in psutil.process_iter(["cmdline"])]
    assert not any("canary" in word for command in commands for word in command)


def test_replicas_change_by_scaling(client: LatticeClient, started: Callable[..., Any]) -> None:
    started("web")
    assert client.services.scale("web", 3).wanted == 3
    until(lambda: len(ready(client.services.get("web"))) == 3, "three are ready")
    client.services.scale("web", 1)
    until(lambda: len(client.services.get("web").instances) == 2, "one is left, and the one that ended last")


def test_the_command_line_starts_shows_scales_and_stops_a_service(address: str) -> None:
    def lattice(*arguments: str) -> Result:
        return CliRunner(env={"LATTICE_TARGET": address}).invoke(main, ["services", *arguments])

    found = lattice("start", "--cpu", "0.1", "--env", "A=b", "shell", "--", *COMMAND)
    assert (found.exit_code, "Service shell is ready: 127.0.0.1:" in found.stdout) == (0, True), found.stderr
    assert lattice("list").stdout.splitlines()[1].startswith("shell\tready\t1/1\t0\t0\t127.0.0.1:")
    assert "shell-1\tready\t" in lattice("show", "shell").stdout
    until(lambda: "shell-1: listening on port" in lattice("logs", "shell").stdout, "its output is there")
    assert lattice("scale", "shell", "2").stdout == "Service shell wants 2 instances.\n"
    assert lattice("stop", "shell").stdout == "Service shell is stopped.\n"
    failed = lattice("start", "--cpu", "0.1", "shell", "/no/such/program")
    assert failed.exit_code == 1
    assert "cannot start (command_not_found)" in failed.stderr
    assert lattice("stop", "shell").exit_code == 0
    for command in ("logs", "stop"):
        missing = lattice(command, "shell")
        assert (missing.exit_code, "there is no service 'shell'" in missing.stderr) == (1, True)
    assert "must name a program" in lattice("start", "shell", "--").stderr
