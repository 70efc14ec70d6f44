"""Owns the list of all metrics: names, types, units, labels, buckets. Rule: a released name never changes its meaning.

Names and units are those of OpenTelemetry. In Prometheus dots become underscores, and the unit is appended.
"""

from enum import Enum

from lattice_server.core.frozen import frozen

# Seconds of calls and of the server's own work, and seconds of users' work.
SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)
SIZE_BYTES = (256.0, 2.0**12, 2.0**16, 2.0**20, 2.0**24, 2.0**28, 2.0**32)


class Kind(Enum):
    """The type of an instrument."""

    COUNTER = "counter"  # Only grows.
    UP_DOWN = "updowncounter"  # A number that may be added up over servers.
    GAUGE = "gauge"  # A number that may not.
    HISTOGRAM = "histogram"


@frozen
class Instrument:
    """One metric. `bounds` are the upper bounds of the buckets of a histogram."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    description: str
    bounds: tuple[float, ...] = ()


def _counter(name: str, unit: str, labels: tuple[str, ...], description: str) -> Instrument:
    return Instrument(name, Kind.COUNTER, unit, labels, description)


def _up_down(name: str, unit: str, labels: tuple[str, ...], description: str) -> Instrument:
    return Instrument(name, Kind.UP_DOWN, unit, labels, description)


def _gauge(name: str, unit: str, labels: tuple[str, ...], description: str) -> Instrument:
    return Instrument(name, Kind.GAUGE, unit, labels, description)


def _histogram(
    name: str, unit: str, labels: tuple[str, ...], description: str, bounds: tuple[float, ...]
) -> Instrument:
    return Instrument(name, Kind.HISTOGRAM, unit, labels, description, bounds)


METHOD = ("rpc.method",)

CALL_DURATION = _histogram(
    "rpc.server.call.duration",
    "s",
    (*METHOD, "rpc.response.status_code"),
    "Time from the start of a unary call to its end.",
    SHORT_S,
)
STREAMS = _up_down("lattice.server.streams", "{stream}", METHOD, "Streaming calls that are open.")
STREAM_MESSAGES = _counter(
    "lattice.server.stream.messages", "{message}", (*METHOD, "direction"), "Messages of streaming calls."
)
STREAM_CALLS = _counter(
    "lattice.server.stream.calls",
    "{call}",
    (*METHOD, "rpc.response.status_code"),
    "Streaming calls that ended, by the status that the server gave them.",
)
ERRORS = _counter(
    "lattice.server.errors",
    "{error}",
    ("reason",),
    "Calls that ended with an error, and refusals within a stream, by the reason sent to the caller.",
)
LOOP_LAG = _histogram(
    "lattice.server.loop.lag",
    "s",
    (),
    "By how much a timer of the main thread was late; one sample a second.",
    SHORT_S,
)

RUNS = _counter("lattice.runs", "{run}", ("workflow", "outcome"), "Runs that ended.")
RUNS_STARTED = _counter("lattice.runs.started", "{run}", ("workflow",), "Runs that were accepted.")
RUNS_ACTIVE = _up_down("lattice.runs.active", "{run}", ("state",), "Runs that have not ended.")
RUN_DURATION = _histogram(
    "lattice.run.duration", "s", ("workflow", "outcome"), "Time from the acceptance of a run to its end.", LONG_S
)
RUN_EVENTS = _counter("lattice.run.events", "{event}", (), "Numbered events of runs.")

TASKS = _counter("lattice.tasks", "{task}", ("task", "outcome", "failure_kind"), "Tasks that ended.")
TASKS_ACTIVE = _up_down("lattice.tasks.active", "{task}", ("state",), "Tasks that have not ended.")
TASK_ATTEMPTS = _counter("lattice.task.attempts", "{attempt}", ("isolation",), "Attempts that started.")
TASK_RETRIES = _counter(
    "lattice.task.retries", "{attempt}", ("reason",), "Attempts that failed and are followed by another one."
)
TASK_DURATION = _histogram(
    "lattice.task.duration", "s", ("task", "outcome"), "Time that the function of an attempt ran.", LONG_S
)
OUTPUT_SIZE = _histogram("lattice.output.size", "By", ("place",), "Size of an output of a task.", SIZE_BYTES)

CHUNKS = _counter("lattice.chunks", "{chunk}", (), "Chunks of streamed output that the server took.")
CHUNK_BYTES = _counter("lattice.chunks.io", "By", (), "Memory of these chunks when they were taken.")
CHUNKS_DROPPED = _counter("lattice.chunks.dropped", "{chunk}", (), "Chunks that were dropped because of a bound.")
CHUNK_READERS = _up_down("lattice.chunk.readers", "{reader}", (), "Readers of streamed output.")

TASK_CALLS = _counter("lattice.calls", "{call}", ("outcome",), "Tasks that another task called, and that ended.")
TASK_CALL_DURATION = _histogram(
    "lattice.call.duration", "s", (), "Time from when a called task could start to its end.", LONG_S
)
CALLS_WAITING = _up_down("lattice.calls.waiting", "{call}", (), "Calls whose end an attempt waits for.")

QUEUE_WAIT = _histogram(
    "lattice.queue.wait", "s", (), "Time from when a task could start to when it was sent to a worker.", LONG_S
)
QUEUE_SIZE = _up_down("lattice.queue.size", "{task}", (), "Tasks that could start and have no worker.")
QUEUE_AGE = _gauge("lattice.queue.oldest.age", "s", (), "Longest wait of the tasks that are next in the queue.")
DISPATCH = _histogram(
    "lattice.dispatch.duration",
    "s",
    (),
    "Time from when a task was sent to a worker to when it started there.",
    SHORT_S,
)
PASS_DURATION = _histogram(
    "lattice.scheduler.pass.duration", "s", (), "Time of one pass of the scheduler: events and placement.", SHORT_S
)
SCHEDULER_EVENTS = _counter("lattice.scheduler.events", "{event}", (), "Events that the scheduler took.")
LEASES = _up_down("lattice.leases", "{lease}", (), "Leases that workers have.")

NODES = _up_down("lattice.nodes", "{node}", ("state",), "Nodes of the cluster.")
SESSIONS = _counter("lattice.worker.sessions", "{session}", ("event",), "Sessions of workers that began, or ended.")
NODE_CPU = _gauge("lattice.node.cpu.capacity", "{cpu}", ("node",), "CPUs of a node.")
NODE_CPU_USED = _gauge("lattice.node.cpu.reserved", "{cpu}", ("node",), "CPUs of a node that leases reserve.")
NODE_MEMORY = _gauge("lattice.node.memory.capacity", "By", ("node",), "Memory of a node.")
NODE_MEMORY_USED = _gauge("lattice.node.memory.reserved", "By", ("node",), "Memory of a node that leases reserve.")
NODE_GPUS = _gauge("lattice.node.gpu.capacity", "{gpu}", ("node",), "GPUs of a node.")
NODE_GPUS_USED = _gauge("lattice.node.gpu.reserved", "{gpu}", ("node",), "GPUs of a node that leases reserve.")

RUNNERS = _up_down(
    "lattice.runners", "{runner}", ("isolation", "state"), "Processes of workers that run, or wait to run, attempts."
)
RUNNER_STARTS = _counter("lattice.runner.starts", "{runner}", ("isolation",), "Processes that workers started.")

RUNNER_WAITS = _counter(
    "lattice.runner.waits",
    "{attempt}",
    ("isolation",),
    "Attempts for which no process waited, so that one was started.",
)
RUNNER_START = _histogram(
    "lattice.runner.start.duration", "s", ("isolation",), "Time until a started process could run attempts.", SHORT_S
)
SANDBOX_ATTEMPTS = _counter(
    "lattice.sandbox.attempts",
    "{attempt}",
    ("isolation", "failure_kind"),
    "Attempts in sandboxes that ended; without a kind of failure they succeeded.",
)

SERVICES = _up_down("lattice.services", "{service}", ("state",), "Services.")
INSTANCES = _up_down("lattice.service.instances", "{instance}", ("state",), "Instances of services.")
INSTANCE_START = _histogram(
    "lattice.service.start.duration",
    "s",
    ("service", "start"),
    "Time from the need for an instance to its readiness; a start is cold when no other instance was ready.",
    LONG_S,
)
RESTARTS = _counter("lattice.service.restarts", "{instance}", ("service", "reason"), "Instances that failed.")
GATEWAY_REQUESTS = _counter(
    "lattice.gateway.requests",
    "{request}",
    ("service", "http.response.status_code"),
    "Requests of tasks to models that gateways answered; without a service their key was not valid.",
)
GATEWAY_DURATION = _histogram(
    "lattice.gateway.request.duration", "s", ("service",), "Time of such a request to the end of its answer.", LONG_S
)

JOURNAL_COMMIT = _histogram("lattice.journal.commit.duration", "s", (), "Time of a commit of the journal.", SHORT_S)
JOURNAL_LAG = _histogram(
    "lattice.journal.lag",
    "s",
    (),
    "Time until the oldest record of a commit was durable.",
    SHORT_S,
)
JOURNAL_RECORDS = _counter("lattice.journal.records", "{record}", (), "Records that are durable.")
JOURNAL_BYTES = _counter("lattice.journal.io", "By", (), "Bytes of these records.")
JOURNAL_PENDING = _up_down("lattice.journal.pending", "By", (), "Bytes of records that wait for a commit.")
JOURNAL_SIZE = _up_down("lattice.journal.size", "By", ("part",), "Bytes of the files of the journal.")
JOURNAL_RUNS = _up_down("lattice.journal.runs", "{run}", ("state",), "Runs in the journal.")

STORE_USAGE = _up_down("lattice.store.usage", "By", ("store",), "Bytes in a store of the server.")
STORE_LIMIT = _up_down("lattice.store.limit", "By", ("store",), "Bytes that a store of the server may have.")

CPU_TIME = _counter("process.cpu.time", "s", ("cpu.mode",), "CPU time of the server's process.")
MEMORY = _up_down("process.memory.usage", "By", (), "Physical memory of the server's process.")
# The name of the conventions ends in `count`, which Prometheus reserves for histograms.
DESCRIPTORS = _up_down("lattice.server.open_files", "{file}", (), "Open file descriptors of the server's process.")

INSTRUMENTS = tuple(found for found in list(globals().values()) if isinstance(found, Instrument))
