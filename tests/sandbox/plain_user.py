"""A program: sandboxes of an agent that is not root. Prints the verdicts of two attempts and the facts as JSON.

It is started by root, and becomes a plain user that can read the interpreter. With arguments it becomes that program.
"""

import asyncio
import json
import os
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lattice_worker.egress.agent import Egress
from lattice_worker.sandbox import facts, libc
from lattice_worker.sandbox.policy import LEVELS, SUBPROCESS, interpreter_paths, policy_of
from lattice_worker.sandbox.supervisor import SandboxError

UID = 54321


def become_plain_user() -> None:
    """Give up being root, in a mount namespace where every folder above the interpreter can be entered."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    for path in map(Path, interpreter_paths()):
        closed = [parent for parent in path.parents if not parent.stat().st_mode & 1]
        if closed:
            aside = tempfile.mkdtemp(dir="/dev/shm")
            libc.mount(str(path), aside, flags=libc.MS_BIND)
            libc.mount("tmpfs", str(closed[-1]), "tmpfs", data="mode=755")
            path.mkdir(parents=True)
            libc.mount(aside, str(path), flags=libc.MS_BIND)
            libc.detach(aside)
            os.rmdir(aside)
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


async def main(folder: Path) -> dict[str, Any]:
    """Return the verdicts of each level, and of `subprocess` without namespaces."""
    from tests.sandbox.boxes import boxes

    found: dict[str, Any] = {}
    egress = Egress()
    async with boxes(folder, egress) as start:
        policies = {level: policy_of(level) for level in LEVELS}
        for name, policy in (policies | {"bare": replace(policies[SUBPROCESS], is_bare=True)}).items():
            try:
                box = await start(policy)
                root, namespaces = os.stat("/").st_dev, facts.namespaces()
                found[name] = {
                    "missing": facts.missing(policy, box.facts, namespaces, root),
                    "result": await box.run(attempt, os.getpid()),
                }
                if not policy.is_bare:
                    found[name]["network"] = await _with_network(start, policy.level)
            except SandboxError as error:
                found[name] = {"missing": [str(error)]}
    egress.close()
    await egress.wait_closed()
    return found


async def _with_network(start: Any, level: str) -> str:
    """Return the result of a request to a server that is not listed."""
    box = await start(policy_of(level, network=("a.invalid:443",)))
    found = await box.run(request)
    return f"{found} {box.accesses[0]['verdict']}"


def request() -> str:
    """Ask the proxy for a server."""
    with socket.create_connection(("127.0.0.1", 3128), 10) as sock:
        sock.sendall(b"CONNECT b.invalid:443 HTTP/1.1\r\nHost: b.invalid\r\n\r\n")
        return sock.recv(4096).split(b"\r\n")[0].decode()


def attempt(agent: int) -> dict[str, str]:
    """Return the things that a sandboxed function can reach."""

    def outcome(call: Any) -> str:
        try:
            call()
        except OSError as error:
            return type(error).__name__
        return "done"

    return {
        "list_root": outcome(lambda: os.listdir("/")),
        "signal_agent": outcome(lambda: os.kill(agent, 0)),
        "read_agent": outcome(lambda: open(f"/proc/{agent}/environ").read()),
        "write_scratch": outcome(lambda: Path("x").write_text("x")),
        "write_outside": outcome(lambda: Path("/var/tmp/x").write_text("x")),
    }


if __name__ == "__main__":
    become_plain_user()
    if sys.argv[1:]:
        os.execv(sys.argv[1], sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="lattice-tests-") as temporary:
        json.dump(asyncio.run(main(Path(temporary))), sys.stdout)
