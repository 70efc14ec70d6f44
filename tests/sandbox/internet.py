"""An internet of the tests' own: a namespace with a DNS server, and web servers at public and at inner addresses.

Rule: this process is moved into a namespace that has a route to it. Nothing outside of the two is touched.
"""

import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lattice_worker.sandbox import libc
from tests.certificates import certificates

NODE, GATEWAY, WEB, OTHER_WEB = "11.0.0.1", "11.0.0.2", "11.1.0.1", "11.1.0.2"
METADATA, INNER, AZURE = "169.254.169.254", "10.9.9.9", "168.63.129.16"
HTTPS, HTTP, ODD, RAW = 443, 80, 8443, 9000
# The questions for a name get its answers in turn.
NAMES: dict[str, list[str]] = {
    "api.test": [WEB],
    "other.test": [WEB],
    "a.wild.test": [OTHER_WEB],
    "wild.test": [OTHER_WEB],
    "malicious-api.test": [WEB],
    "metadata.test": [METADATA],
    "inner.test": [INNER],
    "azure.test": [AZURE],
    "own.test": [NODE],
    "loopback.test": ["127.0.0.1"],
    "zero.test": ["0.0.0.0"],
    "mapped.test": [f"::ffff:{INNER}"],
    "embedded.test": ["64:ff9b::a09:909"],
    "rebind.test": [WEB, INNER],
    "closed.test": [WEB],
}
A, AAAA = 1, 28


def answer(question: bytes, counts: Counter[str]) -> bytes:
    """Return the answer of the DNS server to one question."""
    at, labels = 12, []
    while size := question[at]:
        labels.append(question[at + 1 : at + 1 + size].decode())
        at += 1 + size
    name, (kind,) = ".".join(labels).lower(), struct.unpack_from(">H", question, at + 1)
    known = NAMES.get(name)
    record = b""
    if known is not None:
        address = known[counts[name] % len(known)]
        is_v6 = ":" in address
        if (kind == AAAA) == is_v6 and kind in {A, AAAA}:
            counts[name] += 1
            packed = socket.inet_pton(socket.AF_INET6 if is_v6 else socket.AF_INET, address)
            record = struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(packed)) + packed
    flags = 0x8180 if known is not None else 0x8183
    return question[:2] + struct.pack(">HHHHH", flags, 1, bool(record), 0, 0) + question[12 : at + 5] + record


def serve_dns() -> None:
    """Answer questions."""
    counts: Counter[str] = Counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 53))
        while True:
            question, asker = server.recvfrom(4096)
            server.sendto(answer(question, counts), asker)


def serve_web(port: int, context: ssl.SSLContext | None) -> None:
    """Answer each request with its method, its path and its Host, and the size of its body."""
    with socket.create_server(("0.0.0.0", port), backlog=1000) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_answer_web, args=(connection, context), daemon=True).start()


def _answer_web(connection: socket.socket, context: ssl.SSLContext | None) -> None:
    try:
        with connection if context is None else context.wrap_socket(connection, server_side=True) as client:
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (part := client.recv(65536)):
                        return
                    head += part
                head, _, body = head.partition(b"\r\n\r\n")
                first, *fields = head.decode("latin1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
                size = int(headers.get("content-length", 0))
                received = len(body)
                while received < size:
                    received += len(client.recv(1 << 20)) or size
                text = f"{first} | {headers.get('host')} | {received}".encode()
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                if "/stream" in first:
                    time.sleep(60)
    except OSError:
        pass


def serve_raw() -> None:
    """Answer each connection with one line and close it."""
    with socket.create_server(("0.0.0.0", RAW)) as server:
        while True:
            connection, _ = server.accept()
            connection.sendall(b"raw server\n")
            connection.close()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def internet(folder: Path) -> Iterator[Path]:
    """Have an internet while the block runs, and this process on it; yield the authority of its certificates."""
    libc.unshare(libc.CLONE_NEWNET | libc.CLONE_NEWNS)
    libc.mount("", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    for name, text in (("resolv.conf", f"nameserver {GATEWAY}\noptions timeout:2 attempts:1\n"), ("hosts", "")):
        (folder / name).write_text(text)
        libc.mount(str(folder / name), os.path.realpath(f"/etc/{name}"), flags=libc.MS_BIND)
    found = certificates(folder, *NAMES)
    _ip("link", "set", "lo", "up")
    command = [sys.executable, "-m", "tests.sandbox.internet", str(found.cert), str(found.key)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as servers:
        assert servers.stdin is not None
        assert servers.stdout is not None
        assert servers.stdout.readline() == "apart\n"
        _ip("link", "add", "outside", "type", "veth", "peer", "name", "inside", "netns", str(servers.pid))
        _ip("addr", "add", f"{NODE}/24", "dev", "outside")
        _ip("link", "set", "outside", "up")
        _ip("route", "add", "default", "via", GATEWAY)
        servers.stdin.write("go\n")
        servers.stdin.flush()
        assert servers.stdout.readline() == "serving\n"
        try:
            yield found.ca
        finally:
            servers.kill()


def main() -> None:
    """Be the other end of the network."""
    libc.unshare(libc.CLONE_NEWNET)
    libc.prctl(libc.PR_SET_PDEATHSIG, 9)
    print("apart", flush=True)
    sys.stdin.readline()
    _ip("link", "set", "lo", "up")
    _ip("addr", "add", f"{GATEWAY}/24", "dev", "inside")
    for address in (WEB, OTHER_WEB, METADATA, INNER, AZURE):
        _ip("addr", "add", f"{address}/32", "dev", "lo")
    _ip("link", "set", "inside", "up")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    serving: list[tuple[Any, ...]] = [(serve_dns,), (serve_raw,), (serve_web, HTTP, None)]
    serving += [(serve_web, port, context) for port in (HTTPS, ODD)]
    for target, *args in serving:
        threading.Thread(target=target, args=args, daemon=True).start()
    for port in (HTTP, HTTPS, ODD, RAW):
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.01)
    print("serving", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
