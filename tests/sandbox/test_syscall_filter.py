"""The system call filter, judged call by call by an interpreter of its program, and not by a kernel that may lack the
call anyway."""

import errno
import struct

import pytest

from lattice_worker.sandbox import bpf, syscall_filter
from lattice_worker.sandbox.syscalls import AARCH64, ALLOWED, REFUSED, X86_64

MACHINES = ("x86_64", "aarch64")
TABLES = {"x86_64": X86_64, "aarch64": AARCH64}
AUDIT = {machine: architecture for machine, (architecture, _) in syscall_filter.ARCHITECTURES.items()}
EPERM, ENOSYS = bpf.ERRNO | errno.EPERM, bpf.ERRNO | errno.ENOSYS
I386 = 0x40000003


def run(program: bytes, number: int, architecture: int, args: tuple[int, ...] = ()) -> int:
    """Return the verdict of a BPF program on a call."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(*args, 0, 0, 0, 0, 0, 0)[:6])
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        code, when_true, when_false, constant = instructions[position]
        position += 1
        match code:
            case bpf.LOAD_WORD:
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case bpf.JUMP:
                position += constant
            case bpf.AND:
                accumulator &= constant
            case bpf.JUMP_EQUAL:
                position += when_true if accumulator == constant else when_false
            case bpf.JUMP_AT_LEAST:
                position += when_true if accumulator >= constant else when_false
            case bpf.JUMP_IF_ANY_BIT:
                position += when_true if accumulator & constant else when_false
            case bpf.RETURN:
                return int(constant)
            case _:
                raise AssertionError(f"no such instruction: {code:#x}")


def verdict(machine: str, name: str, *args: int) -> int:
    return run(syscall_filter.program(machine), TABLES[machine][name], AUDIT[machine], args)


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_decides_every_listed_call_as_it_is_listed(machine: str) -> None:
    table = TABLES[machine]
    assert {verdict(machine, name) for name in ALLOWED if name in table} == {bpf.ALLOW}
    assert {verdict(machine, name) for name in REFUSED if name in table} == {EPERM}
    assert not set(ALLOWED) & set(REFUSED)
    assert set(table) <= {*ALLOWED, *REFUSED, *syscall_filter.JUDGED}


# Calls of x86-64 by their numbers, which reach other processes, the kernel's code, mounts, keys or clocks. They are
# written here again, so that a call that moves to the allowed ones is noticed.
REVIEWED = {
    **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "pidfd_getfd": 438},
    **{"kcmp": 312, "migrate_pages": 256, "move_pages": 279, "process_mrelease": 448, "perf_event_open": 298},
    **{"bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
    **{"io_setup": 206, "io_submit": 209, "io_getevents": 208, "io_cancel": 210, "io_destroy": 207, "seccomp": 317},
    **{"init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320},
    **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428, "move_mount": 429},
    **{"fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "unshare": 272},
    **{"setns": 308, "add_key": 248, "request_key": 249, "keyctl": 250, "memfd_secret": 447, "acct": 163},
    **{"open_by_handle_at": 304, "name_to_handle_at": 303, "fanotify_init": 300, "fanotify_mark": 301},
    **{"settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305, "reboot": 169},
    **{"sethostname": 170, "setdomainname": 171, "swapon": 167, "swapoff": 168, "syslog": 103, "vhangup": 153},
    **{"iopl": 172, "ioperm": 173, "quotactl": 179, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240},
}


def test_filter_refuses_each_call_that_was_reviewed() -> None:
    program = syscall_filter.program("x86_64")
    verdicts = {name: run(program, number, AUDIT["x86_64"]) for name, number in REVIEWED.items()}
    assert {name: found for name, found in verdicts.items() if found != EPERM} == {}
    # An argument of theirs changes nothing.
    assert {run(program, number, AUDIT["x86_64"], (1, 1, 1)) for number in REVIEWED.values()} == {EPERM}


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_does_not_know_any_other_number(machine: str) -> None:
    program, known = syscall_filter.program(machine), set(TABLES[machine].values())
    others = [number for number in (*range(1024), 0x3FFFFFFF) if number not in known]
    assert {run(program, number, AUDIT[machine]) for number in others} == {ENOSYS}
    assert 435 in others  # clone3, whose flags a filter cannot read.


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_kills_when_a_call_is_of_another_architecture(machine: str) -> None:
    program = syscall_filter.program(machine)
    foreign = {I386, *AUDIT.values()} - {AUDIT[machine]}
    assert {run(program, number, other) for other in foreign for number in range(500)} == {bpf.KILL_PROCESS}
    numbers = (0x40000000, 0x40000000 | TABLES[machine]["read"], 0xFFFFFFFF)
    assert {run(program, number, AUDIT[machine]) for number in numbers} == {bpf.KILL_PROCESS}


HIGH = 1 << 32  # The kernel reads 32 bits of these arguments.


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("socket", (1, 1, 0), bpf.ALLOW),
        *(("socket", (family, 1, 0), EPERM) for family in (0, 2, 10, 16, 17, 31, 38, 40, 44)),
        ("socket", (2, 1, 262), EPERM),
        ("socket", (HIGH | 2, 1, 0), EPERM),
        ("socketpair", (1, 1, 0), bpf.ALLOW),
        ("socketpair", (2, 1, 0), EPERM),
        ("clone", (0x11,), bpf.ALLOW),
        ("clone", (0x003D0F00,), bpf.ALLOW),  # A thread of glibc's.
        *(("clone", (0x11 | flag,), EPERM) for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000)),
        *(("clone", (0x11 | flag,), EPERM) for flag in (0x20000000, 0x40000000)),
        ("ioctl", (0, 0x5401), bpf.ALLOW),
        ("ioctl", (0, 0x5412), EPERM),
        ("ioctl", (0, HIGH | 0x5412), EPERM),
        ("ioctl", (0, 0x541C), EPERM),
        ("personality", (0,), bpf.ALLOW),
        ("personality", (0xFFFFFFFF,), bpf.ALLOW),
        ("personality", (0x0400000,), EPERM),
    ],
)
def test_filter_judges_arguments(machine: str, name: str, args: tuple[int, ...], expected: int) -> None:
    assert verdict(machine, name, *args) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_filter_is_one_the_kernel_takes(machine: str) -> None:
    instructions = list(struct.iter_unpack("<HBBI", syscall_filter.program(machine)))
    assert len(instructions) <= 4096
    for position, (code, when_true, when_false, constant) in enumerate(instructions):
        jumps = (constant,) if code == bpf.JUMP else (when_true, when_false)
        assert code == bpf.RETURN or all(position + 1 + jump < len(instructions) for jump in jumps)


@pytest.mark.parametrize("name", ["ptrace", "mount", "unshare", "socket", "clone", "ioctl", "io_uring_setup"])
def test_filter_allows_the_call_when_its_rule_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter sees the rule and not something else that refuses the call."""
    judged = {other: rule for other, rule in syscall_filter.JUDGED.items() if other != name}
    monkeypatch.setattr(syscall_filter, "JUDGED", judged)
    monkeypatch.setattr(syscall_filter, "REFUSED", [other for other in REFUSED if other != name])
    monkeypatch.setattr(syscall_filter, "ALLOWED", (*ALLOWED, name))
    syscall_filter.program.cache_clear()
    try:
        assert verdict("x86_64", name, 2, 0x5412) == bpf.ALLOW
    finally:
        syscall_filter.program.cache_clear()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((1, 1, 0), bpf.ALLOW),
        *(
            ((family, 1 | flags, protocol), bpf.ALLOW)
            for family in (2, 10)
            for flags in (0, 0o2004000)
            for protocol in (0, 6)
        ),
        *(((family, kind, 0), EPERM) for family in (2, 10) for kind in (0, 2, 3, 5, 10, 0o2004002)),
        *(((2, 1, protocol), EPERM) for protocol in (1, 17, 132, 262)),
        *(((family, 1, 0), EPERM) for family in (0, 16, 17, 31, 38, 40, 44)),
    ],
)
def test_filter_with_servers_allows_sockets_of_tcp_besides(machine: str, args: tuple[int, ...], expected: int) -> None:
    program = syscall_filter.program(machine, has_network=True)
    assert run(program, TABLES[machine]["socket"], AUDIT[machine], args) == expected
    assert run(program, TABLES[machine]["unshare"], AUDIT[machine]) == EPERM
