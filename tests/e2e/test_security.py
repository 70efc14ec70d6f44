"""TLS and tokens between real processes: accepted and refused callers, and places where no token appears."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lattice_client import LatticeClient, UnavailableError, task
from lattice_server.config import ServerTls
from lattice_server.core.messages import SchedulerEvent
from lattice_server.engine.ports import Contact
from tests.certificates import Certificates, certificates
from tests.commands import LATTICE, START
from tests.server.apps import NoWorkers, serving_aside

TOKEN = "se-cret-0123456789"
FAR = "10.1.2.3:1"
WAIT_S = 60
LARGE_BYTES = 3_000_000
SCRIPT = """
from lattice_client import LatticeClient, task
from tests.commands import LATTICE, START

@task
def make(size: int) -> str:
    return "x" * size

@task
def measure(text: str) -> int:
    return len(text)

with LatticeClient() as client:
    workflow = client.create_workflow()
    made = workflow.add_task(make, {"size": 3_000_000})
    workflow.add_task(measure, {"text": made.output})
    print(workflow.run().result(), len(client.run_task(make, {"size": 3_000_000})["result"]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of two authorities."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the token."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(f"{TOKEN}\n")
    return path


def bare() -> dict[str, str]:
    """Return the environment of this test without settings of Lattice."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LATTICE_")}


@dataclass
class Served:
    """A server of a process of its own."""

    address: str
    process: "subprocess.Popen[str]"
    errors: Path

    def line(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a `lattice` command against it, with only the given variables of Lattice in the environment."""
        environment = {**bare(), "LATTICE_TARGET": self.address, **environment}
        command = [LATTICE, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)


@contextmanager
def served(errors: Path, *flags: str, **environment: str) -> Iterator[Served]:
    command = [*START, "--head", "--executor", "local", "--num-cpus", "2", "--port", "0", *flags]
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command, env={**bare(), **environment}, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"Lattice is listening on (\S+)\n", line)
        assert found, f"the server said {line!r} and {errors.read_text()!r}"
        try:
            yield Served(found[1], process, errors)
        finally:
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def safe(made: Certificates, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with TLS and a token that tells all it does."""
    errors = tmp_path_factory.mktemp("safe") / "stderr"
    flags = ["--tls-cert", str(made.cert), "--tls-key", str(made.key), "--token-file", str(token_file), "--verbose"]
    with served(errors, *flags) as found:
        yield found


@pytest.fixture(scope="module")
def private(made: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with TLS that asks callers for certificates, and has its token from the environment."""
    errors = tmp_path_factory.mktemp("private") / "stderr"
    flags = ["--tls-cert", str(made.cert), "--tls-key", str(made.key), "--tls-ca", str(made.ca)]
    with served(errors, *flags, LATTICE_TOKEN=TOKEN) as found:
        yield found
    assert errors.read_text() == ""


def credentials_of(made: Certificates) -> dict[str, str]:
    """Return the variables of a caller with a certificate and the token."""
    files = {"CA": made.ca, "CERT": made.caller_cert, "KEY": made.caller_key}
    return {"LATTICE_TOKEN": TOKEN, **{f"LATTICE_TLS_{name}": str(path) for name, path in files.items()}}


def test_a_script_with_large_values_works_with_tls_and_a_token(
    safe: Served, made: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    flags = ["--tls-ca", str(made.ca), str(tmp_path / "script.py")]
    done = safe.line("run", *flags, LATTICE_TOKEN=TOKEN)
    assert (done.stdout, done.stderr) == (f"{{'result': {LARGE_BYTES}}} {LARGE_BYTES}\n", "")


def test_every_command_works_with_tls_and_a_token(safe: Served, made: Certificates) -> None:
    known = {"LATTICE_TLS_CA": str(made.ca), "LATTICE_TOKEN": TOKEN}
    with LatticeClient(safe.address, token=TOKEN, tls_ca=made.ca) as client:
        run = client.create_workflow()
        run.add_task(environment, {"names": []})
        run_id = run.run()
        run_id.result(timeout=WAIT_S)
    for command in (
        "status",
        "nodes",
        "runs list",
        f"runs show {run_id}",
        f"runs watch {run_id}",
        f"runs cancel {run_id}",
    ):
        done = safe.line(*command.split(), **known)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@task
def environment(names: list[str]) -> dict[str, str]:
    return dict(os.environ)


def shown_of(processes: Sequence[psutil.Process]) -> list[str]:
    """Return the command line and the environment of each process that has not ended: a spare one may end meanwhile."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(json.dumps([process.cmdline(), process.environ()]))
    return found


def test_the_token_appears_nowhere(safe: Served, made: Certificates) -> None:
    with LatticeClient(safe.address, token=TOKEN, tls_ca=made.ca) as client:
        seen = client.run_task(environment, {"names": []})["result"]
        with pytest.raises(UnavailableError):
            LatticeClient(safe.address, token=TOKEN).server_info()
    assert TOKEN not in json.dumps(seen)
    assert {name for name in seen if name.startswith("LATTICE_")} <= {"LATTICE_WORKER_ID", "LATTICE_TARGET"}
    server = psutil.Process(safe.process.pid)
    shown = shown_of([server, *server.children(recursive=True)])
    assert len(shown) >= 3
    assert not [text for text in shown if TOKEN in text]
    for command in (["status"], ["status", "--json"], ["nodes", "--json"]):
        done = safe.line(*command, "--tls-ca", str(made.ca), LATTICE_TOKEN=TOKEN)
        assert done.returncode == 0
        assert TOKEN not in done.stdout + done.stderr
    assert safe.line("status", "--tls-ca", str(made.ca), LATTICE_TOKEN=f"{TOKEN}x").returncode == 1
    assert TOKEN not in safe.errors.read_text()


def test_a_token_of_the_environment_is_not_passed_to_child_processes(private: Served, made: Certificates) -> None:
    shown = shown_of(psutil.Process(private.process.pid).children(recursive=True))
    assert len(shown) >= 2
    assert not [text for text in shown if TOKEN in text]
    known = credentials_of(made)
    assert private.line("status", **known).returncode == 0
    assert private.line("status", **(known | {"LATTICE_TOKEN": ""})).returncode == 1


@pytest.mark.parametrize(
    ("flags", "environment", "text"),
    [
        (["--tls-ca", "CA"], {}, "needs a token: .*set LATTICE_TOKEN"),
        (["--tls-ca", "CA"], {"LATTICE_TOKEN": "wrong"}, "not valid here; set LATTICE_TOKEN"),
        (["--tls-ca", "STRANGER"], {"LATTICE_TOKEN": TOKEN}, "not signed by an authority trusted here"),
        (["--addr", "grpcs://ADDRESS"], {"LATTICE_TOKEN": TOKEN}, "not signed by an authority trusted here"),
        ([], {"LATTICE_TOKEN": TOKEN}, "the connection was closed: if the server uses TLS, set LATTICE_TLS_CA"),
        (["--tls-ca", "KEY"], {"LATTICE_TOKEN": TOKEN}, "LATTICE_TLS_CA .* no certificates"),
    ],
)
def test_a_caller_with_wrong_credentials_is_told_the_setting(
    safe: Served, made: Certificates, flags: Sequence[str], environment: dict[str, str], text: str
) -> None:
    known = {"CA": made.ca, "STRANGER": made.stranger_ca, "KEY": made.key, "grpcs://ADDRESS": f"grpcs://{safe.address}"}
    done = safe.line("status", *(str(known.get(flag, flag)) for flag in flags), **environment)
    assert done.returncode == 1
    assert re.search(text, done.stderr), done.stderr
    assert TOKEN not in done.stderr


def test_a_server_is_refused_when_its_certificate_is_for_another_name(made: Certificates) -> None:
    tls = ServerTls(made.cert.read_bytes(), made.key.read_bytes(), None)
    with serving_aside(NoWorkers(), host="127.0.0.2", tls=tls) as address:
        command = [LATTICE, "status", "--addr", address, "--tls-ca", str(made.ca)]
        done = subprocess.run(command, env=bare(), capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert "is for another name" in done.stderr


def test_a_server_may_ask_for_certificates(private: Served, made: Certificates, tmp_path: Path) -> None:
    known = credentials_of(made)
    assert private.line("status", **known).returncode == 0
    done = private.line("status", LATTICE_TOKEN=TOKEN, LATTICE_TLS_CA=str(made.ca))
    assert done.returncode == 1
    assert "if it requires client certificates, set LATTICE_TLS_CERT and LATTICE_TLS_KEY" in done.stderr
    unsigned = credentials_of(certificates(tmp_path)) | {"LATTICE_TLS_CA": str(made.ca)}
    assert private.line("status", **unsigned).returncode == 1


def test_nothing_is_logged_when_a_caller_does_not_speak_tls(private: Served, made: Certificates) -> None:
    host, _, port = private.address.rpartition(":")
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01nothing", b"\x00" * 100):
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while stranger.recv(1000):  # until the server closes the connection
                    pass
    assert private.line("status", **credentials_of(made)).returncode == 0
    assert private.errors.read_text() == ""


def test_a_health_check_needs_no_token(safe: Served, made: Certificates) -> None:
    credentials = grpc.ssl_channel_credentials(made.ca.read_bytes())
    with grpc.secure_channel(safe.address, credentials) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_nothing_is_served_or_dialled_beyond_this_machine_without_tls_and_a_token(
    made: Certificates, token_file: Path
) -> None:
    pair = ["--tls-cert", str(made.cert), "--tls-key", str(made.key)]
    for command, text in (
        (["start", "--head", "--host", "0.0.0.0"], "without TLS and a token"),
        (["start", "--head", "--host", "0.0.0.0", *pair], "without a token"),
        (["start", "--head", "--host", "0.0.0.0", "--token-file", str(token_file)], "without TLS"),
        (["status", "--addr", FAR], "would be dialled without TLS and a token"),
    ):
        done = subprocess.run(
            [LATTICE, *command], env=bare(), capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert done.returncode != 0
        assert text in " ".join(done.stderr.split())
        assert "insecure" in done.stderr.lower()
        assert TOKEN not in done.stderr


def test_a_warning_is_logged_when_a_server_is_insecure(token_file: Path, tmp_path: Path) -> None:
    flags = ["--host", "0.0.0.0", "--insecure", "--token-file", str(token_file)]
    with served(tmp_path / "stderr", *flags) as found:
        assert "WARNING" in found.errors.read_text()
        assert "serving on 0.0.0.0 without TLS: everyone who reaches this address" in found.errors.read_text()
        port = found.address.rpartition(":")[2]
        assert found.line("status", "--addr", f"127.0.0.1:{port}", LATTICE_TOKEN=TOKEN).returncode == 0
        assert found.line("status", "--addr", f"127.0.0.1:{port}").returncode == 1
        done = found.line("status", "--addr", f"0.0.0.0:{port}", "--insecure", LATTICE_TOKEN=TOKEN)
        assert done.returncode == 1
        assert f"127.0.0.1:{port} leads to a server on this machine" in done.stderr


def test_a_machine_joins_by_flags_that_show_no_token(
    safe: Served, made: Certificates, token_file: Path, tmp_path: Path
) -> None:
    shown = ["--token-file", str(token_file), "--tls-ca", str(made.ca)]
    for address, flags, text in (
        (FAR, shown[:2], "would be dialled without TLS"),
        (FAR, shown[2:], "would be dialled without a token"),
        (safe.address, shown[2:], "UNAUTHENTICATED: this server needs a token"),
    ):
        done = safe.line("start", "--worker", "--node-id", "another", "--addr", address, *flags)
        assert done.returncode == 1
        assert text in done.stderr
    command = [*START, "--worker", "--node-id", "another", "--num-cpus", "1", "--addr", safe.address, *shown]
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen(command, env=bare(), stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == f"Joined {safe.address} as node another\n"
        assert TOKEN not in " ".join(psutil.Process(process.pid).cmdline())
        process.terminate()
        assert process.wait(WAIT_S) == 0
    assert (tmp_path / "stderr").read_text() == ""


class Elsewhere(NoWorkers):
    """Starts nothing; the test starts a worker as if on another machine."""

    token = ""

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Remember the token of a worker."""
        self.token = contact.issue("far", "far")


@task
def large(size: int) -> bytes:
    return b"x" * size


def test_a_worker_joins_and_runs_tasks_with_a_worker_token(made: Certificates) -> None:
    tls = ServerTls(made.cert.read_bytes(), made.key.read_bytes(), made.ca.read_bytes())
    caller = {"tls_ca": made.ca, "tls_cert": made.caller_cert, "tls_key": made.caller_key}
    elsewhere = Elsewhere()
    with serving_aside(elsewhere, token=TOKEN, tls=tls) as address:
        command = [sys.executable, "-m", "lattice_worker", "--addr", address, "--node-id", "far", "--num-cpus", "1"]
        known = {f"LATTICE_{name.upper()}": str(path) for name, path in caller.items()}
        worker = subprocess.Popen(command, env={**bare(), **known, "LATTICE_TOKEN": elsewhere.token})
        try:
            with LatticeClient(address, token=TOKEN, **caller) as client:
                size = LARGE_BYTES
                workflow = client.create_workflow()
                first = workflow.add_task(large, {"size": size})
                workflow.add_task(len_of, {"data": first.output, "more": b"y" * size})
                assert workflow.run().result(timeout=WAIT_S) == {"result": 2 * size}
                assert client.run_task(large, {"size": size}) == {"result": b"x" * size}
            refused = subprocess.run(
                [*command, "--worker-id", "other"],
                env={**bare(), **known, "LATTICE_TOKEN": "wrong"},
                capture_output=True,
                text=True,
                timeout=WAIT_S,
                check=False,
            )
            assert refused.returncode == 1
            assert "UNAUTHENTICATED: the token is not valid here" in refused.stderr
        finally:
            worker.kill()
            worker.wait()


@task
def len_of(data: bytes, more: bytes) -> int:
    return len(data) + len(more)


def blocks() -> tuple[str, str]:
    """Return the commands of docs/security.md for the server and for callers, with addresses of this machine."""
    page = (Path(__file__).resolve().parent.parent.parent / "docs" / "security.md").read_text()
    server, caller, *_ = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return server.replace("10.1.2.3", "127.0.0.1").replace("0.0.0.0", "127.0.0.1"), caller


def test_the_commands_of_the_page_start_a_safe_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, caller = blocks()
    prepare, _, start = server.partition("lattice start --head ")
    subprocess.run(["bash", "-euc", prepare], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    with served(tmp_path / "stderr", *shlex.split(start)) as found:
        assert found.line("status").returncode == 1
        caller = caller.replace("10.1.2.3:50051", found.address)
        # The same flags by another name: grpcurl itself cannot be had everywhere.
        caller, count = re.subn(
            r'grpcurl -cacert (\S+) -H ("[^"]+") \$LATTICE_TARGET list',
            r"buf curl --protocol grpc --cacert \1 --reflect-header \2 --list-services https://$LATTICE_TARGET",
            caller,
        )
        assert count == 1
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euc", caller],
            env={**bare(), "PATH": path},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "executor\tlocal" in done.stdout
        assert "lattice.v1.WorkflowService" in done.stdout.split()
