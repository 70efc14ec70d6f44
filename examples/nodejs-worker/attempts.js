// How an assignment is run: from its inputs, through one call of a function, to one fact for each of its attempts.

import { PayloadError } from "./values.js";

// How long a function that was told to stop may take before it is no longer waited for.
const STOP_GRACE_MS = 1000;
const MAX_TIMER_MS = 2 ** 31 - 1; // what is to come later would come at once

/** Runs assignments with the functions of `registry`, by name; `values` reads inputs and writes outputs. */
export class Attempts {
  logLimitBytes = 1 << 20;
  #registry;
  #values;
  #code = new Map(); // function digest -> what the server sent of it

  constructor(registry, values) {
    this.#registry = registry;
    this.#values = values;
  }

  /** Keep what later assignments name by its digest. */
  learn(functions) {
    for (const code of functions) this.#code.set(code.digest, code);
  }

  /** See the constructor of `Leases`. */
  run(assignment, upstream, report, end) {
    const aborting = new AbortController();
    const timers = [];
    let ending = null; // why it was stopped
    let isOver = false;
    const finish = (facts) => {
      if (isOver) return;
      isOver = true;
      timers.forEach(clearTimeout);
      end(ending ? assignment.attempts.map(() => ({ failed: { failure: ending } })) : facts);
    };
    const stop = (kind, message) => {
      if (ending) return;
      ending = { kind, message };
      aborting.abort(new Error(message));
      timers.push(setTimeout(finish, STOP_GRACE_MS));
    };
    if (assignment.timeout) {
      const limitS = assignment.timeout.seconds + assignment.timeout.nanos / 1e9;
      const text = `the attempt ran longer than ${limitS} s`;
      const wait = (ms) => {
        const next = () => (ms > MAX_TIMER_MS ? wait(ms - MAX_TIMER_MS) : stop("FAILURE_KIND_TIMEOUT", text));
        timers.push(setTimeout(next, Math.min(ms, MAX_TIMER_MS)));
      };
      wait(limitS * 1000);
    }
    const log = this.#logger(report);
    this.#facts(assignment, upstream, report, { signal: aborting.signal, log }).then(finish);
    return stop;
  }

  /** Return one fact for each attempt. Never throws. */
  async #facts(assignment, upstream, report, context) {
    let beganAt = performance.now();
    const duration = () => durationOf((performance.now() - beganAt) / 1000);
    const failed = (error) => ({ failed: { failure: failureOf(error), duration: duration() } });
    try {
      const run = this.#function(assignment);
      const inputs = await Promise.all(assignment.attempts.map((attempt) => this.#inputs(attempt, upstream)));
      report(0, { started: {} });
      beganAt = performance.now();
      const results = assignment.batched ? await run(inputs, context) : [await run(inputs[0], context)];
      if (!Array.isArray(results) || results.length !== inputs.length) {
        throw new PayloadError(`a batch of ${inputs.length} must return a list of as many`);
      }
      return results.map((result) => {
        try {
          if (result instanceof Error) throw result;
          return { succeeded: { ...this.#outputs(result, assignment), duration: duration() } };
        } catch (error) {
          return failed(error);
        }
      });
    } catch (error) {
      return assignment.attempts.map(() => failed(error));
    }
  }

  #function(assignment) {
    const code = this.#code.get(assignment.function_digest);
    const run = code && Object.hasOwn(this.#registry, code.entrypoint) && this.#registry[code.entrypoint];
    if (!run) throw new PayloadError(`this worker has no function ${code?.entrypoint || assignment.function_digest}`);
    if (assignment.isolation !== "ISOLATION_NONE") {
      throw Object.assign(new PayloadError(`this worker cannot set up ${assignment.isolation}`), { kind: "RESOURCES" });
    }
    return run;
  }

  async #inputs(attempt, upstream) {
    const bound = Object.entries(attempt.inputs).map(async ([name, binding]) => {
      return [name, await this.#values.bound(binding, upstream)];
    });
    return Object.fromEntries(await Promise.all(bound));
  }

  #outputs(result, { outputs: names, split_outputs: splitNames }) {
    const hasAll = result !== null && typeof result === "object" && names.every((name) => Object.hasOwn(result, name));
    if (!hasAll && names.length > 1) throw new PayloadError(`what it returned does not have all of: ${names}`);
    const outputs = {};
    const split = {};
    for (const name of names) {
      const value = hasAll ? result[name] : result;
      outputs[name] = this.#values.encoded(value);
      if (!splitNames.includes(name)) continue;
      if (!Array.isArray(value)) throw new PayloadError(`output ${name} is mapped over and is not a list`);
      split[name] = { items: value.map((item) => this.#values.encoded(item)) };
    }
    return { outputs, split };
  }

  /** Return a function that tells what an attempt has to say, up to the limit. */
  #logger(report) {
    let left = this.logLimitBytes;
    return (...words) => {
      const text = `${words.join(" ")}\n`;
      if (left <= 0) return;
      left -= Buffer.byteLength(text);
      const notice = left < 0 ? { text: "the rest is left out\n", truncated: true } : { text };
      report(0, { log: { stream: "LOG_STREAM_STDOUT", ...notice } });
    };
  }
}

const durationOf = (seconds) => ({ seconds: Math.floor(seconds), nanos: Math.floor((seconds % 1) * 1e9) });

function failureOf(error) {
  if (error instanceof PayloadError) return { kind: `FAILURE_KIND_${error.kind ?? "PAYLOAD"}`, message: error.message };
  const bases = [];
  for (let type = Object.getPrototypeOf(Object(error)); type; type = Object.getPrototypeOf(type)) {
    if (type.constructor !== Object) bases.push(type.constructor.name);
  }
  const { name = bases[0], message = String(error), stack = "" } = Object(error);
  const kind = "FAILURE_KIND_USER_ERROR";
  return { kind, type: String(name), message: String(message), traceback: String(stack), base_types: bases.slice(1) };
}
