"""The program of an instance that is a Python function: reads the function from its standard input, and calls it.

`LATTICE_SERVICE_ENTRYPOINT` names a function that is installed here instead, as `package.module:name`.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.invocation.functions import load_pickle


def function(entrypoint: str) -> Callable[..., Any]:
    """Return the function to call. Raises whatever its import or its pickle raises."""
    if not entrypoint:
        loaded = load_pickle(sys.stdin.buffer.read())
        loaded.enter()
        return loaded.function
    module, _, name = entrypoint.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    called: Callable[..., Any] = getattr(found, "__wrapped__", found)
    return called


def main() -> None:
    """Call the function with the address at which it has to serve."""
    entrypoint = os.environ.pop("LATTICE_SERVICE_ENTRYPOINT", "")
    host, port = os.environ["LATTICE_SERVICE_HOST"], int(os.environ["LATTICE_SERVICE_PORT"])
    function(entrypoint)(host=host, port=port)


if __name__ == "__main__":
    main()
