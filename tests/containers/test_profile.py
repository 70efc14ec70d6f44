"""The engine's profile against the filter: what both decide about each call, and about the arguments that matter."""

import errno
import json
import platform
from typing import Any

import pytest

from lattice_worker.containers.profile import profile
from lattice_worker.sandbox import bpf, syscall_filter
from lattice_worker.sandbox.syscalls import AARCH64, ALLOWED, REFUSED, X86_64
from tests.sandbox.test_syscall_filter import verdict

MACHINES = ("x86_64", "aarch64")
CLONE_THREAD, CLONE_NEWUSER, CLONE_NEWNET = 0x00010000, 0x10000000, 0x40000000


def decide(found: dict[str, Any], name: str, *args: int) -> int:
    """Return the decision of an engine about a call, as a verdict of the filter."""
    answers = set()
    for rule in found["syscalls"]:
        if name in rule["names"] and all(_holds(condition, args) for condition in rule.get("args", ())):
            answers.add(_answer(rule["action"], rule.get("errnoRet", 0)))
    assert len(answers) <= 1, f"{name}{args} has several answers"
    return answers.pop() if answers else _answer(found["defaultAction"], found["defaultErrnoRet"])


def _holds(condition: dict[str, Any], args: tuple[int, ...]) -> bool:
    value = args[condition["index"]]
    match condition["op"]:
        case "SCMP_CMP_EQ":
            return bool(value == condition["value"])
        case "SCMP_CMP_NE":
            return bool(value != condition["value"])
        case "SCMP_CMP_MASKED_EQ":
            return bool(value & condition["value"] == condition["valueTwo"])
    raise AssertionError(condition["op"])


def _answer(action: str, number: int) -> int:
    return bpf.ALLOW if action == "SCMP_ACT_ALLOW" else bpf.ERRNO | number


@pytest.mark.parametrize("machine", MACHINES)
def test_profile_decides_each_call_as_the_filter_does_when_no_argument_matters(machine: str) -> None:
    found = profile(machine)
    table = X86_64 if machine == "x86_64" else AARCH64
    names = [name for name in (*ALLOWED, *REFUSED) if name in table and name != "seccomp"]
    assert [decide(found, name, 0) for name in names] == [verdict(machine, name) for name in names]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("socket", (family,)) for family in (1, 2, 10, 16, 17, 38, 40)),
        ("socketpair", (2,)),
        *(("clone", (flags,)) for flags in (0, CLONE_THREAD, CLONE_NEWUSER, CLONE_THREAD | CLONE_NEWNET)),
        ("personality", (0,)),
        ("personality", (0xFFFFFFFF,)),
    ],
)
def test_profile_decides_by_arguments_as_the_filter_does(name: str, arguments: tuple[int, ...]) -> None:
    assert decide(profile("x86_64"), name, *arguments) == verdict("x86_64", name, *arguments)


def test_profile_refuses_every_clone_that_makes_a_namespace() -> None:
    found = profile("x86_64")
    bits = [1 << bit for bit in range(32) if syscall_filter.NEW_NAMESPACES >> bit & 1]
    # One flag alone; with several flags more than one rule refuses the call, each in the same way.
    assert {decide(found, "clone", bit) for bit in bits} == {bpf.ERRNO | errno.EPERM}


def test_profile_does_not_know_calls_that_no_list_has() -> None:
    found = profile(platform.machine())
    assert {decide(found, name, 0) for name in ("clone3", "statmount", "landlock_restrict_self")} == {
        bpf.ERRNO | errno.ENOSYS
    }
    # Needed until the process has loaded the filter itself, which refuses it.
    assert decide(found, "seccomp", 0) == bpf.ALLOW
    json.dumps(found)
