"""The security of connections: which targets are refused, and the credentials that are sent."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_client import LangGraphClient, LatticeClient, SecurityError, TargetError, UnauthenticatedError, task
from lattice_client.transport.security import is_on_this_machine, secure
from tests.certificates import Certificates, certificates
from tests.client.shell import call
from tests.commands import LATTICE
from tests.server.apps import serving_aside

TOKEN = "se-cret"
FAR = "10.1.2.3:1"
VARIABLES = ("LATTICE_TOKEN", "LATTICE_TLS_CA", "LATTICE_TLS_CERT", "LATTICE_TLS_KEY", "LATTICE_INSECURE")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of two authorities."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The address of a server with a token and a worker, on loopback without TLS."""
    with serving_aside(token=TOKEN) as address:
        yield address


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "127.9.9.9:1",
        "localhost:1",
        "[::1]:50051",
        "dns:///localhost:1",
        "ipv4:127.0.0.1:1",
        "ipv6:[::1]:1",
        "unix:/x/y",
        "unix:///x/y",
    ],
)
def test_address_is_on_this_machine_when_it_is_loopback(address: str) -> None:
    assert is_on_this_machine(address)
    assert secure(address).credentials is None


@pytest.mark.parametrize(
    "address",
    [
        FAR,
        "example.org:1",
        "localhost.example.org:1",
        "127.0.0.1.example.org:1",
        "ipv4:127.0.0.1:1,10.1.2.3:1",
        "dns://10.1.2.3/localhost:1",
        "xds:localhost:1",
    ],
)
def test_address_may_be_on_another_machine_when_it_is_not_loopback(address: str) -> None:
    assert not is_on_this_machine(address)
    with pytest.raises(SecurityError, match="not this machine"):
        secure(address)


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("127.0.0.1", "has no port: write host:port"),
        ("localhost", "has no port"),
        ("dns:///localhost", "has no port"),
        ("http://127.0.0.1", "has no port"),
        ("[::1]", "has no port"),
        ("ipv4:127.0.0.1:1,127.0.0.2", "has no port"),
        (":50051", "has no host"),
        ("127.0.0.1:999999", "has port '999999': a port is a number from 1 to 65535"),
        ("127.0.0.1:65536", "from 1 to 65535"),
        ("127.0.0.1:0", "from 1 to 65535"),
        ("127.0.0.1:-1", "from 1 to 65535"),
        ("localhost:http", "has port 'http'"),
        ("localhost:1@example.org", "has port '1@example.org'"),
        ("http://127.0.0.1:50051/path", "has port '50051/path'"),
        ("127.0.0.1:\N{ARABIC-INDIC DIGIT FIVE}", "is no address"),
        ("::1", r"write an IPv6 address as \[::1\]:50051"),
        ("::1:50051", "write an IPv6 address"),
        ("127.0.0.1:1,10.1.2.3:1", "colons in its host"),
        ("0.0.0.0:50051", "127.0.0.1:50051 leads to a server on this machine"),
        ("[::]:50051", "not to connect to"),
        ("a host:1", "is no address"),
        ("[::1:50051", r"has the host '\[::1', which is neither a name nor an address: write host:port"),
        ("[::1]]:50051", "neither a name"),
        ("[localhost]:50051", "neither a name"),
        ("localhost@example.org:1", "neither a name"),
        ("http://127.0.0.1/path:50051", "neither a name"),
        ("${HOST}:50051", "neither a name"),
        ("", "is no address"),
        ("ftp://127.0.0.1:1", "has the scheme 'ftp', which is not known"),
    ],
)
def test_target_is_refused_when_it_is_not_an_address(target: str, what: str) -> None:
    with pytest.raises(TargetError, match=what):
        secure(target)


def test_a_target_may_leave_the_port_out_where_its_scheme_names_one() -> None:
    assert secure("grpcs://example.org", token=TOKEN).address == "example.org:443"
    assert secure(" 127.0.0.1:50051\n").address == "127.0.0.1:50051"
    for target in ("[::1]:50051", "[fe80::1%eth0]:50051", "a_name.of-a.cluster:50051", "ipv6:[::1]:50051"):
        assert secure(target, insecure=True).address == target
    with pytest.raises(TargetError, match="not a int"):
        secure(50051)  # type: ignore[arg-type]


def test_beyond_this_machine_both_are_needed(made: Certificates) -> None:
    for arguments, missing in (
        ({}, "without TLS and a token: set LATTICE_TLS_CA .*, and LATTICE_TOKEN"),
        ({"token": TOKEN}, "without TLS: set LATTICE_TLS_CA"),
        ({"tls_ca": made.ca}, "without a token: set LATTICE_TOKEN"),
        ({"token": TOKEN, "insecure": False}, "LATTICE_INSECURE=1 .* dials it anyway"),
    ):
        with pytest.raises(SecurityError, match=missing) as caught:
            secure(FAR, **arguments)
        assert TOKEN not in str(caught.value)
    for target in (f"grpcs://{FAR}", f"https://{FAR}/"):
        found = secure(target, token=TOKEN)
        assert found.address == FAR
        assert found.credentials is not None
        assert TOKEN not in repr(found)
    assert secure(FAR, token=TOKEN, tls_ca=made.ca).credentials is not None


def test_options_come_from_the_environment_when_arguments_are_missing(
    made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_TOKEN", TOKEN)
    with pytest.raises(SecurityError, match="without TLS"):
        secure(FAR)
    monkeypatch.setenv("LATTICE_TLS_CA", str(made.ca))
    assert secure(FAR).token == TOKEN
    assert secure(FAR, token="other").token == "other"
    assert secure("unix:/x").credentials is None
    monkeypatch.setenv("LATTICE_TLS_CERT", str(made.caller_cert))
    with pytest.raises(SecurityError, match=r"LATTICE_TLS_CERT .* needs LATTICE_TLS_KEY"):
        secure(FAR)
    monkeypatch.setenv("LATTICE_TLS_KEY", str(made.caller_key))
    assert secure(FAR).credentials is not None


@pytest.mark.parametrize("value", ["0", "", "true"])
def test_insecure_is_set_only_when_the_variable_is_1(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LATTICE_INSECURE", value)
    with pytest.raises(SecurityError):
        secure(FAR)


def test_insecure_connection_logs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LATTICE_INSECURE", "1")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert secure("10.9.9.9:1").credentials is None
        assert secure("127.0.0.1:1").credentials is None
    (record,) = caplog.records
    assert "10.9.9.9:1 is dialled without TLS and a token" in record.getMessage()


def test_security_error_names_the_unusable_file(made: Certificates, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for arguments, text in (
        ({"tls_ca": tmp_path / "ghost"}, "LATTICE_TLS_CA .*No such file"),
        ({"tls_ca": tmp_path / "empty"}, "LATTICE_TLS_CA .*no certificates"),
        ({"tls_cert": made.cert, "tls_key": made.caller_key}, "LATTICE_TLS_CERT .*LATTICE_TLS_KEY"),
        ({"tls_key": made.key}, "LATTICE_TLS_KEY .* needs LATTICE_TLS_CERT"),
        ({"token": "two words"}, "LATTICE_TOKEN, must be printable"),
        ({"token": "line\n"}, "LATTICE_TOKEN, must be printable"),
    ):
        with pytest.raises(SecurityError, match=text):
            secure("127.0.0.1:1", **arguments)


def test_clients_and_commands_refuse_an_insecure_connection() -> None:
    for kind in (LatticeClient, LangGraphClient):
        with pytest.raises(SecurityError, match=FAR):
            kind(FAR)
    for command in (["status"], ["nodes"], ["runs", "list"], ["runs", "watch", "r"]):
        done = call(FAR, *command)
        assert done.exit_code == 1
        assert f"{FAR} is not this machine" in done.stderr


@task
def echo(text: str) -> str:
    return text


def test_every_kind_of_call_carries_the_token(guarded: str) -> None:
    large = "x" * 1_500_000
    with LatticeClient(guarded, token=TOKEN) as client:
        assert client.run_task(echo, {"text": large}) == {"result": large}
        workflow = client.create_workflow()
        workflow.add_task(echo, {"text": large})
        run = workflow.run()
        assert run.result(timeout=60) == {"result": large}
        assert [event.type for event in run.events(timeout=60)][-1] == "run_finished"
    assert LangGraphClient(guarded, token=TOKEN).task(len)(large) == len(large)


def test_error_names_the_token_setting_when_the_token_is_wrong(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (None, "wrong"):
        with LatticeClient(guarded, token=token) as client, pytest.raises(UnauthenticatedError) as caught:
            client.server_info()
        assert caught.value.reason == "UNAUTHENTICATED"
        assert "set LATTICE_TOKEN" in str(caught.value)
    done = call(guarded, "status")
    assert done.exit_code == 1
    assert "set LATTICE_TOKEN" in done.stderr
    monkeypatch.setenv("LATTICE_TOKEN", TOKEN)
    assert call(guarded, "status").exit_code == 0


def test_run_command_passes_the_connection_settings_to_the_script(made: Certificates, tmp_path: Path) -> None:
    names = ["LATTICE_TARGET", "LATTICE_TLS_CA", "LATTICE_INSECURE"]
    (tmp_path / "script.py").write_text(f"import os; print(*map(os.environ.get, {names}))\n")
    command = [LATTICE, "run", "--addr", FAR, "--tls-ca", str(made.ca), "--insecure", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [FAR, str(made.ca), "1"]


def test_calls_to_this_machine_use_no_proxy(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with LatticeClient(guarded, token=TOKEN) as client:
        assert client.server_info().executor == "local"


HANDSHAKE = """
import os, socket, threading
from lattice_client import LatticeClient, UnavailableError
listener = socket.create_server(("127.0.0.1", 0))

def answer():
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"this is not TLS\\r\\n")

threading.Thread(target=answer, daemon=True).start()
try:
    LatticeClient(f"grpcs://127.0.0.1:{listener.getsockname()[1]}").server_info()
except UnavailableError as error:
    print("does not speak TLS" in str(error), "GRPC_VERBOSITY" in os.environ)
"""


def test_failed_handshake_prints_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    command = [sys.executable, "-c", HANDSHAKE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("True False\n", "")
