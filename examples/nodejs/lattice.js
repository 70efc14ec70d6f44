// A client of Lattice from the .proto files alone: nothing is generated, no Python is needed on this side.

import { randomUUID } from "node:crypto";
import { fileURLToPath } from "node:url";
import { setTimeout as sleep } from "node:timers/promises";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTO = fileURLToPath(new URL("../../proto", import.meta.url));
const FILES = ["lattice/v1/workflow.proto", "lattice/v1/results.proto"];
const LOADING = { includeDirs: [PROTO], keepCase: true, longs: Number, enums: String, oneofs: true };
const { lattice } = grpc.loadPackageDefinition(loadSync(FILES, LOADING));

const RESUMABLE = new Set([grpc.status.UNAVAILABLE, grpc.status.INTERNAL, grpc.status.CANCELLED]);
const MIN_BACKOFF_MS = 100;
const MAX_BACKOFF_MS = 5000;

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

/** A connection to a server; safe to share. */
export class LatticeClient {
  constructor(target = process.env.LATTICE_TARGET || "127.0.0.1:50051") {
    const credentials = grpc.credentials.createInsecure();
    this.workflows = new lattice.v1.WorkflowService(target, credentials);
    this.results = new lattice.v1.ResultsService(target, credentials);
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
    let accepted = false;
    let sequence = 0;
    let backoffMs = MIN_BACKOFF_MS;
    for (;;) {
      let stream;
      try {
        if (!accepted) await answer(this.workflows, "RunWorkflow", { run_id: runId, workflow });
        accepted = true;
        stream = this.results.WatchRun({ run_id: runId, after_sequence: sequence });
        for await (const response of stream) {
          backoffMs = MIN_BACKOFF_MS;
          yield* response.events ?? [];
          sequence = response.sequence ?? sequence;
          if (response.complete) return;
        }
      } catch (error) {
        if (!RESUMABLE.has(error.code)) throw error;
      } finally {
        stream?.cancel(); // a reader that leaves changes nothing for the run
      }
      await sleep(Math.random() * backoffMs);
      backoffMs = Math.min(2 * backoffMs, MAX_BACKOFF_MS);
    }
  }

  /** Return the outputs of a run's final tasks, by task id. Throws when the run did not succeed. */
  async outputs(runId) {
    const request = { run_id: runId, wait: { seconds: 60 } };
    const { run, final_tasks: tasks } = await answer(this.results, "GetResult", request);
    if (run.state !== "RUN_STATE_SUCCEEDED") throw new Error(`${run.state}: ${run.failure?.message ?? ""}`);
    return Object.fromEntries(tasks.map(({ task_id, outputs }) => [task_id, decoded(outputs)]));
  }
}

/** The response of a call. */
const answer = (service, method, request) =>
  new Promise((resolve, reject) =>
    service[method](request, (error, response) => (error ? reject(error) : resolve(response))),
  );

/** Outputs as plain values. Only JSON is readable from every language; other encodings stay payloads. */
export function decoded(outputs = {}) {
  const read = (payload) => (payload.content === "json" ? JSON.parse(payload.json) : payload);
  return Object.fromEntries(Object.entries(outputs).map(([name, payload]) => [name, read(payload)]));
}
