"""Owns the checks of this machine: the client's packages, Ray, and the resources that a worker could offer.

Rule: the packages of servers and workers are run in processes of their own and not imported: they may be missing, and
importing Ray takes seconds.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from lattice_client.cli.findings import ERROR, OK, SKIPPED, WARNING, Finding
from lattice_client.cli.groups import DISTRIBUTION

LIMIT_S = 120.0
WORKER_MODULE = "lattice_worker.doctor"
PACKAGES = ("grpcio", "protobuf", "cloudpickle")


def client_checks() -> Iterator[Finding]:
    """Yield what this client is."""
    version = _version(DISTRIBUTION)
    packages = ", ".join(f"{name} {_version(name) or 'unknown'}" for name in PACKAGES)
    text = f"lattice {version or 'unknown'}, Python {platform.python_version()}, {packages}"
    if version:
        yield Finding("client", "version", OK, text)
    else:
        advice = f"install it with pip: pip install {DISTRIBUTION}"
        yield Finding("client", "version", WARNING, f"{text}; the package is not installed", advice)


def machine_checks() -> Iterator[Finding]:
    """Yield what this machine could do as a server or a worker."""
    yield from _worker_checks()
    yield _ray_check()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run this interpreter. Raises OSError, subprocess.TimeoutExpired."""
    return subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LIMIT_S,
        check=False,
    )


def _worker_checks() -> Iterator[Finding]:
    try:
        done = _run("-m", WORKER_MODULE)
    except (OSError, subprocess.TimeoutExpired) as error:
        advice = "if this machine is to run tasks, start a worker with --log-level debug and read its log"
        yield Finding("machine", "worker", ERROR, f"the checks of a worker did not end: {error}", advice)
        return
    for line in done.stdout.splitlines():
        try:
            found = json.loads(line)
            yield Finding("machine", found["name"], found["status"], found["found"], found["advice"])
        except (ValueError, TypeError, KeyError):  # A library that prints when it is imported.
            continue
    if done.returncode == 0:
        return
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if "ModuleNotFoundError" in reason or sys.platform != "linux":
        advice = f'to run tasks on this machine: pip install "{DISTRIBUTION}[worker]", on Linux'
        yield Finding("machine", "worker", SKIPPED, f"no worker can run here: {reason}", advice)
    else:
        yield Finding("machine", "worker", ERROR, f"the checks of a worker failed: {reason}", "report this as a bug")


def _ray_check() -> Finding:
    version, wanted = _version("ray"), _wanted("ray")
    if not version:
        advice = f'use --executor local, or: pip install "{DISTRIBUTION}[ray]"'
        return Finding("machine", "ray", SKIPPED, "Ray is not installed: --executor ray cannot be used here", advice)
    text = f"Ray {version}"
    if wanted and not _fits(version, wanted):
        advice = f'pip install "ray[default]{wanted}", or use --executor local'
        return Finding(
            "machine", "ray", ERROR, f"{text} is installed, and this version of Lattice needs {wanted}", advice
        )
    try:
        done = _run("-c", "import ray")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("machine", "ray", ERROR, f"{text} cannot be imported: {error}", "use --executor local")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        advice = f'pip install --force-reinstall "{DISTRIBUTION}[ray]", or use --executor local'
        return Finding("machine", "ray", ERROR, f"{text} cannot be imported: {reason}", advice)
    return Finding("machine", "ray", OK, f"{text} can be imported{f'; supported are {wanted}' if wanted else ''}")


def _wanted(package: str) -> str:
    """Return the versions of a package that this version of Lattice supports, such as `<2.61,>=2.50`."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ""
    found = [Requirement(line) for line in lines]
    return next((str(line.specifier) for line in found if line.name == package and str(line.specifier)), "")


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
