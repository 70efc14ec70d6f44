"""The system call profile of containers, in the form that container engines take, made from the table of the filter.

Rule: the profile allows the calls of the filter, and `seccomp`, by which a process in the container loads that filter.
The filter is exact where the form is not: it ends processes that use another architecture's calls.
"""

import errno
from typing import Any

from lattice_worker.sandbox import syscall_filter
from lattice_worker.sandbox.syscalls import ALLOWED, REFUSED

ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def profile(machine: str, *, has_network: bool = False) -> dict[str, Any]:
    """Return the profile for an architecture, as `platform.machine` names it. Raises KeyError for an unknown one.

    With a network it also allows sockets of TCP, which reach no further than the loopback of the container.
    """
    return {
        # Calls that are in no list fail as on a kernel that lacks them.
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [ARCHITECTURES[machine]],
        "syscalls": [
            {"names": sorted({*ALLOWED, "seccomp", "ioctl"}), "action": "SCMP_ACT_ALLOW"},
            _refused(sorted({*REFUSED} - {"seccomp"})),
            # An engine that does not know `defaultErrnoRet` refuses with EPERM, and C libraries then start no thread.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
            *(_sockets_with_tcp() if has_network else _sockets()),
            *_clone(),
            *_personality(),
        ],
    }


def _refused(names: list[str], *arguments: dict[str, Any]) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM, "args": list(arguments)}


def _allowed(names: list[str], *arguments: dict[str, Any]) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ALLOW", "args": list(arguments)}


def _argument(operator: str, value: int, mask_result: int = 0, *, index: int = 0) -> dict[str, Any]:
    """Return a condition on an argument of a call, by default the first."""
    return {"index": index, "value": value, "valueTwo": mask_result, "op": f"SCMP_CMP_{operator}"}


def _sockets() -> list[dict[str, Any]]:
    names = ["socket", "socketpair"]
    return [
        _allowed(names, _argument("EQ", syscall_filter.AF_UNIX)),
        _refused(names, _argument("NE", syscall_filter.AF_UNIX)),
    ]


def _sockets_with_tcp() -> list[dict[str, Any]]:
    stream = _argument("MASKED_EQ", syscall_filter.SOCKET_TYPES, syscall_filter.SOCK_STREAM, index=1)
    # Any other socket fails as a call that is in no list, until the exact filter refuses it with EPERM.
    return [
        _allowed(["socket", "socketpair"], _argument("EQ", syscall_filter.AF_UNIX)),
        *(_allowed(["socket"], _argument("EQ", family), stream) for family in syscall_filter.INTERNET),
    ]


def _clone() -> list[dict[str, Any]]:
    flags = syscall_filter.NEW_NAMESPACES
    bits = [1 << bit for bit in range(flags.bit_length()) if flags >> bit & 1]
    return [
        _allowed(["clone"], _argument("MASKED_EQ", flags, 0)),
        *(_refused(["clone"], _argument("MASKED_EQ", bit, bit)) for bit in bits),
    ]


def _personality() -> list[dict[str, Any]]:
    return [_allowed(["personality"], _argument("EQ", value)) for value in syscall_filter.PERSONALITIES]
