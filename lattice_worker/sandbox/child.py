"""The program inside every sandbox: runs invocations and answers with outcomes. Standard library and cloudpickle only.

Rule: whatever user code does, the answer travels on the control socket and never on the user's own output.

A frame, both ways: little-endian u32 length of the header, the JSON header, then the blobs whose lengths the header
lists under `blobs`. Payloads name a blob by index or a file by path; see `_decode` and `_encode`.
"""

import asyncio
import contextlib
import contextvars
import ctypes
import faulthandler
import fcntl
import functools
import importlib
import inspect
import io
import json
import linecache
import math
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import termios
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import cloudpickle

JSON = "application/json"
BYTES = "application/octet-stream"
CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
PICKLE5 = "application/vnd.lattice.pickle5"
MAGIC = b"LTP5"
ALIGN = 64
# Python refuses to print and to read integers of over 4300 digits; these have fewer or as many.
MAX_JSON_INT_BITS = 14_284
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# What a task may use beyond the memory it asked for before it is stopped: it is counted by the page, and early.
MEMORY_SLACK_BYTES = 64 * 1024 * 1024
FLUSH_BYTES = 8192
SPARES = "spares"
MIN_SPARE_BYTES = 1024 * 1024

current: contextvars.ContextVar["Output | None"] = contextvars.ContextVar("current", default=None)


class PayloadError(Exception):
    """A value or a function cannot be decoded, encoded or found."""


class Channel:
    """The control socket; frames go out whole, from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Send one frame."""
        header["blobs"] = [len(blob) for blob in blobs]
        encoded = json.dumps(header).encode()
        with self._lock:
            self._sock.sendall(b"".join([struct.pack("<I", len(encoded)), encoded, *blobs]))

    def frames(self) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """Yield frames until the other side hangs up."""
        stream = self._sock.makefile("rb", buffering=1 << 16)
        while prefix := stream.read(4):
            header = json.loads(stream.read(struct.unpack("<I", prefix)[0]))
            yield header, [stream.read(size) for size in header["blobs"]]


class Output:
    """What one invocation tells while it runs: text on its standard streams, up to a limit in bytes, and new tasks.

    `header` is the invocation's; `lattice_worker.context` reads from it what the running task may know.
    """

    def __init__(self, channel: Channel, header: dict[str, Any]) -> None:
        self.header = header
        limit = header["log_limit"]
        self._channel = channel
        self._invocation = header["id"]
        self._left = limit
        self._limit = limit
        self._pending: list[tuple[str, str]] = []
        self._pending_bytes = 0

    def write(self, stream: str, text: str) -> None:
        """Take text; it is sent by the line."""
        if self._left < 0:
            return
        self._left -= len(text)
        if self._left < 0:
            self.flush()
            notice = f"[output cut after {self._limit} bytes]\n"
            self._channel.send(self._header([[stream, notice]], truncated=True))
            return
        self._pending.append((stream, text))
        self._pending_bytes += len(text)
        if "\n" in text or self._pending_bytes > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        if self._pending:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
            # One `print` is several writes.
            parts = [[stream, "".join(text for _, text in group)] for stream, group in groupby(pending, itemgetter(0))]
            self._channel.send(self._header(parts, truncated=False))

    def spawn(self, task: dict[str, Any], blobs: Sequence[bytes], made: Sequence[str]) -> None:
        """Have a task added to the run; see `lattice_worker.context`. `made` are the artifacts among its inputs."""
        self._channel.send({"kind": "spawn", "id": self._invocation, "task": task, "made": made}, blobs)

    def _header(self, parts: list[list[str]], *, truncated: bool) -> dict[str, Any]:
        return {"kind": "log", "id": self._invocation, "parts": parts, "truncated": truncated}


class Stream(io.TextIOBase):
    """Stands in for `sys.stdout` and `sys.stderr`: text goes to the invocation that writes it."""

    encoding = "utf-8"

    def __init__(self, name: str, descriptor: int) -> None:
        self._name = name
        self._descriptor = descriptor
        self.buffer = _Bytes(self)

    def write(self, text: str) -> int:
        """Write text; outside an invocation it goes to the process's own stream."""
        output = current.get()
        if output is None:
            os.write(self._descriptor, text.encode(errors="replace"))
        else:
            output.write(self._name, text)
        return len(text)

    def flush(self) -> None:
        """Send what is pending."""
        if (output := current.get()) is not None:
            output.flush()

    def fileno(self) -> int:
        """Return the descriptor of the process's own stream."""
        return self._descriptor

    def writable(self) -> bool:
        """Return True."""
        return True


class _Bytes(io.RawIOBase):
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data).decode(errors="replace"))
        return len(data)

    def writable(self) -> bool:
        return True


class Program:
    """Functions, by digest, and the invocations of them; `is_alone` tells that they run one at a time."""

    def __init__(self, channel: Channel, *, is_alone: bool) -> None:
        self._channel = channel
        self._is_alone = is_alone
        self._definitions: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._callables: dict[str, Callable[..., Any]] = {}

    def define(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Remember a function; it is loaded when first called."""
        self._definitions[header["digest"]] = (header, blobs[0] if blobs else b"")

    def run(self, header: dict[str, Any], blobs: list[bytes]) -> bool:
        """Run an invocation of a plain function and send its outcome; return whether output is left to be read."""
        with self._outcome(header) as finish:
            value = self._call(header, blobs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            finish(value)
        return bool(header["has_raw"])

    async def run_async(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Run an invocation of a coroutine function and send its outcome."""
        with self._outcome(header) as finish:
            value = self._call(header, blobs)
            finish(await value if inspect.isawaitable(value) else value)

    @contextlib.contextmanager
    def _outcome(self, header: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        output = Output(self._channel, header)
        token = current.set(output)
        encoder = Encoder(header)
        answer: dict[str, Any] = {"kind": "result", "id": header["id"]}
        started = time.perf_counter()

        def finish(value: Any) -> None:
            answer.update(
                self._answer_batch(header, value, encoder)
                if header["batched"]
                else self._answer(header, value, encoder)
            )

        try:
            with memory_limit(header["memory_limit"]):
                yield finish
        except BaseException as error:  # SystemExit too: user code must not end the runner by raising it
            encoder.take_back()
            answer["failure"] = _failure(error, encoder)
        finally:
            answer["made"] = encoder.made
            answer["duration"] = time.perf_counter() - started
            header["has_raw"] = answer["has_raw"] = self._is_alone and has_unread_output()
            output.flush()
            current.reset(token)
            self._channel.send(answer, encoder.blobs)

    def _load(self, digest: str) -> Callable[..., Any]:
        if digest in self._callables:
            return self._callables[digest]
        definition, blob = self._definitions[digest]
        try:
            function = _load_code(definition, blob)
        except MemoryError:
            raise
        except BaseException as error:
            text = f"the function {definition['name']!r} cannot be loaded here: {type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError):
                text += "; install the module where the worker runs"
            raise PayloadError(text) from error
        self._callables[digest] = function
        return function

    def _call(self, header: dict[str, Any], blobs: list[bytes]) -> Any:
        function = self._load(header["digest"])
        style = self._definitions[header["digest"]][0]["call_style"]
        takes_params = style == "params" or (style == "auto" and _takes_params(function))
        if not header["batched"]:
            (inputs,) = header["items"]
            bound = {name: _bind(binding, blobs) for name, binding in inputs.items()}
            return function(bound) if takes_params else function(**bound)
        # An item whose inputs cannot be read has failed by itself; the others are called without it.
        header["unread"] = {}
        batch = []
        for position, inputs in enumerate(header["items"]):
            try:
                batch.append({name: _bind(binding, blobs) for name, binding in inputs.items()})
            except Exception as error:
                header["unread"][position] = error
        if not batch:
            return []
        return function(batch) if takes_params else function(**_columns(function, batch))

    def _answer(self, header: dict[str, Any], value: Any, encoder: "Encoder") -> dict[str, Any]:
        """Return the outputs in a value, and item by item those that others are mapped over."""
        outputs = self._outputs(header, value)
        split = {name: _items(name, outputs[name]) for name in header["split"]}
        return {
            "outputs": {name: encoder.encode(item) for name, item in outputs.items()},
            "split": {name: [encoder.encode(item) for item in items] for name, items in split.items()},
        }

    def _answer_batch(self, header: dict[str, Any], value: Any, encoder: "Encoder") -> dict[str, Any]:
        """Return one answer for each member of a batch."""
        unread, size = header["unread"], len(header["items"])
        try:
            values = list(value)
        except TypeError:
            raise PayloadError(f"a batch of {size} must return a list; it returned {type(value).__name__}") from None
        if len(values) != size - len(unread):
            raise PayloadError(f"a batch of {size - len(unread)} returned {len(values)} values; one for each is needed")
        found = iter(values)
        return {
            "items": [
                self._answer_member(header, unread[i] if i in unread else next(found), encoder) for i in range(size)
            ]
        }

    def _answer_member(self, header: dict[str, Any], value: Any, encoder: "Encoder") -> dict[str, Any]:
        if isinstance(value, BaseException):
            return {"failure": _failure(value, encoder)}
        kept = (len(encoder.blobs), len(encoder.made))
        try:
            return self._answer(header, value, encoder)
        except PayloadError as error:
            encoder.take_back(*kept)
            return {"failure": _failure(error, encoder)}

    def _outputs(self, header: dict[str, Any], value: Any) -> dict[str, Any]:
        declared = header["outputs"]
        style = self._definitions[header["digest"]][0]["return_style"]
        has_all = isinstance(value, dict) and all(name in value for name in declared)
        if style == "auto":
            style = "mapping" if has_all and (declared or all(isinstance(k, str) for k in value)) else "value"
            if style == "value" and len(declared) > 1:
                style = "mapping"
        if style == "value":
            return {declared[0] if declared else "result": value}
        if not isinstance(value, dict):
            raise PayloadError(f"the task must return a dict with {declared}; it returned {type(value).__name__}")
        if not has_all:
            missing = ", ".join(repr(name) for name in declared if name not in value)
            returned = ", ".join(map(str, value)) or "nothing"
            raise PayloadError(f"the task returned no output {missing}; it returned: {returned}")
        return {str(name): item for name, item in value.items()}


class Encoder:
    """Encodes the outputs of one invocation: small ones into the frame, as `blobs`; large ones into files of the
    runner's folder, which the frame lists as `made` and the agent moves into the store."""

    def __init__(self, header: dict[str, Any]) -> None:
        self._folder = header["folder"]
        self._spares = os.path.join(header["store"], SPARES)
        self._inline_limit = header["inline_limit"]
        self.blobs: list[bytes] = []
        self.made: list[str] = []

    def take_back(self, blobs: int = 0, made: int = 0) -> None:
        """Forget all but so many blobs and artifacts."""
        for artifact in self.made[made:]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, artifact))
        del self.blobs[blobs:], self.made[made:]

    def encode(self, value: Any) -> dict[str, Any]:
        """Return a reference to the encoded value."""
        try:
            media_type, parts = encode_value(value)
        except MemoryError:
            raise
        except Exception as error:
            raise PayloadError(f"an output of type {type(value).__name__} cannot be pickled: {error}") from error
        size = sum(len(part) for part in parts)
        if size <= self._inline_limit:
            self.blobs.append(b"".join(parts))
            return {"type": media_type, "blob": len(self.blobs) - 1}
        artifact = uuid.uuid4().hex
        self.made.append(artifact)
        with create_artifact(os.path.join(self._folder, artifact), self._spares, size) as file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            file.truncate(size)
        return {"type": media_type, "artifact": artifact, "size": size}


def create_artifact(path: str, spares: str, size: int) -> io.FileIO:
    """Return a file to write an artifact of `size` bytes to: a spare where one is large enough, since pages that are
    there already cost a fraction of new ones, or else a new one."""
    for spare in os.scandir(spares) if size >= MIN_SPARE_BYTES else ():
        try:
            if not size // 2 <= spare.stat().st_size <= size * 2:
                continue
            file = io.FileIO(spare.path, "r+")
        except FileNotFoundError:  # another runner took it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(spare.path, path)
        except BlockingIOError:  # some task still maps it, so it can never be written again
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(spare.path)
        except FileNotFoundError:
            file.close()
        else:
            return file
    return io.FileIO(path, "x")


def open_artifact(path: str) -> mmap.mmap | bytes:
    """Return the bytes of an artifact. The map keeps the file's lock, so its pages are not written while it lives."""
    missing = "an input's value is no longer in the store of this node"
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
            # Dropped and written anew between the opening and the lock: not this artifact any more.
            if not os.path.samestat(status, os.stat(path)):
                raise PayloadError(missing)
            # Private pages: the task may write to what it was given, and nobody else sees it.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if status.st_size else b""
    except FileNotFoundError:
        raise PayloadError(missing) from None


def dump(function: Callable[..., Any]) -> bytes:
    """Return a function as it travels. Raises PayloadError."""
    try:
        return bytes(cloudpickle.dumps(function, protocol=5))
    except Exception as error:
        raise PayloadError(f"a function cannot be pickled: {error}") from error


def is_json(value: Any) -> bool:
    """Whether JSON gives `value` back exactly."""
    kind = type(value)
    if kind is str:
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    if value is None or kind is bool:
        return True
    if kind is int:
        return bool(value.bit_length() <= MAX_JSON_INT_BITS)
    if kind is float:
        return math.isfinite(value)
    if kind is list:
        return all(map(is_json, value))
    return kind is dict and all(type(key) is str and is_json(key) and is_json(item) for key, item in value.items())


def encode_value(value: Any) -> tuple[str, list[Any]]:
    """Return a value's media type and its encoding, in parts."""
    if is_json(value):
        return JSON, [json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()]
    if type(value) is bytes:
        return BYTES, [value]
    buffers: list[pickle.PickleBuffer] = []
    stream = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    if not buffers:
        return CLOUDPICKLE, [stream]
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    out: list[Any] = [MAGIC + struct.pack(f"<IQ{len(parts)}Q", 1, len(parts), *(part.nbytes for part in parts))]
    offset = len(out[0])
    for part in parts:
        padding = -offset % ALIGN
        out += [b"\0" * padding, part]
        offset += padding + part.nbytes
    return PICKLE5, out


def decode_value(media_type: str, data: Any) -> Any:
    """Return the value encoded in `data`, bytes or a memory map."""
    if media_type == JSON:
        return json.loads(bytes(data))
    if media_type == BYTES:
        return bytes(data)
    if media_type == CLOUDPICKLE:
        return pickle.loads(data)
    if media_type != PICKLE5:
        raise PayloadError(f"a value is encoded as {media_type!r}, which Python tasks cannot read")
    # Over bytes, arrays could only be read.
    view = memoryview(bytearray(data) if isinstance(data, bytes) else data)
    (count,) = struct.unpack_from("<Q", view, 8)
    offset = 16 + 8 * count
    parts = []
    for size in struct.unpack_from(f"<{count}Q", view, 16):
        offset += -offset % ALIGN
        parts.append(view[offset : offset + size])
        offset += size
    return pickle.loads(parts[0], buffers=parts[1:])


def _columns(function: Callable[..., Any], batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the inputs of a batch as one list for each keyword; what a member leaves out has its default."""
    names = dict.fromkeys(name for inputs in batch for name in inputs)
    try:
        defaults = {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }
    except (TypeError, ValueError):
        defaults = {}
    missing = [name for name in names if name not in defaults and any(name not in inputs for inputs in batch)]
    if missing:
        raise PayloadError(f"some members of the batch have no input {missing[0]!r}")
    return {name: [inputs[name] if name in inputs else defaults[name] for inputs in batch] for name in names}


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise PayloadError(f"output {name!r} is mapped over and must be a list; it is a {type(value).__name__}")
    return list(value)


def has_unread_output() -> bool:
    """Whether something this process wrote past `sys.stdout` and `sys.stderr` still lies in their pipes."""
    size = bytearray(4)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # the task may have closed it
            fcntl.ioctl(descriptor, termios.FIONREAD, size)
            if any(size):
                return True
    return False


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[None]:
    """Let this process grow by `limit_bytes` and a little; what asks for more gets a MemoryError. Zero means any."""
    if not limit_bytes:
        yield
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit_bytes + MEMORY_SLACK_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _bind(binding: dict[str, Any], blobs: list[bytes]) -> Any:
    if "items" in binding:
        return [_bind(item, blobs) for item in binding["items"]]
    if "entries" in binding:
        return {key: _bind(item, blobs) for key, item in binding["entries"].items()}
    if "path" not in binding:
        return decode_value(binding["type"], blobs[binding["blob"]])
    return decode_value(binding["type"], open_artifact(binding["path"]))


def _load_code(definition: dict[str, Any], blob: bytes) -> Callable[..., Any]:
    if definition["bundle"] and definition["bundle"] not in sys.path:
        sys.path.insert(0, definition["bundle"])
    if definition["code"] == "pickle":
        return pickle.loads(blob)  # type: ignore[no-any-return]
    if definition["code"] == "entrypoint":
        module, _, name = definition["entrypoint"].partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return getattr(found, "__wrapped__", found)  # type: ignore[no-any-return]
    source, filename = blob.decode(), f"<{definition['name'] or definition['function']}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "__lattice_source__"}
    exec(compile(source, filename, "exec"), namespace)
    return namespace[definition["function"]]  # type: ignore[no-any-return]


def _takes_params(function: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(function).parameters) == ["params"]
    except (TypeError, ValueError):
        return False


def _trace(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    cause = traceback.format_exception(error.__cause__) if error.__cause__ is not None else []
    head = ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
    return "".join([*cause, *head, *traceback.format_exception_only(error)])


def _failure(error: BaseException, encoder: Encoder) -> dict[str, Any]:
    match error:
        case asyncio.CancelledError():
            return {"kind": "cancelled", "message": "the attempt was cancelled", "type": ""}
        case PayloadError():
            return {"kind": "payload", "message": str(error), "type": "", "traceback": _trace(error)}
        case MemoryError():
            kind = "out_of_memory"
        case _:
            kind = "user_error"
    name, *bases = [_type_name(cls) for cls in type(error).__mro__ if cls is not object]
    failure: dict[str, Any] = {"kind": kind, "type": name, "message": str(error), "traceback": _trace(error)}
    failure["base_types"] = bases
    with contextlib.suppress(Exception):  # an exception that cannot be pickled is still told in text
        stripped = error.with_traceback(None)
        pickled = cloudpickle.dumps(stripped)
        if len(pickled) <= FLUSH_BYTES * 8:
            encoder.blobs.append(pickled)
            failure["exception"] = len(encoder.blobs) - 1
    return failure


def _type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in {"builtins", "__main__"} else f"{cls.__module__}.{cls.__qualname__}"


class Claims:
    """The numbers of the invocations that were sent ahead and not taken back; the agent reads the same pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = 0

    def owns(self, number: int) -> bool:
        """Whether this process may run the invocation `number`. Asked in order of the numbers."""
        while self._held < number:
            try:
                self._held = int.from_bytes(os.read(self._descriptor, 8), "little")
            except BlockingIOError:
                return False
        return self._held == number


def _serve(channel: Channel, claims: Claims) -> None:
    program = Program(channel, is_alone=True)
    frames = channel.frames()
    waiting: deque[tuple[dict[str, Any], list[bytes]]] = deque()
    while (frame := waiting.popleft() if waiting else next(frames, None)) is not None:
        header, blobs = frame
        if header["kind"] == "function":
            program.define(header, blobs)
        elif ("claim" not in header or claims.owns(header["claim"])) and program.run(header, blobs):
            # What the agent has not read yet it would take for the next invocation's.
            for later in frames:
                if later[0]["kind"] == "drained":
                    break
                waiting.append(later)


async def _serve_async(channel: Channel) -> None:
    program = Program(channel, is_alone=False)
    loop = asyncio.get_running_loop()
    frames: asyncio.Queue[tuple[dict[str, Any], list[bytes]] | None] = asyncio.Queue()
    running: dict[str, asyncio.Task[None]] = {}

    def read() -> None:
        for frame in channel.frames():
            loop.call_soon_threadsafe(frames.put_nowait, frame)
        loop.call_soon_threadsafe(frames.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    while (frame := await frames.get()) is not None:
        header, blobs = frame
        if header["kind"] == "function":
            program.define(header, blobs)
        elif header["kind"] == "cancel":
            if task := running.get(header["id"]):
                task.cancel()
        else:
            task = loop.create_task(program.run_async(header, blobs))
            running[header["id"]] = task
            task.add_done_callback(functools.partial(lambda name, _: running.pop(name, None), header["id"]))


def main() -> None:
    """Serve the agent on a socket, by the arguments: its descriptor, that of the pipe of claims, `process` or `async`,
    and the agent's process id."""
    descriptor, claims, mode, parent = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # What a task starts and leaves behind stays below this process, where it can be found and ended.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    # When the machine runs out of memory the kernel takes a task, not the worker or the server.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    if os.getppid() != parent:  # the agent died before the line above
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # User code finds modules as a script would: this folder is not one of its own.
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    os.set_inheritable(claims, False)
    sys.stdout, sys.stderr = Stream("stdout", 1), Stream("stderr", 2)
    # A crash in native code then leaves its Python stack in the attempt's log.
    faulthandler.enable(file=2, all_threads=True)
    channel = Channel(sock)
    channel.send({"kind": "ready"})
    if mode == "async":
        asyncio.run(_serve_async(channel))
    else:
        _serve(channel, Claims(claims))


if __name__ == "__main__":
    # Pickles made by user code in this process name `__main__`; it must not be this program.
    sys.modules["lattice_runner"] = sys.modules.pop("__main__")
    sys.modules["__main__"] = type(sys)("__main__")
    main()
