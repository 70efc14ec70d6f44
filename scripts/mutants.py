"""Breaks the code in one line at a time and tells which breaks the tests notice; see `tests/mutants.txt`.

Usage: python scripts/mutants.py [SUBSTRING]

Each break is made in a copy of the checkout, whose tests run against the copy. With a substring, only the breaks of
files whose path contains it. Exits with 1 when a break goes unnoticed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("lattice_client", "lattice_server", "lattice_worker", "proto", "tests", "docs", "examples", "benchmarks")
LEFT_OUT = ("node_modules", "__pycache__", ".build")
LIMIT_S = 300


def mutants() -> list[dict[str, str]]:
    """Return the breaks."""
    blocks = (ROOT / "tests" / "mutants.txt").read_text().split("\n\n")
    found = [dict(line.split(" ", 1) for line in block.strip("\n").splitlines()) for block in blocks[1:]]
    for mutant in found:
        text = (ROOT / mutant["file"]).read_text()
        if f"{mutant['line']}\n" not in text:
            sys.exit(f"{mutant['file']} has no line {mutant['line']!r}")
    return found


def is_noticed(mutant: dict[str, str], folder: Path) -> bool:
    """Whether a test fails with a break."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    broken = folder / mutant["file"]
    broken.write_text(broken.read_text().replace(f"{mutant['line']}\n", f"{mutant['then']}\n", 1))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant["test"])]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{folder / 'proto'}"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in {0, 1}:
        # The break counts as unnoticed: a test that was renamed notices nothing.
        print(f"pytest {mutant['test']} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


def main() -> None:
    """Try all breaks."""
    chosen = [mutant for mutant in mutants() if "".join(sys.argv[1:]) in mutant["file"]]
    noticed = 0
    for mutant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = is_noticed(mutant, Path(folder))
        noticed += found
        print(f"{'noticed  ' if found else 'UNNOTICED'} {mutant['file']}: {mutant['then'].strip()}", flush=True)
    print(f"{noticed}/{len(chosen)}")
    sys.exit(noticed < len(chosen))


if __name__ == "__main__":
    main()
