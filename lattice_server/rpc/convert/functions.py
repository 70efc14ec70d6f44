"""Converts functions and bundles. Rule: a function is named by the digest of its content, as `Function` defines it."""

import hashlib
from collections.abc import Callable

from lattice.v1 import task_pb2

from lattice_server.core.model import Bundle, Function
from lattice_server.rpc.convert.resources import runtime_from_proto


def digest_of(function: task_pb2.Function) -> str:
    """Return the digest of a function, whatever digest its message has."""
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


def function_from_proto(message: task_pb2.Function, bundle_of: Callable[[str], Bundle]) -> Function:
    """Return a function that was sent with its code; `bundle_of` finds the bundle of a digest."""
    definition = task_pb2.Function()
    definition.CopyFrom(message)
    definition.digest = digest_of(message)
    bundle = bundle_of(message.bundle_digest) if message.bundle_digest else None
    is_async = message.python.concurrency == task_pb2.CONCURRENCY_ASYNC
    runtime = runtime_from_proto(message.runtime)
    return Function(definition.digest, is_async, definition, bundle, message.entrypoint, runtime, message.ByteSize())


def bundle_from_proto(message: task_pb2.CodeBundle) -> Bundle:
    """Return a bundle that was sent with its content."""
    return Bundle(message.digest, task_pb2.CodeBundle(digest=message.digest, zip=message.zip), len(message.zip))


def code_to_proto(function: Function) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
    """Return a function's code and its bundle, as the caller sent them."""
    code, bundle = function.definition, None if function.bundle is None else function.bundle.content
    assert isinstance(code, task_pb2.Function)
    assert bundle is None or isinstance(bundle, task_pb2.CodeBundle)
    return code, bundle
