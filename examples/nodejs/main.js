// Runs a workflow of Python functions from Node.js: `node main.js ["some text"]`, while a server is up.

import { randomUUID } from "node:crypto";

import { LatticeClient, decoded, entrypoint, output, source, task, value } from "./lattice.js";

const text = process.argv[2] ?? "A workflow is a graph of tasks and a run is one execution of it";

const workflow = {
  display_name: "word statistics",
  functions: {
    words: source("words", "def words(text):\n    return text.split()\n"),
    lengths: source("lengths", "def lengths(words):\n    return [len(word) for word in words]\n"),
    longest: source("longest", "def longest(words):\n    return max(words, key=len)\n"),
    mean: entrypoint("statistics:mean"),
    report: source("report", "def report(**found):\n    return {**found, 'mean': round(found['mean'], 2)}\n"),
  },
  tasks: [
    task("words", "words", { text: value(text) }),
    task("lengths", "lengths", { words: output("words") }),
    task("longest", "longest", { words: output("words") }), // beside `lengths`
    task("mean", "mean", { data: output("lengths") }),
    task("report", "report", { longest: output("longest"), mean: output("mean"), text: value(text) }),
  ],
};

const client = new LatticeClient();
try {
  const runId = `run-${randomUUID()}`;
  for await (const { sequence, event, ...body } of client.execute(workflow, runId)) {
    const { task_id: taskId = "", outputs, state, failure } = body[event];
    const detail = outputs ? JSON.stringify(decoded(outputs).result) : (failure?.message ?? state ?? "");
    console.log(`${String(sequence).padStart(3)}  ${event.padEnd(15)} ${taskId.padEnd(8)} ${detail}`);
  }
  const { report } = await client.outputs(runId);
  console.log(JSON.stringify(report.result));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  client.close();
}
