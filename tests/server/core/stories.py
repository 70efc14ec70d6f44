"""Plays a story: a text of events, and of the effects a machine answers with.

A story begins with sentences for people and a line that names the machine. Then come steps: `@TIME EVENT; EVENT ...`,
and below each, indented, one effect a line. Fields of effects that are empty, or as tests/server/core/graphs.py
makes them, are left out.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lattice_server.core import messages
from lattice_server.core.messages import Assign, AttemptInputs, Explanation, QuestionAsked, WelcomeWorker
from lattice_server.core.model import (
    BatchPolicy,
    Binding,
    BindingList,
    Capacity,
    Condition,
    Failure,
    FailureKind,
    FailurePolicy,
    Gpu,
    Isolation,
    NodeSpec,
    OutputRef,
    Payload,
    Resources,
    RetryPolicy,
    TaskSpec,
    WorkflowSpec,
)
from lattice_server.core.run import dag
from lattice_server.core.run.open_run import OpenRun
from lattice_server.core.run.run import Run
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.graphs import SYNC, VALUE, hello, task

RUN_ID = "r"
ORDINARY = (SYNC, Resources(), Isolation.NONE, ("out",), RUN_ID, "127.0.0.1")
HEADING = re.compile(r"(scheduler|run)\b(.*)")

Words = list[str]
Settings = dict[str, str]
Play = Callable[[float, list[tuple[str, Words, Settings]]], list[Any]]


def rewritten(text: str) -> str:
    """Return a story with the effects its machine really answers with."""
    lines: list[str] = []
    play: Play | None = None
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        lines.append(line)
        if play is None and (heading := HEADING.fullmatch(line)):
            play = {"scheduler": scheduler, "run": run}[heading[1]](*parse(heading[2]))
        elif line.startswith("@"):
            assert play is not None, "the machine is named first"
            time, _, rest = line[1:].partition(" ")
            events = [event(part) for part in rest.split(";")]
            lines += [f"    {show(effect)}" for effect in play(float(time), events)]
    return "\n".join(lines) + "\n"


def parse(text: str) -> tuple[Words, Settings]:
    """Return the plain words and the `name=value` words of a text."""
    words = text.split()
    plain = [word for word in words if "=" not in word]
    return plain, dict(word.split("=", 1) for word in words if "=" in word)


def event(text: str) -> tuple[str, Words, Settings]:
    """Return an event's name, words and settings."""
    (name, *words), settings = parse(text)
    return name, words, settings


def failure(settings: Settings) -> Failure:
    """Return the failure some settings tell of."""
    kind = FailureKind(settings.get("kind", "user_error"))
    return Failure(kind, "stopped" if kind is FailureKind.CANCELLED else "broken")


def scheduler(_: Words, settings: Settings) -> Play:
    """Return a play of the scheduler's machine. `ttl` is how long a session is kept, `limits` are such as `db:2`.

    Events: `ready TASK...`, `hello NODE`, `started|succeeded|failed|returned TASK...` of the task's newest lease unless
    `lease` and `session` say otherwise, `detached NODE`, `lost NODE`, `drain NODE`, `cancel TASK...`, `explain TASK`,
    `tick`.
    """
    limits = {name: int(most) for name, _, most in (pair.partition(":") for pair in listed(settings, "limits"))}
    machine = Scheduler("e", float(settings.get("ttl", 30)), limits)
    leases: dict[str, Assign] = {}
    sessions: dict[str, str] = {}

    def events(name: str, words: Words, given: Settings) -> list[Any]:
        match name:
            case "ready":
                return [ready(word, given) for word in words]
            case "hello":
                held = listed(given, "held")
                cpu, gpus = float(given.get("cpu", 1)), int(given.get("gpus", 0))
                capacity = Capacity(cpu, 1 << 30, tuple(Gpu(index) for index in range(gpus)))
                return [replace(hello(word, cpu, given.get("session", ""), held), capacity=capacity) for word in words]
            case "detached":
                return [messages.WorkerDetached(sessions[word]) for word in words]
            case "lost":
                return [messages.WorkerLost(f"worker-of-{word}", "killed") for word in words]
            case "drain":
                return [messages.DrainRequested(word) for word in words]
            case "cancel":
                stopped = Failure(FailureKind.CANCELLED, "stopped")
                return [messages.CancelRequested(RUN_ID, tuple(words), stopped)]
            case "explain":
                return [messages.ExplainRequested(0, RUN_ID, word) for word in words]
            case "tick":
                return []
        return [report(name, word, leases[word], given) for word in words]

    def play(time: float, parts: list[tuple[str, Words, Settings]]) -> list[Any]:
        effects = machine.handle_all([made for part in parts for made in events(*part)], time)
        machine.check()
        for effect in effects:
            if isinstance(effect, Assign):
                leases.update({attempt.task_id: effect for attempt in effect.attempts})
            elif isinstance(effect, WelcomeWorker):
                sessions[effect.worker_id.removeprefix("worker-of-")] = effect.session_id
        return list(effects)

    return play


def ready(word: str, given: Settings) -> messages.TaskReady:
    """Return that a task is ready; `batch` is such as `4/1.5`, its size and wait, `total` the task's time in all."""
    size, _, wait = given.get("batch", "").partition("/")
    after = given.get("after", "")
    spec = task(
        word,
        (after,) if after else (),
        resources=Resources(float(given.get("cpu", 1)), gpu=float(given.get("gpu", 0))),
        retry=RetryPolicy(max_attempts=int(given.get("attempts", 1))),
        batch=BatchPolicy(int(size), float(wait or 0)) if size else None,
        concurrency_key=given.get("key", ""),
        total_timeout_s=float(given["total"]) if "total" in given else None,
    )
    return messages.TaskReady(RUN_ID, spec, spec.inputs, int(given.get("priority", 0)), after, given.get("tenant", ""))


def report(name: str, word: str, assign: Assign, given: Settings) -> Any:
    """Return the report of a worker about one task of a lease."""
    item = [attempt.task_id for attempt in assign.attempts].index(word)
    session_id, lease_id = given.get("session", assign.session_id), given.get("lease", assign.lease_id)
    match name:
        case "started":
            return messages.AttemptStarted(session_id, lease_id, item)
        case "succeeded":
            return messages.AttemptSucceeded(session_id, lease_id, item, {"out": VALUE}, float(given.get("took", 1)))
        case "failed":
            return messages.AttemptFailed(session_id, lease_id, item, failure(given))
        case "returned":
            return messages.LeaseReturned(session_id, lease_id, "")
    raise ValueError(f"there is no event {name!r}")


def run(words: Words, settings: Settings) -> Play:
    """Return a play of one run's machine; `policy` is on a failure, and `open` the grace of a run that a stream holds.

    Words are tasks: `d<b,c` is one that needs b and c, `d<b?` can do without b, `d<b!` runs when b's output is true,
    `d<b*` is mapped over it.

    Events: `start`, `started|succeeded|retrying|failed|cancelled|returned TASK...`, `cancel`, `cancel-task TASK`,
    `append WORD...`, `spawn TASK WORD...`. `succeeded` may say the `value`, or the `items` of a list. Of an open run
    also `hold`, `leave`, `close`, `tick`, `ask TASK NUMBER` and `answer ID`.
    """
    spec = WorkflowSpec(tuple(map(wired, words)), failure_policy=FailurePolicy(settings.get("policy", "fail_fast")))
    machine = Run(RUN_ID, spec, dag.build(spec, ()), ranking=lambda *_: 0.0, is_open="open" in settings)
    caller = OpenRun(machine, float(settings["open"]), 0.0, max_questions=2) if "open" in settings else None
    attempts: dict[str, int] = {}

    def step(name: str, words: Words, given: Settings, time: float) -> list[Any]:
        match name:
            case "start":
                return list(machine.start({}, time))
            case "cancel":
                return list(machine.cancel(" ".join(words) or "stopped", time))
            case "cancel-task":
                return [effect for word in words for effect in machine.cancel_task(word, "stopped", time)]
            case "append":
                return list(machine.append([wired(word) for word in words], time))
            case "spawn":
                return list(machine.spawn(words[0], [wired(word) for word in words[1:]], time))
            case "close":
                return list(machine.close(time))
            case "hold" | "leave" | "tick" | "ask" | "answer":
                assert caller is not None, "the run is not open"
                return called(caller, name, words, time)
        return [effect for word in words for effect in machine.handle(fact(name, word, given), time)]

    def fact(name: str, word: str, given: Settings) -> Any:
        if name == "started":
            attempts[word] = attempts.get(word, 0) + 1
            return messages.TaskStarted(RUN_ID, word, attempts[word], "n", "127.0.0.1", ())
        named = (RUN_ID, word, attempts.get(word, 0))
        match name:
            case "succeeded":
                items = [Payload(VALUE.media_type, item) for item in listed(given, "items")]
                output = Payload(VALUE.media_type, given.get("value", "1"))
                return messages.TaskSucceeded(*named, {"out": output}, {"out": items} if "items" in given else {})
            case "retrying":
                return messages.TaskRetrying(*named, failure(given), float(given.get("delay", 0)))
            case "failed":
                return messages.TaskFailed(*named, failure(given))
            case "cancelled":
                return messages.TaskCancelled(*named, failure({"kind": "cancelled"}))
            case "returned":
                return messages.TaskReturned(RUN_ID, word)
        raise ValueError(f"there is no event {name!r}")

    def play(time: float, parts: list[tuple[str, Words, Settings]]) -> list[Any]:
        effects = [effect for part in parts for effect in step(*part, time)]
        machine.check()
        if caller is not None:
            effects = [*caller.withdraw(effects), *effects]
            caller.check()
        return effects

    return play


def called(caller: OpenRun, name: str, words: Words, time: float) -> list[Any]:
    """Return what happens when the stream that holds a run, or an attempt, does something."""
    match name:
        case "hold":
            return list(caller.hold())
        case "leave":
            caller.leave(time)
            return []
        case "tick":
            return list(caller.tick(time))
        case "answer":
            return [answer for word in words if (answer := caller.answer(word, VALUE)) is not None]
    task_id, number = words
    return list(caller.ask(QuestionAsked(RUN_ID, task_id, 1, "s", f"l-{task_id}", int(number), "what", VALUE)))


def wired(word: str) -> TaskSpec:
    """Return the task a word of a run's story stands for."""
    name, _, sources = word.partition("<")
    inputs: dict[str, Binding] = {}
    over, condition = "", None
    for source in sources.split(",") if sources else ():
        plain = source.rstrip("?!*")
        if source.endswith("!"):
            condition = Condition(OutputRef(plain, "out"))
        else:
            inputs[f"from_{plain}"] = OutputRef(plain, "out", source.endswith("?"))
            over = f"from_{plain}" if source.endswith("*") else over
    return replace(task(name), inputs=inputs, over=over, condition=condition)


def listed(settings: Settings, name: str) -> Words:
    """Return the words of a setting, which a comma parts."""
    return [word for word in settings.get(name, "").split(",") if word]


def show(value: Any) -> str:
    """Return an effect, or a value in one, as a reader wants it."""
    match value:
        case TaskSpec():
            return value.task_id
        case NodeSpec():
            return value.node_id
        case AttemptInputs():
            inputs = f" {show(value.inputs)}" if value.inputs else ""
            return f"{value.task_id}/{value.attempt}{inputs}"
        case Payload():
            return str(value.content)
        case OutputRef():
            return f"{value.task_id}.{value.output}"
        case BindingList():
            return f"[{show(value.items)}]"
        case Explanation():
            return "; ".join(f"{reason.kind.value}: {reason.message}" for reason in value.reasons)
        case Failure():
            where = f" in {value.task_id}" if value.task_id else ""
            return f"<{value.kind.value}: {value.message}{where}>"
        case Mapping():
            return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
        case tuple() | list():
            return ",".join(map(show, value))
        case float():
            return f"{value:g}"
    if not dataclasses.is_dataclass(value):
        return str(getattr(value, "value", value))
    shown = [
        (field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if is_telling(field, value)
    ]
    return " ".join([type(value).__name__, *(f"{name.removesuffix('_id')}={show(item)}" for name, item in shown)])


def is_telling(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """Whether a field has a value a reader would not expect."""
    found = getattr(value, field.name)
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default  # type: ignore[misc]
    return (
        field.repr
        and bool(found)
        and found != default
        and not any(found is usual or found == usual for usual in ORDINARY)
    )
