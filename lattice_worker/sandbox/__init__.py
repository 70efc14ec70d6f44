"""The sandboxes of the levels `subprocess` and `seccomp`. Standard library only on the side of the sealed process."""
