"""The system call filter of the level `seccomp`.

Rule: a call is allowed when it is listed. A call that is known and not allowed fails with EPERM, a call that is not
known with ENOSYS, and a call of another architecture's table ends the process.
"""

import errno
import functools
import platform

from lattice_worker.sandbox import bpf
from lattice_worker.sandbox.syscalls import AARCH64, ALLOWED, REFUSED, X86_64

ARCHITECTURES = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}
X32_BIT = 0x40000000  # Calls of the x32 table say that they are of x86-64.

NEW_NAMESPACES = 0x7E020000  # The flags of `clone` that make namespaces.
AF_UNIX = 1
INTERNET = (2, 10)  # AF_INET and AF_INET6.
SOCK_STREAM, SOCKET_TYPES = 1, 0xF  # The other bits of a type are flags.
IPPROTO_TCP = 6
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # These write to a terminal as if a person did.
PERSONALITIES = (0, 0xFFFFFFFF)  # Linux itself, and the question which one it is.

_ALLOW, _REFUSE, _UNKNOWN = bpf.answer(bpf.ALLOW), bpf.refuse(errno.EPERM), bpf.refuse(errno.ENOSYS)
JUDGED: dict[str, bpf.Rule] = {
    # No network: without a route, and without sockets that need none.
    "socket": tuple(bpf.if_among(bpf.argument(0), (AF_UNIX,), _ALLOW, _REFUSE)),
    "socketpair": tuple(bpf.if_among(bpf.argument(0), (AF_UNIX,), _ALLOW, _REFUSE)),
    # Of `clone3` the flags lie in memory, where a filter cannot read them: it is not known here, and `clone` is used.
    "clone": tuple(bpf.if_any_bit(bpf.argument(0), NEW_NAMESPACES, _REFUSE, _ALLOW)),
    "ioctl": tuple(bpf.if_among(bpf.argument(1), (TIOCSTI, TIOCLINUX), _REFUSE, _ALLOW)),
    "personality": tuple(bpf.if_among(bpf.argument(0), PERSONALITIES, _ALLOW, _REFUSE)),
}


def is_supported(machine: str = "") -> bool:
    """Whether there is a filter for an architecture, by default this machine's."""
    return (machine or platform.machine()) in ARCHITECTURES


# With an allow list of servers there are sockets of TCP as well: they reach the loopback of the sandbox.
TCP: bpf.Rule = tuple(
    bpf.if_among(
        bpf.argument(0),
        (AF_UNIX,),
        _ALLOW,
        bpf.if_among(
            bpf.argument(0),
            INTERNET,
            bpf.if_among(
                bpf.argument(1),
                (SOCK_STREAM,),
                bpf.if_among(bpf.argument(2), (0, IPPROTO_TCP), _ALLOW, _REFUSE),
                _REFUSE,
                mask=SOCKET_TYPES,
            ),
            _REFUSE,
        ),
    )
)


@functools.cache
def program(machine: str = "", *, has_network: bool = False) -> bytes:
    """Return the filter for an architecture, by default this machine's, as the kernel takes it."""
    machine = machine or platform.machine()
    architecture, numbers = ARCHITECTURES[machine]
    rules: dict[int, bpf.Rule] = {numbers[name]: (_ALLOW,) for name in ALLOWED if name in numbers}
    rules |= {numbers[name]: (_REFUSE,) for name in REFUSED if name in numbers}
    rules |= {numbers[name]: rule for name, rule in JUDGED.items()}
    if has_network:
        rules[numbers["socket"]] = TCP
    kill = bpf.answer(bpf.KILL_PROCESS)
    start = [
        bpf.load(bpf.ARCHITECTURE_OFFSET),
        (bpf.JUMP_EQUAL, 1, 0, architecture),
        kill,
        bpf.load(bpf.NUMBER_OFFSET),
        (bpf.JUMP_AT_LEAST, 0, 1, X32_BIT),
        kill,
    ]
    return bpf.assemble([*start, *bpf.search(rules, (_UNKNOWN,))])
