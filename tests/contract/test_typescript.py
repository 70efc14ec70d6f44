"""TypeScript that is generated from the contract compiles, and so does a client on it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = ROOT / "tests" / "tools" / "node_modules"
BUF = str(Path(sys.executable).parent / "buf")
OPTIONS = [
    "outputServices=grpc-js",
    "esModuleInterop=true",
    "forceLong=number",
    "useExactTypes=false",
    "outputJsonMethods=false",
]
COMPILING = {
    "compilerOptions": {
        "strict": True,
        "noEmit": True,
        "target": "ES2022",
        "module": "CommonJS",
        "moduleResolution": "Node10",
        "esModuleInterop": True,
        "skipLibCheck": True,
        "types": ["node"],
    },
    "include": ["*.ts"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with generated stubs and a client."""
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js")
    subprocess.run(["make", "nodejs"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    (tmp_path / "node_modules").symlink_to(MODULES)
    plugin = {"local": str(MODULES / ".bin" / "protoc-gen-ts_proto"), "out": "gen", "opt": OPTIONS}
    template = {"version": "v2", "plugins": [{**plugin, "include_imports": True, "include_wkt": True}]}
    command = [BUF, "generate", "--template", json.dumps(template), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    shutil.copy(Path(__file__).parent / "client.ts", tmp_path)
    (tmp_path / "tsconfig.json").write_text(json.dumps(COMPILING))
    return tmp_path


@pytest.mark.slow
@pytest.mark.exhaustive  # The Go example, which other tests run, is built on generated stubs too.
@pytest.mark.timeout(300)  # the compiler takes 10 s of a processor
def test_a_client_on_generated_typescript_compiles(folder: Path) -> None:
    assert {path.stem for path in (folder / "gen" / "lattice" / "v1").iterdir()} == {
        path.stem for path in (ROOT / "proto" / "lattice" / "v1").glob("*.proto")
    }
    command = [str(MODULES / ".bin" / "tsc"), "--project", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout) == (0, "")
