"""The file system that a process in namespaces of its own sees.

Rule: it is made of mounts that are read-only, and of a scratch folder and shared memory of a set size that are the
process's own. The rest of the machine is not mounted, so it has no path there.
"""

import os

from lattice_worker.sandbox import libc, network
from lattice_worker.sandbox.policy import SYSTEM_FILES, SYSTEM_PATHS, Policy

SCRATCH = "/tmp"
SHARED_MEMORY = "/dev/shm"
MAX_FILES = 65536
ROOT_BYTES = 1024 * 1024
PASSWD = "root:x:0:0::/nonexistent:/usr/sbin/nologin\ntask:x:{uid}:{uid}::/tmp:/bin/sh\n"
GROUP = "root:x:0:\ntask:x:{uid}:\n"
LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2"}


def build(policy: Policy, read_paths: tuple[str, ...], folder: str, uid: int) -> None:
    """Make the view on `folder` and move into it. For a process that is alone in a new mount and pid namespace."""
    libc.mount("", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    flags = libc.MS_NOSUID | libc.MS_NODEV
    libc.mount("tmpfs", folder, "tmpfs", flags, f"size={ROOT_BYTES},nr_inodes=8192,mode=755")
    # First, because the code of a task may lie in one of them and is then mounted within.
    for path, size in ((SCRATCH, policy.scratch_bytes), (SHARED_MEMORY, policy.shared_memory_bytes)):
        os.makedirs(folder + path)
        data = f"size={size},nr_inodes={MAX_FILES},mode=700,uid={uid},gid={uid}"
        libc.mount("tmpfs", folder + path, "tmpfs", flags, data)
    own = {"/etc/passwd": PASSWD.format(uid=uid), "/etc/group": GROUP.format(uid=uid)}
    if policy.network:
        own["/etc/hosts"] = network.hosts_file(policy.network)
    for path in (*SYSTEM_PATHS, *SYSTEM_FILES, *read_paths):
        if path not in own:
            _show(path, folder)
    for path, text in own.items():
        with open(folder + path, "w") as file:
            file.write(text)
    for device in policy.devices:
        _bind(device, folder + device)
        libc.mount("", folder + device, flags=libc.MS_REMOUNT | libc.MS_BIND | libc.MS_NOSUID | libc.MS_NOEXEC)
    for path, target in LINKS.items():
        os.symlink(target, folder + path)
    os.mkdir(folder + "/proc")
    libc.mount("proc", folder + "/proc", "proc", flags | libc.MS_NOEXEC, "hidepid=invisible")
    libc.mount("", folder, flags=libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY | flags)
    libc.pivot_root(folder)


def _show(path: str, folder: str) -> None:
    """Mount a path of the machine read-only at the same path of the view. Links are copied, missing paths left out."""
    if os.path.islink(path) and not path.startswith("/etc/"):
        if not os.path.lexists(folder + path):
            os.makedirs(os.path.dirname(folder + path), exist_ok=True)
            os.symlink(os.readlink(path), folder + path)
        return
    if os.path.exists(path):
        _bind(path, folder + path)
        libc.restrict_mounts(folder + path, libc.MOUNT_ATTR_RDONLY | libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "ab"):
            pass
    libc.mount(source, target, flags=libc.MS_BIND | libc.MS_REC)
