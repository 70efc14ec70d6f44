"""Generates the Python stubs of the contract beside the .proto files.

Usage: python scripts/generate_stubs.py [OUTPUT_DIR]

Run by `make proto` with the oldest grpcio-tools the project supports: generated code runs on the protobuf runtime it
was made for and on newer ones, never on older ones.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

SOURCE = Path(__file__).resolve().parent.parent / "proto"


def generate(output: Path) -> int:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` below `output`; returns protoc's exit status."""
    well_known = Path(protoc.__file__).parent / "_proto"
    files = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{SOURCE}",
        f"-I{well_known}",
        f"--python_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_out=quiet:{output}",
        f"--mypy_grpc_out=quiet:{output}",
    ]
    return int(protoc.main([*arguments, *files]))


if __name__ == "__main__":
    sys.exit(generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE))
