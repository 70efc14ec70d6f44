"""Owns the settings of runs and tasks. Rule: a setting out of range raises at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar

from google.protobuf.duration_pb2 import Duration
from lattice.v1 import errors_pb2, resources_pb2, task_pb2

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.environment import Env, checked, fill
from lattice_client.graph.names import check_text, items_of, text_map_of, texts_of

ISOLATIONS = {
    "none": resources_pb2.ISOLATION_NONE,
    "subprocess": resources_pb2.ISOLATION_SUBPROCESS,
    "seccomp": resources_pb2.ISOLATION_SECCOMP,
    "docker": resources_pb2.ISOLATION_DOCKER,
}
UNSPECIFIED = resources_pb2.ISOLATION_UNSPECIFIED
BATCH_SCOPES = {"server": task_pb2.BATCH_SCOPE_SERVER, "run": task_pb2.BATCH_SCOPE_RUN}
MAX_INT = 2**31 - 1
# The limits of servers.
MAX_RETRIES = 9_999
MAX_BATCH = 100_000
MAX_WAIT_S = 30 * 24 * 3600
# For how long a run that ends with its client waits for the client to connect again.
DISCONNECT_GRACE_S = 1.0
# The longest time limit of a run that fits the contract.
MAX_TIMEOUT_S = 10**11
Choice = TypeVar("Choice")
RETRIED_KINDS = {
    "error": errors_pb2.FAILURE_KIND_USER_ERROR,
    "crash": errors_pb2.FAILURE_KIND_CRASHED,
    "out_of_memory": errors_pb2.FAILURE_KIND_OUT_OF_MEMORY,
    "timeout": errors_pb2.FAILURE_KIND_TIMEOUT,
}


class TaskRunSettings(TypedDict, total=False):
    """The settings of a run of one task.

    Attributes:
        labels: names and values by which `list_runs` finds the run.
        priority: of this tenant's queued tasks, those of higher priority start first.
        timeout: seconds after which the run fails.
        cancel_on_disconnect: whether the run is cancelled when this client is disconnected for a second, such as by the
            end of its process, or when Python has freed the run. A number is another time in seconds.
    """

    labels: Mapping[str, str] | None
    priority: int
    timeout: float | None
    cancel_on_disconnect: bool | float


class RunSettings(TaskRunSettings, total=False):
    """The settings of a run.

    Attributes:
        labels: names and values by which `list_runs` finds the run.
        priority: of this tenant's queued tasks, those of higher priority start first.
        timeout: seconds after which the run fails.
        cancel_on_disconnect: see `TaskRunSettings`.
        parameters: values of the workflow's parameters, by name.
    """

    parameters: Mapping[str, Any] | None


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise TaskDefinitionError for a setting of a run that does not exist or is out of range."""
    known = RunSettings.__annotations__
    if unknown := [name for name in settings if name not in known]:
        text = f"a run has no setting {', '.join(map(repr, unknown))}; its settings: run_id, {', '.join(known)}"
        raise TaskDefinitionError(text)
    parameters = settings.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise TaskDefinitionError(f'a run\'s parameters are one dict, {{"name": ...}}, not {parameters!r}')
    labels = settings.get("labels")
    if labels is not None and not (isinstance(labels, Mapping) and all(map(_is_text, [*labels, *labels.values()]))):
        raise TaskDefinitionError(f"a run's labels are a dict of texts by text, not {labels!r}")
    priority = settings.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or not -MAX_INT <= priority <= MAX_INT:
        raise TaskDefinitionError(f"a run's priority must be a whole number up to {MAX_INT}, not {priority!r}")
    disconnect_grace_s(settings.get("cancel_on_disconnect", False))
    timeout = settings.get("timeout")
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT_S:
        raise TaskDefinitionError(f"a run's timeout must be seconds above 0, not {timeout!r}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def disconnect_grace_s(given: Any) -> float | None:
    """Return after how many seconds without its client a run is cancelled, or None. Raises TaskDefinitionError."""
    if isinstance(given, bool):
        return DISCONNECT_GRACE_S if given else None
    if not isinstance(given, int | float) or not 0 < given <= MAX_WAIT_S:
        raise TaskDefinitionError(f"cancel_on_disconnect must be true, false or seconds above 0, not {given!r}")
    return float(given)


@dataclass(frozen=True)
class TaskSettings:
    """The settings of a task. Times are in seconds.

    Attributes:
        retries: the number of attempts after the first. An attempt whose worker was lost does not count, see
            `max_worker_losses`.
        retry_on: the failures that are retried, one or several: exception classes, `error` (any exception), `crash`,
            `out_of_memory`, `timeout`; all of them when empty.
        retry_backoff: the wait before the second attempt. It doubles for each further attempt, and varies at random by
            up to a half.
        max_worker_losses: the task fails after so many losses of a worker on which it was alone, 3 by default, whatever
            its `retries`: the task may have ended these workers itself.
        timeout: the time limit of an attempt, after which its process is killed.
        total_timeout: the time limit of the task from the time it is ready to start, with queueing and all attempts.
        batch_size: the most tasks in one call. The function gets a list for each argument (a function that takes
            `params` gets one list of dicts), and returns a list. An exception in that list fails only its task.
        batch_timeout: how long the first task of a batch waits for others.
        batch_within: `server` batches tasks of all your runs, `run` only those of one run.
        max_parallel: the most calls at once, over all runs and tenants.
        concurrency_key: the name whose calls `max_parallel` counts, such as that of an API; by default the function.
            The server may have its own limit for a name.
        priority: of your queued tasks, those of higher priority start first.
        node_selector: labels that the node must have.
        isolation: none, subprocess, seccomp or docker; by default the least level of the server, which is none unless
            it says otherwise.
        network: the servers that a task with isolation may connect to, each `name:port`, such as
            `api.example.com:443` or `*.example.com:443`. Without any it has no network.
        env: environment variables, besides those of the worker; a value is a text or `secret("NAME")`. An attempt with
            any has a process of its own.
        needs_llm: the name of a language model, or several: an attempt starts when they are ready, on a node that
            reaches them. A model that is idle is started.
    """

    retries: int = 0
    retry_on: type[BaseException] | str | Sequence[type[BaseException] | str] = ()
    retry_backoff: float | None = None
    max_worker_losses: int | None = None
    timeout: float | None = None
    total_timeout: float | None = None
    batch_size: int | None = None
    batch_timeout: float | None = None
    batch_within: str = "server"
    max_parallel: int | None = None
    concurrency_key: str = ""
    priority: int = 0
    node_selector: Mapping[str, str] | None = field(default=None)
    isolation: str = ""
    network: Sequence[str] = ()
    env: Env | None = field(default=None, repr=False)
    needs_llm: str | Sequence[str] = ()

    def to_proto(self, label: str) -> task_pb2.TaskSpec:
        """Return the settings as part of a task. Raises TaskDefinitionError naming the task and the setting."""
        for name, least, most in (
            ("retries", 0, MAX_RETRIES),
            ("max_worker_losses", 1, MAX_RETRIES + 1),
            ("max_parallel", 1, MAX_INT),
            ("priority", -MAX_INT, MAX_INT),
            ("batch_size", 1, MAX_BATCH),
        ):
            value = getattr(self, name)
            if value is None and name in {"max_parallel", "batch_size", "max_worker_losses"}:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                is_above = isinstance(value, int) and value > most
                raise _bad(label, name, f"a whole number from {least}{f' to {most}' * is_above}, not {value!r}")
        check_text(f"task {label!r}: concurrency_key", self.concurrency_key)
        labels = text_map_of(f"task {label!r}: node_selector", self.node_selector or {})
        spec = task_pb2.TaskSpec(
            isolation=_choice(label, "isolation", self.isolation, ISOLATIONS) if self.isolation else UNSPECIFIED,
            max_parallel=self.max_parallel,
            concurrency_key=self.concurrency_key,
            priority=self.priority,
            node_selector=labels,
            services=self._services(label),
        )
        if servers := self._network(label):
            spec.sandbox.network.extend(servers)
        fill(spec.environment, checked(f"task {label!r}", self.env))
        if self.retries:
            spec.retry.CopyFrom(self._retry(label))
        elif self.retry_on or self.retry_backoff is not None:
            raise _bad(label, "retry_on" if self.retry_on else "retry_backoff", "used together with retries")
        if self.max_worker_losses is not None:
            spec.retry.max_worker_losses = self.max_worker_losses
        if self.timeout is not None:
            spec.timeout.attempt.CopyFrom(_limit(label, "timeout", self.timeout))
        if self.total_timeout is not None:
            spec.timeout.total.CopyFrom(_limit(label, "total_timeout", self.total_timeout))
        if self.batch_size is not None:
            spec.batch.max_size = self.batch_size
            spec.batch.max_wait.CopyFrom(_duration(label, "batch_timeout", self.batch_timeout or 0.0))
            spec.batch.scope = _choice(label, "batch_within", self.batch_within, BATCH_SCOPES)
        elif self.batch_timeout is not None:
            raise _bad(label, "batch_timeout", "used together with batch_size")
        return spec

    def _network(self, label: str) -> Sequence[str]:
        what = "a list of texts such as 'api.example.com:443'"
        servers = texts_of(f"task {label!r}: network", what, self.network)
        if servers and self.isolation in ("", "none"):
            levels = ", ".join(level for level in ISOLATIONS if level != "none")
            raise _bad(label, "network", f"used together with isolation, one of {levels}")
        return servers

    def _services(self, label: str) -> list[str]:
        names = [self.needs_llm] if isinstance(self.needs_llm, str) else self.needs_llm
        return texts_of(f"task {label!r}: needs_llm", "the name of a model, or a list of names", names)

    def _retry(self, label: str) -> task_pb2.RetryPolicy:
        policy = task_pb2.RetryPolicy(max_attempts=self.retries + 1)
        if self.retry_backoff is not None:
            policy.initial_backoff.CopyFrom(_duration(label, "retry_backoff", self.retry_backoff))
        what = f"one of {', '.join(RETRIED_KINDS)}, a class of exceptions, or a list of these"
        is_one = isinstance(self.retry_on, str | type)
        for cause in [self.retry_on] if is_one else items_of(f"task {label!r}: retry_on", what, self.retry_on):
            if isinstance(cause, type) and issubclass(cause, BaseException):
                name = cause.__qualname__ if cause.__module__ in {"builtins", "__main__"} else _full_name(cause)
                policy.retry_on_types.append(name)
            elif isinstance(cause, str) and cause in RETRIED_KINDS:
                policy.retry_on.append(RETRIED_KINDS[cause])
            else:
                raise _bad(label, "retry_on", f"{what}, not {cause!r}")
        if errors_pb2.FAILURE_KIND_USER_ERROR in policy.retry_on:
            # Exception classes restrict which errors are retried; `error` retries all of them.
            policy.ClearField("retry_on_types")
        elif policy.retry_on_types:
            policy.retry_on.append(errors_pb2.FAILURE_KIND_USER_ERROR)
        return policy


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _choice(label: str, name: str, value: object, choices: Mapping[str, Choice]) -> Choice:
    if not isinstance(value, str) or value not in choices:
        raise _bad(label, name, f"one of {', '.join(choices)}, not {value!r}")
    return choices[value]


def _duration(label: str, name: str, seconds: float) -> Duration:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_WAIT_S:
        raise _bad(label, name, f"seconds from 0 to {MAX_WAIT_S}, not {seconds!r}")
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def _limit(label: str, name: str, seconds: float) -> Duration:
    duration = _duration(label, name, seconds)
    if not duration.ToNanoseconds():
        raise _bad(label, name, f"seconds above 0, not {seconds!r}")
    return duration


def _bad(label: str, name: str, expected: str) -> TaskDefinitionError:
    return TaskDefinitionError(f"task {label!r}: {name} must be {expected}")
