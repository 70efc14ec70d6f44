"""Connections that code in a sandbox with an allow list of servers tries. Each function runs inside; it raises OSError
when it is refused, and returns the answer. Standard library only."""

import contextlib
import http.client
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROXY = ("127.0.0.1", 3128)
SERVERS = (
    *("api.test:443", "api.test:80", "*.wild.test:443", "metadata.test:443", "metadata.test:80", "inner.test:80"),
    *("azure.test:80", "own.test:8000", "loopback.test:8000", "zero.test:8000", "mapped.test:80", "embedded.test:80"),
    *("rebind.test:80", "closed.test:444", "missing.test:443", "api.test:9000"),
)
REFUSED, DONE = "refused", "done"
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Row:
    """One attempt: how it ends, and the access that the agent is told of, as `HOST:PORT VERDICT`; empty for none."""

    run: Callable[[str], Any]
    outcome: str
    access: str
    text: str = ""


ROWS: dict[str, Row] = {}


def row(outcome: str, access: str, text: str = "") -> Callable[[Callable[[str], Any]], None]:
    """Register a function as an attempt, by its name."""

    def register(run: Callable[[str], Any]) -> None:
        ROWS[run.__name__] = Row(run, outcome, access, text)

    return register


def outcome(name: str, ca: str) -> str:
    """Make one attempt, in a process of its own."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            text = f"{DONE}: {ROWS[name].run(ca)}"
        except (OSError, http.client.HTTPException) as error:
            text = f"{REFUSED}: {type(error).__name__}: {error}"
        except BaseException as error:
            text = f"broken: {type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    text = os.read(read, 4096)
    os.close(read)
    os.waitpid(pid, 0)
    return text.decode()


def _context(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=ca)


def _plain_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _without_proxy(ca: str) -> urllib.request.OpenerDirector:
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_context(ca))]
    return urllib.request.build_opener(*handlers)


def _connect(server: str) -> socket.socket:
    """Return a tunnel of the proxy. Raises OSError."""
    sock = socket.create_connection(PROXY, TIMEOUT_S)
    sock.sendall(f"CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n\r\n".encode())
    head = b""
    while b"\r\n\r\n" not in head:
        if not (part := sock.recv(4096)):
            raise ConnectionError("closed")
        head += part
    if b" 200 " not in head:
        raise ConnectionError(head.decode())
    return sock


def _ask(sock: socket.socket, request: bytes) -> bytes:
    """Return all that is answered. Raises ConnectionError for a refusal."""
    sock.settimeout(TIMEOUT_S)
    sock.sendall(request)
    found = b""
    while part := sock.recv(4096):
        found += part
        if b"X-Lattice-Network" not in found and b" | " in found:
            with contextlib.suppress(TimeoutError):
                sock.settimeout(0.5)
                found += sock.recv(4096)
            break
    if not found or b"X-Lattice-Network" in found:
        raise ConnectionError(found.decode())
    return found


# Honest programs.


@row(DONE, "api.test:443 allowed", "GET /a HTTP/1.1 | api.test")
def https_by_the_proxy(ca: str) -> str:
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=_context(ca)))
    return opener.open("https://api.test/a", timeout=TIMEOUT_S).read().decode()


@row(DONE, "api.test:80 allowed", "GET /a?b=1 HTTP/1.1 | api.test")
def http_by_the_proxy(_: str) -> str:
    return urllib.request.urlopen("http://api.test/a?b=1", timeout=TIMEOUT_S).read().decode()


@row(DONE, "api.test:443 allowed", "GET /a HTTP/1.1 | api.test")
def https_by_a_program_that_knows_no_proxy(ca: str) -> str:
    return _without_proxy(ca).open("https://api.test/a", timeout=TIMEOUT_S).read().decode()


@row(DONE, "api.test:80 allowed", "POST /a HTTP/1.1 | api.test | 3000000")
def large_body_by_a_program_that_knows_no_proxy(ca: str) -> str:
    return _without_proxy(ca).open("http://api.test/a", bytes(3_000_000), timeout=TIMEOUT_S).read().decode()


@row(DONE, "api.test:80 allowed", "GET /hello HTTP/1.1 | api.test")
def http_by_a_tunnel(_: str) -> str:
    return _ask(_connect("api.test:80"), b"GET /hello HTTP/1.1\r\nHost: api.test\r\n\r\n").decode()


@row(DONE, "a.wild.test:443 allowed")
def name_below_a_listed_one(_: str) -> str:
    with _plain_context().wrap_socket(_connect("a.wild.test:443"), server_hostname="a.wild.test") as tls:
        return _ask(tls, b"GET / HTTP/1.1\r\nHost: a.wild.test\r\n\r\n").decode()


# Servers that are not listed.


@row(REFUSED, "other.test:443 not_listed", "403 Forbidden")
def another_name(ca: str) -> str:
    return urllib.request.urlopen("https://other.test/", timeout=TIMEOUT_S).read().decode()


@row(REFUSED, "malicious-api.test:443 not_listed")
def name_that_ends_like_a_listed_one(_: str) -> None:
    _connect("malicious-api.test:443")


@row(REFUSED, "wild.test:443 not_listed")
def name_above_a_wildcard(_: str) -> None:
    _connect("wild.test:443")


@row(REFUSED, "api.test:8443 not_listed")
def another_port(_: str) -> None:
    _connect("api.test:8443")


@row(REFUSED, "11.1.0.1:443 not_listed")
def address_in_the_place_of_a_name(_: str) -> None:
    _connect("11.1.0.1:443")


@row(REFUSED, "184614913:443 not_listed")
def address_as_one_number(_: str) -> None:
    _connect("184614913:443")


@row(REFUSED, "[::ffff:11.1.0.1]:443 not_listed")
def address_mapped_to_ipv6(_: str) -> None:
    _connect("[::ffff:11.1.0.1]:443")


@row(REFUSED, ":0 malformed")
def name_with_a_user(_: str) -> str:
    return _ask(
        socket.create_connection(PROXY), b"GET http://api.test@inner.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n"
    ).decode()


# Names that stand for addresses that no sandbox may reach.


def _resolved(label: str, name: str, access: str = "address_refused") -> None:
    def run(_: str) -> str:
        return _ask(_connect(name), f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()).decode()

    run.__name__ = label
    row(REFUSED, f"{name} {access}")(run)


_resolved("name_of_the_metadata_service", "metadata.test:80")
_resolved("name_of_an_inner_address", "inner.test:80")
_resolved("name_of_the_metadata_service_of_azure", "azure.test:80")
_resolved("name_of_the_node", "own.test:8000")
_resolved("name_of_the_loopback", "loopback.test:8000")
_resolved("name_of_the_zero_address", "zero.test:8000")
_resolved("name_of_an_inner_address_mapped_to_ipv6", "mapped.test:80")
_resolved("name_of_an_inner_address_embedded_in_ipv6", "embedded.test:80")
_resolved("name_without_an_address", "missing.test:443", "unresolved")
_resolved("port_without_a_server", "closed.test:444", "unreachable")


@row(REFUSED, "rebind.test:80 address_refused", "10.9.9.9")
def name_whose_address_changes(_: str) -> str:
    """The first connection gets the first address, and each later one the inner one."""
    first = _ask(_connect("rebind.test:80"), b"GET /1 HTTP/1.1\r\nHost: rebind.test\r\n\r\n")
    assert b"GET /1" in first, first
    return _ask(_connect("rebind.test:80"), b"GET /2 HTTP/1.1\r\nHost: rebind.test\r\n\r\n").decode()


# Another server than the requested one.


@row(REFUSED, "api.test:443 name_differs")
def tls_for_another_name(_: str) -> str:
    with _plain_context().wrap_socket(_connect("api.test:443"), server_hostname="other.test") as tls:
        return _ask(tls, b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").decode()


@row(REFUSED, "api.test:443 name_differs")
def tls_for_no_name(_: str) -> str:
    with _plain_context().wrap_socket(_connect("api.test:443")) as tls:
        return _ask(tls, b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").decode()


@row(REFUSED, "api.test:443 name_differs")
def tls_for_another_name_by_a_program_that_knows_no_proxy(_: str) -> str:
    with _plain_context().wrap_socket(socket.create_connection(("api.test", 443)), server_hostname="other.test") as tls:
        return _ask(tls, b"GET / HTTP/1.1\r\nHost: api.test\r\n\r\n").decode()


@row(REFUSED, "api.test:80 name_differs", "403 Forbidden")
def host_of_another_name(_: str) -> str:
    return _ask(socket.create_connection(PROXY), b"GET http://api.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n").decode()


@row(REFUSED, "api.test:80 name_differs")
def host_of_another_name_in_a_tunnel(_: str) -> str:
    return _ask(_connect("api.test:80"), b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n").decode()


@row(REFUSED, "api.test:80 name_differs")
def whole_address_of_another_name_in_a_tunnel(_: str) -> str:
    return _ask(_connect("api.test:80"), b"GET http://other.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n").decode()


@row(REFUSED, "api.test:80 malformed")
def two_hosts(_: str) -> str:
    request = b"GET / HTTP/1.1\r\nHost: api.test\r\nHost: other.test\r\n\r\n"
    return _ask(_connect("api.test:80"), request).decode()


@row(REFUSED, "api.test:80 malformed")
def body_of_two_lengths(_: str) -> str:
    request = b"POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 3\r\nContent-Length: 60\r\n\r\nabc"
    return _ask(_connect("api.test:80"), request).decode()


@row(DONE, "api.test:80 allowed", "one request")
def first_of_two_requests_without_the_second(_: str) -> str:
    one = b"GET /first HTTP/1.1\r\nHost: api.test\r\n\r\n"
    found = _ask(_connect("api.test:80"), one + one.replace(b"api", b"other").replace(b"first", b"second"))
    assert b"/first" in found
    return "one request" if b"/second" not in found else found.decode()


@row(REFUSED, "api.test:9000 malformed")
def neither_tls_nor_http(_: str) -> str:
    return _ask(_connect("api.test:9000"), b"\x00\x01\x02 something else\r\n\r\n").decode()


@row(REFUSED, "api.test:443 malformed")
def tls_that_is_broken(_: str) -> str:
    return _ask(_connect("api.test:443"), b"\x16\x03\x01\x00\x05hello").decode()


@row(REFUSED, ":0 malformed")
def no_request(_: str) -> str:
    return _ask(socket.create_connection(PROXY), bytes(range(256)) * 10 + b"\r\n\r\n").decode()


@row(REFUSED, ":0 malformed")
def endless_head(_: str) -> str:
    sock = socket.create_connection(PROXY)
    for _number in range(1000):
        sock.sendall(b"X" * 1000)
    return _ask(sock, b"").decode()


# Past the proxy.


@row(REFUSED, "")
def server_by_its_address(_: str) -> None:
    socket.create_connection(("11.1.0.1", 443), 2.0)


@row(REFUSED, "")
def metadata_by_its_address(_: str) -> None:
    socket.create_connection(("169.254.169.254", 80), 2.0)


@row(REFUSED, "")
def name_by_datagrams(_: str) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(2.0)
    sock.sendto(bytes(20), ("11.0.0.2", 53))
    sock.recv(100)


@row(REFUSED, "")
def name_that_is_not_listed(_: str) -> None:
    socket.getaddrinfo("other.test", 443)


@row(REFUSED, "")
def service_of_the_machine(_: str) -> None:
    socket.create_connection(("127.0.0.1", 8000), 2.0)


# For sandboxes of their own.


def flood(ca: str) -> dict[str, int]:
    """Open connections that send nothing, or one byte, and thousands that are refused at once."""
    idle = []
    for number in range(40):
        idle.append(socket.create_connection(PROXY))
        if number % 2:
            idle[-1].sendall(b"C")
    refused = 0
    for number in range(1500):
        with socket.create_connection(PROXY, TIMEOUT_S) as sock:
            sock.sendall(b"CONNECT name%d.test:443 HTTP/1.1\r\nHost: x\r\n\r\n" % number)
            refused += b" 403 " in sock.recv(4096)
    return {"refused": refused, "answered": "api.test" in https_by_name(ca)}


def https_by_name(ca: str) -> str:
    """Make one honest request."""
    return str(ROWS["https_by_a_program_that_knows_no_proxy"].run(ca))


def hold_a_stream(ca: str) -> str:
    """Begin an answer, and do not end."""
    with _context(ca).wrap_socket(socket.create_connection(("api.test", 443)), server_hostname="api.test") as tls:
        tls.sendall(b"GET /stream HTTP/1.1\r\nHost: api.test\r\n\r\n")
        found = tls.recv(4096)
        time.sleep(60)
        return found.decode()


def variables(_: str) -> dict[str, str]:
    """Return the variables that name the proxy, and the hosts that are known."""
    found = {name: value for name, value in os.environ.items() if "proxy" in name.lower()}
    return {**found, "hosts": open("/etc/hosts").read()}
