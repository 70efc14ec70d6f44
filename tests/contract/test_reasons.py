"""The reasons the server sends are those the contract has."""

import ast
from pathlib import Path

from lattice.v1 import errors_pb2

from lattice_server.core import errors

SERVER = Path(errors.__file__).parent.parent
KINDS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LatticeError)
}


def sent() -> set[str]:
    """Return the reason of each refusal in the server's source; a reason that is no literal is shown as source."""
    found = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in KINDS:
                reason = node.args[0]
                found.add(reason.value if isinstance(reason, ast.Constant) else ast.unparse(reason))
    return found


def test_reasons_sent_equal_the_reasons_of_the_contract() -> None:
    known = {name.removeprefix("ERROR_REASON_") for name, number in errors_pb2.ErrorReason.items() if number}
    assert sent() == known
