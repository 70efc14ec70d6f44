// A client of Lattice from the .proto files alone: nothing is generated, no Python is needed on this side.

import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import { setTimeout as sleep } from "node:timers/promises";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

import { dialling } from "./dial.js";
import { untagged } from "./tagged.js";

const PROTO = fileURLToPath(new URL("../../proto", import.meta.url));
const FILES = ["lattice/v1/workflow.proto", "lattice/v1/results.proto"];
const LOADING = { includeDirs: [PROTO], keepCase: true, longs: Number, enums: String, oneofs: true };
const { lattice } = grpc.loadPackageDefinition(loadSync(FILES, LOADING));

const { UNAVAILABLE, INTERNAL, CANCELLED, DEADLINE_EXCEEDED } = grpc.status;
const RESUMABLE = new Set([UNAVAILABLE, INTERNAL, CANCELLED, DEADLINE_EXCEEDED]);
const MIN_BACKOFF_MS = 100;
const MAX_BACKOFF_MS = 2000;
const CALL_LIMIT_MS = 20_000;
const PATIENCE_MS = 30_000;
const TAGGED = "application/vnd.lattice.tagged+json";

/** Python source as a function of a workflow; `name` is the function to call in it. */
export const source = (name, code) => ({ python: { source: { name, code } } });

/** An importable Python function, `package.module:name`, that takes its inputs by keyword. */
export const entrypoint = (path) => ({ entrypoint: path, python: { call_style: "CALL_STYLE_KEYWORDS" } });

/** An input known now. */
export const value = (json) => ({ payload: { json: JSON.stringify(json) } });

/** An input that is another task's output. */
export const output = (taskId, name = "result") => ({ output: { task_id: taskId, output: name } });

/** A task of one output, `result`. */
export const task = (taskId, fn, inputs) => ({ task_id: taskId, function: fn, inputs, outputs: ["result"] });

/** A connection to a server; safe to share. A server that does not answer is tried again for `patienceMs`. */
export class LatticeClient {
  constructor(target = process.env.LATTICE_TARGET || "127.0.0.1:50051", { patienceMs = PATIENCE_MS } = {}) {
    this.workflows = new lattice.v1.WorkflowService(...dialling(target));
    this.results = new lattice.v1.ResultsService(...dialling(target));
    this.patienceMs = patienceMs;
  }

  close() {
    this.workflows.close();
    this.results.close();
  }

  /**
   * Start a run and yield its events, each once and in order, to its end.
   *
   * A stream that breaks ends nothing: the run has an id that we chose, so asking for it again is safe until the
   * server has accepted it; from then on `WatchRun` goes on after the last event seen.
   */
  async *execute(workflow, runId = `run-${randomUUID()}`) {
    const patience = new Patience(this.patienceMs);
    let accepted = false;
    let sequence = 0;
    for (;;) {
      let stream;
      try {
        if (!accepted) await answer(this.workflows, "RunWorkflow", { run_id: runId, workflow });
        accepted = true;
        stream = this.results.WatchRun({ run_id: runId, after_sequence: sequence });
        for await (const response of stream) {
          patience.heard();
          yield* response.events ?? [];
          sequence = response.sequence ?? sequence;
          if (response.complete) return;
        }
        await patience.wait(new Error("the stream ended before the run did"));
      } catch (error) {
        if (!RESUMABLE.has(error.code)) throw error;
        await patience.wait(error);
      } finally {
        stream?.cancel(); // a reader that leaves changes nothing for the run
      }
    }
  }

  /** Wait for a run's end; return the outputs of its final tasks, by task id. Throws when it did not succeed. */
  async outputs(runId) {
    const patience = new Patience(this.patienceMs);
    const request = { run_id: runId, wait: { seconds: CALL_LIMIT_MS / 2000 } };
    for (;;) {
      try {
        const { run, final_tasks: tasks } = await answer(this.results, "GetResult", request);
        patience.heard();
        if (run.state === "RUN_STATE_RUNNING" || run.state === "RUN_STATE_CANCELLING") continue;
        if (run.state !== "RUN_STATE_SUCCEEDED") throw new Error(`${run.state}: ${run.failure?.message ?? ""}`);
        return Object.fromEntries(tasks.map(({ task_id, outputs }) => [task_id, decoded(outputs)]));
      } catch (error) {
        if (!RESUMABLE.has(error.code)) throw error;
        await patience.wait(error);
      }
    }
  }
}

/** How long a server that does not answer is tried again, and how often. */
class Patience {
  #limitMs;
  #heardAt = performance.now();
  #backoffMs = MIN_BACKOFF_MS;

  constructor(limitMs) {
    this.#limitMs = limitMs;
  }

  heard() {
    this.#heardAt = performance.now();
    this.#backoffMs = MIN_BACKOFF_MS;
  }

  /** Wait before another try; throws when there were enough. */
  async wait(error) {
    if (performance.now() - this.#heardAt > this.#limitMs) {
      const text = `nothing was heard of the server for ${this.#limitMs / 1000} s: ${error.message}`;
      throw new Error(text, { cause: error });
    }
    // Spread, so that those who lost a server do not come back together.
    await sleep(Math.random() * this.#backoffMs);
    this.#backoffMs = Math.min(2 * this.#backoffMs, MAX_BACKOFF_MS);
  }
}

/** The response of a call. */
const answer = (service, method, request) =>
  new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + CALL_LIMIT_MS };
    service[method](request, options, (error, response) => (error ? reject(error) : resolve(response)));
  });

/** Outputs as plain values. JSON and tagged JSON are readable from every language; other encodings stay payloads. */
export function decoded(outputs = {}) {
  const read = (payload) => {
    if (payload.content === "json") return JSON.parse(payload.json);
    const isTagged = payload.media_type === TAGGED && payload.content === "data";
    return isTagged ? untagged(payload.data.toString()) : payload;
  };
  return Object.fromEntries(Object.entries(outputs).map(([name, payload]) => [name, read(payload)]));
}
