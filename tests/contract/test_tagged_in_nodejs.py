"""Tagged JSON, as the client in Node.js reads it."""

import datetime as dt
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lattice_worker.runner.encoding import tagged

MODULE = Path(__file__).resolve().parent.parent.parent / "examples" / "nodejs" / "tagged.js"
# Prints each value as JSON, with the names of classes that JSON does not tell.
SCRIPT = """
import { readFileSync } from "node:fs";
import { untagged } from "%s";
const shown = (value) => {
  if (typeof value === "bigint") return ["bigint", value.toString()];
  if (typeof value === "number" && !Number.isFinite(value)) return ["number", String(value)];
  if (value instanceof Set) return ["set", ...[...value].map(shown)];
  if (value instanceof Map) return ["map", ...[...value].map(shown)];
  if (value instanceof Uint8Array) return ["bytes", ...value];
  if (value instanceof Date) return ["date", value.toISOString()];
  if (Array.isArray(value)) return value.map(shown);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, shown(item)]));
};
const outcome = (text) => {
  try { return shown(untagged(text)); } catch (error) { return { error: error.message }; }
};
console.log(JSON.stringify(JSON.parse(readFileSync(0)).map(outcome)));
"""


def read_by_node(texts: list[str]) -> list[Any]:
    if (node := shutil.which("node")) is None:
        pytest.skip("there is no Node.js")
    command = [node, "--input-type=module", "-e", SCRIPT % MODULE.as_uri()]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_nodejs_decodes_tagged_json_of_a_runner() -> None:
    inner = [1]
    values = {
        "tuple": ((1, "a"), [1, "a"]),
        "set": ({"x"}, ["set", "x"]),
        "mapping": ({(1, 2): b"\0\1"}, ["map", [[1, 2], ["bytes", 0, 1]]]),
        "tag": ({"$x": 1}, ["map", ["$x", 1]]),
        "large": (-(2**70), ["bigint", str(-(2**70))]),
        "infinite": (math.inf, ["number", "Infinity"]),
        "moment": (dt.datetime(2026, 1, 2, tzinfo=dt.UTC), ["date", "2026-01-02T00:00:00.000Z"]),
        "shared": ([inner, (inner,)], [[1], [[1]]]),
    }
    texts = [(tagged.encode(value) or b"").decode() for value, _ in values.values()]
    assert dict(zip(values, read_by_node(texts), strict=True)) == {name: shown for name, (_, shown) in values.items()}


def test_nodejs_refuses_tags_that_are_malformed() -> None:
    found = read_by_node(['{"$x":1}', '{"$tuple":[],"a":1}', '{"$same":0}', "[" * 200 + "]" * 200])
    assert all("error" in outcome for outcome in found), found
