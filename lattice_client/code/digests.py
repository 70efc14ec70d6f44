"""Owns the digest by which a function is named. Rule: the comment of `Function` in the contract defines it."""

import hashlib

from lattice.v1 import task_pb2


def digest_of(function: task_pb2.Function) -> str:
    """Return the digest of a function's content; its field `digest` is ignored."""
    python, runtime = function.python, function.runtime
    digest = hashlib.sha256()
    for path, value in (
        ("entrypoint", function.entrypoint),
        ("python.pickle", python.pickle),
        ("python.source.code", python.source.code),
        ("python.source.name", python.source.name),
        ("python.call_style", python.call_style),
        ("python.return_style", python.return_style),
        ("python.concurrency", python.concurrency),
        ("bundle_digest", function.bundle_digest),
        ("runtime.language", runtime.language),
        ("runtime.version", runtime.version),
        ("display_name", function.display_name),
    ):
        if value:
            data = value if isinstance(value, bytes) else str(value).encode()
            digest.update(b"%s\0%d\0" % (path.encode(), len(data)))
            digest.update(data)
    return f"sha256:{digest.hexdigest()}"
