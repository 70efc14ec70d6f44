"""What code in a sandbox tries. Each function runs inside, alone in a child process; it raises OSError when it is
refused and returns normally when it got through. Standard library only."""
# ruff: noqa: SIM115

import ctypes
import mmap
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Outside = dict[str, Any]
REFUSED, DONE, ENDED = "refused", "done", "ended"
SYSCALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "pidfd_open": (434, 434),
    "open_by_handle_at": (304, 265),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "clone3": (435, 435),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "setns": (308, 268),
    "personality": (135, 92),
    "clock_settime": (227, 112),
    "shmget": (29, 194),
}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Attempt:
    """One row of the table: what each level does about it. An empty verdict means that the level does not claim it."""

    run: Callable[[Outside], object]
    subprocess: str
    seccomp: str


ATTEMPTS: dict[str, Attempt] = {}


def attempt(*, subprocess: str = REFUSED, seccomp: str = REFUSED) -> Callable[[Callable[[Outside], object]], None]:
    """Register a function as an attempt, by its name."""

    def register(run: Callable[[Outside], object]) -> None:
        ATTEMPTS[run.__name__] = Attempt(run, subprocess, seccomp)

    return register


def call(name: str, *args: object) -> int:
    """Make a system call. Raises OSError."""
    number = SYSCALLS[name][os.uname().machine == "aarch64"]
    return _checked(_libc.syscall(ctypes.c_long(number), *args))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def verdicts(outside: Outside) -> dict[str, str]:
    """Make all attempts, one after the other."""
    return {name: _verdict(found.run, outside) for name, found in ATTEMPTS.items()}


def _verdict(run: Callable[[Outside], object], outside: Outside) -> str:
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.close(read)
        text = DONE
        try:
            run(outside)
        except (OSError, RuntimeError, ValueError) as error:  # So Python says of threads and of limits.
            text = f"{REFUSED}: {error}"
        except BaseException as error:
            text = f"broken: {type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    text = b""
    while part := os.read(read, 1000):
        text += part
    os.close(read)
    os.waitpid(pid, 0)
    return text.decode() or ENDED


# Files.


@attempt()
def read_password_hashes(_: Outside) -> None:
    open("/etc/shadow").read()


@attempt()
def list_home_of_root(_: Outside) -> None:
    os.listdir("/root/.ssh" if os.path.exists("/root/.ssh") else "/root")


@attempt()
def read_token_of_worker(outside: Outside) -> None:
    open(outside["token"]).read()


@attempt()
def read_file_of_another_run(outside: Outside) -> None:
    open(outside["public"]).read()


@attempt()
def read_token_by_parent_folders(outside: Outside) -> None:
    open("../" * 20 + outside["token"]).read()


@attempt()
def write_file_of_another_run(outside: Outside) -> None:
    open(outside["public"], "a").write("changed")


@attempt()
def write_settings_of_system(_: Outside) -> None:
    open("/etc/ld.so.preload", "w").close()


@attempt()
def write_module_of_interpreter(_: Outside) -> None:
    open(os.path.join(os.path.dirname(os.__file__), "sitecustomize.py"), "w").close()


@attempt()
def truncate_module_of_interpreter(_: Outside) -> None:
    os.truncate(os.__file__, 0)


@attempt()
def link_program_of_system(_: Outside) -> None:
    os.link("/usr/bin/env", "env")


@attempt()
def rename_into_system(_: Outside) -> None:
    open("x", "w").close()
    os.rename("x", "/etc/x")


@attempt()
def open_file_by_handle(_: Outside) -> None:
    call("open_by_handle_at", -100, bytes(136), 0)


@attempt()
def make_device(_: Outside) -> None:
    os.mknod("disk", 0o600 | 0o060000, os.makedev(254, 0))


@attempt()
def open_disk(_: Outside) -> None:
    found = [name for name in os.listdir("/dev") if name.startswith(("vd", "sd", "nvme"))]
    os.open(f"/dev/{found[0]}" if found else "/dev/vda", os.O_RDONLY)


@attempt()
def write_setting_of_kernel(_: Outside) -> None:
    open("/proc/sys/kernel/core_pattern", "w").write("|/tmp/x")


@attempt()
def use_inherited_folder(_: Outside) -> None:
    if not any(os.path.isdir(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2):
        raise PermissionError("no folder is open")


# Other processes.


@attempt()
def read_environment_of_agent(outside: Outside) -> None:
    open(f"/proc/{outside['pid']}/environ").read()


@attempt()
def read_environment_of_first_process(_: Outside) -> None:
    open("/proc/1/environ").read()


@attempt()
def read_memory_of_parent(_: Outside) -> None:
    open(f"/proc/{os.getppid()}/mem", "rb").read(1)


@attempt()
def signal_agent(outside: Outside) -> None:
    os.kill(outside["pid"], 0)


@attempt()
def kill_first_process(_: Outside) -> None:
    os.kill(1, signal.SIGKILL)
    time.sleep(0.05)
    raise PermissionError("still here")


@attempt()
def trace_agent(outside: Outside) -> None:
    call("ptrace", 16, outside["pid"], 0, 0)


@attempt(subprocess="")  # Within the sandbox only: the processes of others have no number here.
def trace_parent(_: Outside) -> None:
    call("ptrace", 16, os.getppid(), 0, 0)


@attempt()
def read_agent_by_system_call(outside: Outside) -> None:
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    remote = (ctypes.c_void_p * 2)(0x400000, 8)
    call("process_vm_readv", outside["pid"], local, 1, remote, 1, 0)


@attempt()
def find_agent(outside: Outside) -> None:
    call("pidfd_open", outside["pid"], 0)


@attempt()
def go_before_others(_: Outside) -> None:
    os.nice(-20)


@attempt()
def run_in_real_time(_: Outside) -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@attempt()
def escape_killer_of_memory(_: Outside) -> None:
    open("/proc/self/oom_score_adj", "w").write("-1000")


# The network.


@attempt()
def dial_server(outside: Outside) -> None:
    socket.create_connection(("127.0.0.1", outside["port"]), 1)


@attempt()
def dial_internet(_: Outside) -> None:
    socket.create_connection(("1.1.1.1", 443), 1)


@attempt()
def dial_metadata(_: Outside) -> None:
    socket.create_connection(("169.254.169.254", 80), 1)


@attempt()
def send_datagram(_: Outside) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("1.1.1.1", 53))


@attempt()
def dial_unix_socket(outside: Outside) -> None:
    socket.socket(socket.AF_UNIX).connect(outside["unix"])


@attempt()
def dial_abstract_socket(outside: Outside) -> None:
    socket.socket(socket.AF_UNIX).connect(outside["abstract"])


@attempt()
def open_raw_socket(_: Outside) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


@attempt()
def open_packet_socket(_: Outside) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)


@attempt(subprocess="")
def open_socket_to_kernel(_: Outside) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


@attempt(subprocess="")
def open_socket_to_host(_: Outside) -> None:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


@attempt(subprocess="")
def open_socket_of_ciphers(_: Outside) -> None:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)


@attempt(subprocess="")
def open_multipath_socket(_: Outside) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)


# The kernel.


@attempt()
def become_root(_: Outside) -> None:
    os.setresuid(0, 0, 0)


@attempt()
def join_group_of_root(_: Outside) -> None:
    os.setgroups([0])


@attempt()
def take_capabilities(_: Outside) -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)))


@attempt()
def take_back_no_new_privileges(_: Outside) -> None:
    _checked(_libc.prctl(38, 0, 0, 0, 0))


@attempt()
def run_program_of_root(_: Outside) -> None:
    if subprocess.run(["/bin/su", "-c", "id"], capture_output=True, check=False).returncode:
        raise PermissionError("not root")


@attempt()
def mount_a_file_system(_: Outside) -> None:
    _checked(_libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None))


@attempt()
def change_root(_: Outside) -> None:
    os.chroot(".")


@attempt(subprocess="")
def make_user_namespace(_: Outside) -> None:
    _checked(_libc.unshare(0x10000000))


@attempt(subprocess="")
def clone_into_namespace(_: Outside) -> None:
    number = 220 if os.uname().machine == "aarch64" else 56
    if not _checked(_libc.syscall(ctypes.c_long(number), 0x10000011, 0, 0, 0, 0)):
        os._exit(0)


@attempt()
def enter_namespace(_: Outside) -> None:
    call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0)


@attempt()
def set_host_name(_: Outside) -> None:
    _checked(_libc.sethostname(b"x", 1))


@attempt()
def set_clock(_: Outside) -> None:
    call("clock_settime", 0, (ctypes.c_long * 2)(1, 0))


@attempt()
def load_module(_: Outside) -> None:
    call("init_module", bytes(8), 8, b"")


@attempt()
def load_kernel(_: Outside) -> None:
    call("kexec_load", 0, 0, 0, 0)


@attempt()
def swap(_: Outside) -> None:
    call("swapon", b"/tmp/x", 0)


@attempt()
def move_a_mount(_: Outside) -> None:
    call("fsopen", b"tmpfs", 0)


@attempt(subprocess="")
def load_bpf(_: Outside) -> None:
    call("bpf", 0, bytes(128), 128)


@attempt(subprocess="")
def open_performance_counter(_: Outside) -> None:
    call("perf_event_open", bytes(128), 0, -1, -1, 0)


@attempt(subprocess="")
def handle_page_faults(_: Outside) -> None:
    call("userfaultfd", 1)


@attempt(subprocess="")
def submit_by_ring(_: Outside) -> None:
    call("io_uring_setup", 1, bytes(120))


@attempt(subprocess="")
def use_keyring(_: Outside) -> None:
    call("keyctl", 0, -3, 1)


@attempt(subprocess="")
def make_data_executable(_: Outside) -> None:
    call("personality", 0x0400000)


@attempt(subprocess="")
def share_memory_by_key(_: Outside) -> None:
    call("shmget", 0, 4096, 0o1600)


@attempt()
def type_on_terminal(_: Outside) -> None:
    os.open("/dev/tty", os.O_RDWR)


# Limits.


@attempt()
def raise_limit_of_cores(_: Outside) -> None:
    if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0):
        raise PermissionError("no core is written")
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))


@attempt()
def raise_limit_of_processes(_: Outside) -> None:
    resource.setrlimit(resource.RLIMIT_NPROC, (10_000, 10_000))


@attempt()
def open_many_files(_: Outside) -> None:
    for _number in range(1000):
        os.open("/dev/null", os.O_RDONLY)


@attempt()
def start_many_processes(_: Outside) -> None:
    found = []
    try:
        for _number in range(200):
            if not (pid := os.fork()):
                time.sleep(60)
                os._exit(0)
            found.append(pid)
    finally:
        for pid in found:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@attempt()
def start_many_threads(_: Outside) -> None:
    for _number in range(200):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


@attempt()
def make_huge_file(_: Outside) -> None:
    with open("huge", "wb") as file:
        file.truncate(1 << 40)


@attempt()
def fill_scratch(_: Outside) -> None:
    try:
        for number in range(100):
            with open(f"part{number}", "wb") as file:
                file.write(bytes(4 << 20))
    finally:
        for number in range(100):
            if os.path.exists(f"part{number}"):
                os.unlink(f"part{number}")


@attempt()
def fill_shared_memory(_: Outside) -> None:
    try:
        for number in range(100):
            with open(f"/dev/shm/part{number}", "wb") as file:
                file.write(bytes(4 << 20))
    finally:
        for name in os.listdir("/dev/shm"):
            os.unlink(f"/dev/shm/{name}")


# For sandboxes of their own.


def use_private_memory() -> None:
    kept = [bytearray(os.urandom(1024) * 1024) for _ in range(400)]
    time.sleep(60 + len(kept))


def use_shared_memory() -> None:
    area = mmap.mmap(-1, 400 << 20)
    for offset in range(0, len(area), 4096):
        area[offset] = 1
    time.sleep(60)


def use_memory_in_children() -> None:
    for _number in range(8):
        if not os.fork():
            kept = bytearray(os.urandom(1 << 20) * 50)
            time.sleep(60 + len(kept))
    time.sleep(60)


def use_files_in_memory() -> None:
    kept = []
    for _number in range(20):
        kept.append(os.memfd_create("part"))
        os.write(kept[-1], bytes(20 << 20))
    time.sleep(60)


def use_scratch() -> None:
    with open("large", "wb") as file:
        for _number in range(400):
            file.write(bytes(1 << 20))
    time.sleep(60)


def compute() -> None:
    while True:
        pass


def compute_and_ignore_signal() -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    compute()


def call_by_other_table() -> None:
    _libc.syscall(ctypes.c_long(0x40000000 | 39))


def outlive(pid_file: str) -> int:
    """Leave a process behind that is in a session of its own and whose parent has died."""
    read, write = os.pipe()
    if not os.fork():
        os.setsid()
        if not os.fork():
            _libc.prctl(1, 0, 0, 0, 0)
            os.write(write, b"x")
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
            time.sleep(600)
        os._exit(0)
    os.read(read, 1)
    return 1


def stop_itself() -> None:
    _libc.prctl(1, 0, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
