"""The Linux calls that a seal is made of, which Python 3.11 does not offer. Each raises OSError when it fails."""

import ctypes
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

SECCOMP_SET_MODE_FILTER = 1
CAPABILITY_VERSION_3 = 0x20080522

# Numbers of calls that the C library has no function for.
PIVOT_ROOT, SECCOMP = {"x86_64": (155, 317), "aarch64": (41, 277)}.get(platform.machine(), (-1, -1))
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *args: object) -> int:
    """Make a system call by its number; integers are passed as 64 bits."""
    given = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _checked(_libc.syscall(ctypes.c_long(number), *given), f"system call {number}")


def prctl(option: int, *args: int) -> int:
    """Set or read an attribute of this process."""
    given = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(ctypes.c_int(option), *given), f"prctl {option}")


def parent_death_signal() -> int:
    """Return the signal that this process gets when its parent ends; 0 for none."""
    found = ctypes.c_int(0)
    _checked(_libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(found), 0, 0, 0), "PR_GET_PDEATHSIG")
    return found.value


def unshare(flags: int) -> None:
    """Leave the namespaces of these kinds for new ones."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system, or change a mount."""
    texts = [text.encode() or None for text in (source, target, kind)]
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None), f"mount on {target}")


def detach(target: str) -> None:
    """Unmount a tree of mounts; files in it that are open stay usable."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def restrict_mounts(target: str, attributes: int) -> None:
    """Set attributes of a mount and of all mounts below it."""
    request = struct.pack("<4Q", attributes, 0, 0, 0)
    syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, request, len(request))


def pivot_root(new_root: str) -> None:
    """Make a mount the root of this process's mount namespace and forget the old root."""
    os.chdir(new_root)
    syscall(PIVOT_ROOT, b".", b".")
    detach(".")
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up every capability: effective, permitted and inheritable."""
    header = struct.pack("<Ii", CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def load_filter(program: bytes) -> None:
    """Have the kernel judge every later system call of this process by a BPF program."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    syscall(SECCOMP, SECCOMP_SET_MODE_FILTER, 0, fprog)
