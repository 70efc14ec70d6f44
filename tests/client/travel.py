"""Code in transit: one process packs a function, and another process without its files calls it.

The second process loads it as a runner does. Both are started here, without a server.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The module that the programs import to send a function; it counts as installed.
SENDER = """
import os, pickle
from lattice_client.convert import payloads
from lattice_client.graph.definition import TaskDefinition, define

def send(function, **inputs):
    task = function if isinstance(function, TaskDefinition) else define(function)
    form, bundle = task.pack()
    with open(os.environ["SENT"], "wb") as file:
        pickle.dump((form.python.pickle, bundle.zip if bundle else b"", payloads.encode(inputs)), file)
"""

# Calls the sent function, and prints its result as JSON.
CALLER = """
import io, json, os, pickle, sys, traceback, zipfile
sys.path.pop(0)  # the folder of this program
from lattice_worker.runner.invocation.functions import load
from lattice_worker.runner.encoding.values import PayloadError, decode_value

sys.modules["caller"] = sys.modules["__main__"]
sent, folder = sys.argv[1:]
blob, archive, inputs = pickle.load(open(sent, "rb"))
bundle = ""
if archive:
    bundle = os.path.join(folder, "bundle")
    zipfile.ZipFile(io.BytesIO(archive)).extractall(bundle)
definition = {"bundle": bundle, "code": "pickle", "name": "work"}
said = {"files": sorted(zipfile.ZipFile(io.BytesIO(archive)).namelist()) if archive else []}
try:
    loaded = load(definition, blob)
    loaded.enter()
    try:
        said["result"] = loaded.function(**decode_value(*inputs))
    except Exception as error:
        loaded.explain(error)
        raise
except Exception as error:
    said["error"] = "".join(traceback.format_exception(error)).replace(bundle + "/", "") if bundle else "".join(
        traceback.format_exception(error))
print("said:" + json.dumps(said))
"""


@dataclass(frozen=True, slots=True)
class Said:
    """The result of a call, or its error; and the files that were sent with the function."""

    result: Any
    error: str
    files: list[str]


class Travel:
    """Programs in a folder of their own, and the functions they send."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self._folder = folder
        self._tools = folder / "site-packages"
        self._tools.mkdir()
        self.project.mkdir()
        (self._tools / "sender.py").write_text(SENDER)
        (folder / "caller.py").write_text(CALLER)

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write files of the project by their paths."""
        for name, text in files.items():
            path = self.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def send(
        self, *command: str, cwd: str = ".", path: Sequence[str] = (), stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program that sends a function; `path` are folders of the project on its `sys.path`."""
        folders = [*(str(self.project / entry) for entry in path), str(self._tools)]
        return subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "SENT": str(self._folder / "sent")},
            cwd=self.project / cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def sent(self) -> bytes:
        """Return the pickle of the function that was sent."""
        return bytes(pickle.loads((self._folder / "sent").read_bytes())[0])

    def call(self) -> Said:
        """Call the function that was sent, on a machine that has none of the project's files."""
        self.project.rename(self._folder / "gone")
        done = subprocess.run(
            [sys.executable, str(self._folder / "caller.py"), str(self._folder / "sent"), str(self._folder)],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("said:")]
        assert lines, done.stdout + done.stderr
        said = json.loads(lines[-1].removeprefix("said:"))
        return Said(said.get("result"), said.get("error", ""), said["files"])

    def run(self, *command: str, cwd: str = ".", path: Sequence[str] = (), stdin: str | None = None) -> Said:
        """Run a program that sends a function, and call the function elsewhere."""
        done = self.send(*command, cwd=cwd, path=path, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return self.call()
