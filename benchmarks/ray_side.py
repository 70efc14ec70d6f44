"""The same workloads on raw Ray: tasks, and calls of long-lived actors. The yardstick."""

import asyncio
import itertools
import time
from typing import Any

import numpy as np
import ray


def _noop(x: Any = None) -> Any:
    return x


class Actor:
    """One process that takes calls."""

    def noop(self, x: Any = None) -> Any:
        return x

    def count(self, *values: Any) -> int:
        return len(values)

    def work(self, seconds: float, *_: Any) -> None:
        time.sleep(seconds)

    def make(self, size: int) -> Any:
        return np.ones(size // 8)

    def grow(self, array: Any) -> Any:
        return array + 1

    def total(self, array: Any) -> float:
        return float(array[0])


class AsyncActor:
    """One process that takes many waiting calls."""

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Tasks:
    """Every call is a Ray task."""

    name = "ray tasks"

    def __init__(self) -> None:
        methods = [name for name in vars(Actor) if not name.startswith("_")]
        instance = Actor()
        self._remote = {name: ray.remote(_bound(instance, name)) for name in methods}

    def call(self, name: str, *args: Any) -> Any:
        return self._remote[name].remote(*args)


class Actors:
    """Every call goes to one of `count` actors in turn."""

    name = "ray actors"

    def __init__(self, count: int) -> None:
        self._actors = itertools.cycle([ray.remote(Actor).options(num_cpus=0).remote() for _ in range(count)])

    def call(self, name: str, *args: Any) -> Any:
        return getattr(next(self._actors), name).remote(*args)


def _bound(instance: Actor, name: str) -> Any:
    def function(*args: Any) -> Any:
        return getattr(instance, name)(*args)

    return function


Caller = Tasks | Actors


def one(caller: Caller) -> float:
    started = time.perf_counter()
    ray.get(caller.call("noop", 1))
    return time.perf_counter() - started


def chain(caller: Caller, length: int = 50) -> float:
    started = time.perf_counter()
    last = caller.call("noop", 1)
    for _ in range(length - 1):
        last = caller.call("noop", last)
    ray.get(last)
    return (time.perf_counter() - started) / length


def fan(caller: Caller, width: int = 1000) -> float:
    started = time.perf_counter()
    first = caller.call("noop", 1)
    ray.get(caller.call("count", *[caller.call("noop", first) for _ in range(width)]))
    return time.perf_counter() - started


def agent(caller: Caller) -> float:
    started = time.perf_counter()
    first = caller.call("work", 0.05)
    ray.get(caller.call("work", 0.05, *[caller.call("work", 0.3, first) for _ in range(3)]))
    return time.perf_counter() - started - 0.4


def large(caller: Caller, size: int = 100_000_000) -> float:
    started = time.perf_counter()
    last = caller.call("make", size)
    for _ in range(3):
        last = caller.call("grow", last)
    ray.get(caller.call("total", last))
    return time.perf_counter() - started


def waiting(actor: Any, count: int = 1000) -> float:
    started = time.perf_counter()
    ray.get([actor.wait.remote(1.0) for _ in range(count)])
    return time.perf_counter() - started


def chains_until(caller: Caller, deadline: float) -> int:
    done = 0
    while time.time() < deadline:
        last = caller.call("noop", 1)
        for _ in range(2):
            last = caller.call("noop", last)
        ray.get(last)
        done += 1
    return done
