"""Converts times and durations. Rule: the core counts seconds, and a negative wait is refused with the field's name."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import cluster_pb2, results_pb2, task_pb2, worker_pb2, workflow_pb2

from lattice_server.core.errors import invalid_field

MONTH_S = 30 * 24 * 3600.0
# One call waits no longer than this for a run or a task to end.
MAX_WAIT_S = 300.0


def timestamp(seconds: float | None) -> Timestamp | None:
    """Return the timestamp `seconds` after the epoch; None stays None."""
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def fill_timestamp(message: Timestamp, seconds: float | None) -> None:
    """Write the time `seconds` after the epoch into an empty message; None leaves it unset."""
    if seconds is not None:
        message.seconds, message.nanos = divmod(int(seconds * 1e9), 10**9)
        message.SetInParent()


def duration(seconds: float) -> Duration:
    """Return a duration."""
    return Duration(seconds=int(seconds), nanos=int((seconds % 1) * 1e9))


def fill_duration(message: Duration, seconds: float) -> None:
    """Write a duration into an empty message."""
    message.seconds, message.nanos = int(seconds), int((seconds % 1) * 1e9)
    message.SetInParent()


def seconds_from(message: Duration | Timestamp) -> float:
    """Return a duration, or a time since the epoch, in seconds."""
    return float(message.seconds) + message.nanos / 1e9


def wait_from_proto(message: Duration, field: str) -> float:
    """Return how long a call waits, in seconds: at most `MAX_WAIT_S`. Raises InvalidError for a negative wait."""
    seconds = seconds_from(message)
    if seconds < 0:
        raise invalid_field(field, "must not be negative")
    return min(seconds, MAX_WAIT_S)


def delay_from_proto(message: Duration, field: str) -> float:
    """Return a delay of a policy, in seconds. Raises InvalidError for a negative one, or one beyond a month."""
    seconds = seconds_from(message)
    if not 0 <= seconds <= MONTH_S:
        raise invalid_field(field, f"must be from 0 to {MONTH_S:.0f} s")
    return seconds


def limit_from_proto(message: Message, name: str, field: str) -> float | None:
    """Return the time limit in a field of a message, in seconds; None when it is unset. Raises InvalidError."""
    if not message.HasField(name):
        return None
    seconds = seconds_from(getattr(message, name))
    if not 0 < seconds <= MONTH_S:
        raise invalid_field(field, f"must be above 0 and at most {MONTH_S:.0f} s; leave it out for no limit")
    return seconds


def disconnect_grace_from_proto(
    message: workflow_pb2.RunWorkflowRequest | task_pb2.RunTaskRequest | results_pb2.GetResultRequest,
) -> float | None:
    """Return after how many seconds without its caller a run is cancelled; None for never. Raises InvalidError."""
    return limit_from_proto(message, "cancel_on_disconnect", "cancel_on_disconnect")


def drain_deadline_from_proto(message: worker_pb2.Draining | cluster_pb2.DrainNodeRequest) -> float | None:
    """Return after how many seconds a drain moves running attempts, at most a month; None when they may finish.

    Raises InvalidError.
    """
    if not message.HasField("deadline"):
        return None
    seconds = seconds_from(message.deadline)
    if seconds < 0:
        raise invalid_field("deadline", "must not be negative")
    return min(seconds, MONTH_S)
