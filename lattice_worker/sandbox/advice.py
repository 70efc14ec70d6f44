"""What to change on a machine where a level of isolation cannot be set up.

Rule: the advice follows from the step that failed, which the refusal of the process begins with.
"""

# By words of a refusal; the first that it contains counts.
ADVICE = (
    (
        "namespaces:",
        "the kernel forbids user namespaces here. Debian and Ubuntu: set kernel.unprivileged_userns_clone=1 and "
        "kernel.apparmor_restrict_unprivileged_userns=0 with sysctl. In a container: run the worker as root with "
        "CAP_SYS_ADMIN, or with a seccomp profile that allows unshare and mount",
    ),
    (
        "view:",
        "the file system view of the sandbox could not be mounted. In a container /proc has to be mounted without "
        "masks (Docker: --security-opt systempaths=unconfined --security-opt apparmor=unconfined)",
    ),
    (
        "filter:",
        "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER), or the machine is neither x86-64 nor arm64",
    ),
    (
        "privileges:",
        "the user ids from 1,879,048,192 are not mapped here: map them into the user namespace of the container",
    ),
    ("sealed within", "the machine is overloaded; start the worker again"),
)


def advised(reason: str) -> str:
    """Return why a level is not offered, with advice where there is any."""
    for words, advice in ADVICE:
        if words in reason:
            return f"{reason}: {advice}"
    return reason
