"""The switch LATTICE_REQUIRE_ALL, on a small set of tests of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no GPU")
def test_gpu(): ...

@pytest.mark.skipif(True, reason="no engine")
def test_marked(): ...

def test_inside():
    pytest.skip("no node")

@pytest.fixture
def part():
    pytest.skip("no part")

def test_fixture(part): ...

@pytest.mark.xfail
def test_expected(): assert False

def test_plain(): ...
"""
MODULE = "import pytest\npytest.importorskip('there_is_no_such_module')\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "summary"),
    [("", "1 passed, 5 skipped, 1 xfailed"), ("1", "1 failed, 1 passed, 1 skipped, 1 xfailed, 3 errors")],
)
def test_a_skip_is_a_failure_when_all_is_required(tmp_path: Path, switch: str, summary: str) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "test_module.py").write_text(MODULE)
    options = ["--continue-on-collection-errors", "--basetemp", str(tmp_path / "base")]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    environment = {**os.environ, "LATTICE_REQUIRE_ALL": switch, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert summary in done.stdout
    assert (done.returncode == 0) is (switch == "")
    assert ("allows no skipped test. Skipped: no part" in done.stdout) is (switch == "1")
