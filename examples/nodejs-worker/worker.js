// A worker of Lattice from the .proto files alone: `node worker.js --addr HOST:PORT [--functions FILE]`.
//
// This file owns the stream: it dials, says hello, holds the session, and comes back after a break. `Close` is the
// truth about why a stream ended; one that ends without it, or falls silent, is dialled again.

import { randomUUID } from "node:crypto";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

import { Attempts } from "./attempts.js";
import { isLoopback, open } from "./channel.js";
import { Leases, now } from "./leases.js";
import { Values } from "./values.js";

const VERSION = "0.1.0";
const PROTOCOL_VERSION = 1;
const MIN_BACKOFF_MS = 100;
const MAX_BACKOFF_MS = 2000;
const DIAL_MS = 10_000; // how long a server may take to say anything at all
const FIRST_BEAT_MS = 500; // until the server says how often
const LET_GO_MS = 5000; // a server that cannot be reached cannot let the worker go

class Worker {
  #config;
  #registry;
  #values;
  #attempts;
  #leases;
  #channel = null;
  #stream = null; // set while the server has welcomed this worker and the stream holds
  #pending = []; // reports to send
  #serverId = "";
  #draining = null;
  #heardAt = 0;
  #beatMs = FIRST_BEAT_MS;
  #silenceMs = DIAL_MS;

  constructor(config, registry) {
    this.#config = config;
    this.#registry = registry;
    this.#values = new Values(config.nodeId, (artifactId) => this.#read(artifactId));
    this.#attempts = new Attempts(registry, this.#values);
    this.#leases = new Leases((...lease) => this.#attempts.run(...lease), (report) => this.#say(report));
  }

  /** Serve until the server closes the session for good, or is away for too long; return why it ended. */
  async run() {
    const { target, giveUpS } = this.#config;
    let welcomeAt = performance.now();
    for (let backoffMs = MIN_BACKOFF_MS; ; backoffMs = Math.min(2 * backoffMs, MAX_BACKOFF_MS)) {
      const { close, wasWelcome } = await this.#serve();
      if (close && close.reason !== "CLOSE_REASON_SHUTDOWN") return close;
      if (wasWelcome) {
        backoffMs = MIN_BACKOFF_MS;
        welcomeAt = performance.now();
      } else if (this.#draining && !this.#leases.held().length) {
        return { reason: "CLOSE_REASON_DRAINED", message: "there is nothing to finish" };
      } else if (performance.now() - welcomeAt > giveUpS * 1000) {
        return { reason: "", message: `there was no server at ${target} for ${giveUpS} s` };
      }
      // Spread, so that a server that comes back does not meet all its workers at once.
      await sleep(Math.random() * backoffMs);
    }
  }

  /** Ask for no more work, and for the end once what is held is over, or moved after the deadline. */
  leave(deadlineS) {
    this.#draining = { deadline: { seconds: deadlineS, nanos: 0 } };
    this.#stream?.write({ draining: this.#draining });
  }

  /** Hold one stream; return the server's `Close`, or null when the stream broke. */
  async #serve() {
    this.#channel = open(this.#config.target);
    const stream = this.#channel.workers.Connect(this.#channel.metadata());
    stream.on("error", () => {}); // it is read below; what comes after that is of no interest
    this.#heardAt = performance.now();
    this.#silenceMs = DIAL_MS;
    let beat = setTimeout(() => this.#beat(stream, (next) => (beat = next)), this.#beatMs);
    let wasWelcome = false;
    let close = null;
    try {
      stream.write({ hello: this.#hello() });
      for await (const response of stream) {
        this.#heardAt = performance.now();
        if (response.welcome) this.#welcome(response.welcome, stream);
        wasWelcome ||= response.welcome !== null;
        if (this.#stream === stream) this.#take(response);
        if (response.close) {
          close = response.close;
          break;
        }
      }
    } catch (error) {
      console.error(`the stream broke: ${error.details ?? error.message}`);
    } finally {
      clearTimeout(beat);
      this.#stream = null;
      // The server waits for the worker to hang up.
      stream.cancel();
      this.#channel.close();
    }
    if (close) console.error(`the server closed the stream: ${close.reason}: ${close.message}`);
    return { close, wasWelcome };
  }

  /** Give signs of life, and break a stream that gives none. */
  #beat(stream, again) {
    if (performance.now() - this.#heardAt > this.#silenceMs) {
      stream.cancel();
      return;
    }
    if (this.#stream === stream) {
      const { received } = this.#leases;
      const heartbeat = { held_lease_ids: this.#leases.held(), assignment_sequence: received, send_time: now() };
      stream.write({ reports: this.#leases.overdue(), heartbeat });
    }
    again(setTimeout(() => this.#beat(stream, again), this.#beatMs));
  }

  #hello() {
    const { workerId, nodeId, target, capacity, labels } = this.#config;
    return {
      worker_id: workerId,
      node_id: nodeId,
      session_id: this.#leases.sessionId,
      held_lease_ids: this.#leases.held(),
      hostname: os.hostname(),
      node_ip: addressTowards(target),
      capacity,
      labels,
      isolations: ["ISOLATION_NONE"],
      entrypoints: Object.keys(this.#registry),
      runtime: { language: "node", version: process.versions.node },
      version: VERSION,
      protocol_version: PROTOCOL_VERSION,
      send_time: now(),
      pid: process.pid,
    };
  }

  /** Act on what a message asks for, in the order of its fields. `drain` asks for nothing: `close` follows it. */
  #take(response) {
    this.#leases.acknowledge(response.acknowledged_sequence);
    this.#values.drop(response.drop_artifact_ids);
    this.#attempts.learn(response.functions);
    for (const assignment of response.assignments) this.#leases.assign(assignment);
    for (const id of response.revoke_lease_ids) this.#leases.revoke(id);
    for (const id of response.stop_lease_ids) this.#leases.stop(id);
    for (const wanted of response.send_artifacts) {
      this.#values.upload(wanted, this.#channel.workers.UploadArtifact(this.#channel.metadata(), warn));
    }
  }

  #welcome(welcome, stream) {
    const { heartbeat_interval: beat, silence_limit: silence, server_id: serverId } = welcome;
    this.#beatMs = milliseconds(beat) || this.#beatMs;
    this.#silenceMs = milliseconds(silence) || Infinity;
    this.#attempts.logLimitBytes = welcome.log_limit_bytes;
    this.#values.inlineLimitBytes = welcome.inline_limit_bytes;
    if (this.#serverId !== serverId) this.#values.clear();
    this.#serverId = serverId;
    this.#stream = stream;
    this.#pending = this.#leases.welcome(welcome);
    this.#flush();
    if (this.#draining) stream.write({ draining: this.#draining });
    const what = welcome.resumed ? "resumed" : "began";
    console.log(`${what} session ${welcome.session_id} with ${Object.keys(this.#registry).length} functions`);
  }

  /** Send a report along with those that come in the same turn; without a stream it waits in the outbox. */
  #say(report) {
    if (!this.#stream) return;
    if (!this.#pending.length) setImmediate(() => this.#flush());
    this.#pending.push(report);
  }

  #flush() {
    const reports = this.#pending;
    this.#pending = [];
    if (reports.length) this.#stream?.write({ reports });
  }

  async #read(artifactId) {
    const chunks = [];
    const call = this.#channel.artifacts.ReadArtifact({ artifact_id: artifactId }, this.#channel.metadata());
    for await (const { data } of call) chunks.push(data);
    return Buffer.concat(chunks);
  }
}

const warn = (error) => error && console.error(`an artifact was not sent: ${error.details}`);

const milliseconds = (duration) => (duration ? duration.seconds * 1000 + duration.nanos / 1e6 : 0);

function addressTowards(target) {
  if (isLoopback(target)) return "127.0.0.1";
  const known = Object.values(os.networkInterfaces()).flat();
  return known.find(({ internal, family }) => !internal && family === "IPv4")?.address ?? "127.0.0.1";
}

function flags() {
  const text = { type: "string" };
  const { values } = parseArgs({
    options: {
      addr: { ...text, default: process.env.LATTICE_TARGET || "127.0.0.1:50051" },
      "node-id": { ...text, default: `${os.hostname()}-nodejs` },
      "worker-id": text,
      functions: { ...text, default: fileURLToPath(new URL("functions.js", import.meta.url)) },
      "num-cpus": { ...text, default: String(os.cpus().length) },
      label: { ...text, multiple: true, default: [] },
      "drain-deadline": { ...text, default: "30" },
      "give-up": { ...text, default: "60" },
    },
  });
  for (const name of ["num-cpus", "drain-deadline", "give-up"]) {
    if (!(Number(values[name]) >= 0)) throw new Error(`--${name} must be a number from 0, not '${values[name]}'`);
  }
  const cpu = Number(values["num-cpus"]);
  return {
    target: values.addr,
    nodeId: values["node-id"],
    workerId: values["worker-id"] ?? `${values["node-id"]}-${randomUUID().slice(0, 12)}`,
    functions: path.resolve(values.functions),
    capacity: { cpu, memory_bytes: os.totalmem(), slots: Math.max(32, 4 * Math.ceil(cpu)), async_slots: 4096 },
    labels: Object.fromEntries(values.label.map((label) => label.split(/=(.*)/s).slice(0, 2))),
    drainDeadlineS: Number(values["drain-deadline"]),
    giveUpS: Number(values["give-up"]),
  };
}

/** Return the flags, after trying that the server may be dialled with them; wrong ones end the program with one line. */
function checkedFlags() {
  try {
    const given = flags();
    open(given.target).close();
    return given;
  } catch (error) {
    console.error(`this worker cannot start: ${error.message}`);
    process.exit(2);
  }
}

const config = checkedFlags();
const { default: registry } = await import(pathToFileURL(config.functions));
const worker = new Worker(config, registry);
let isLeaving = false;
for (const signal of ["SIGINT", "SIGTERM"]) {
  // The first asks the server to let the worker go, the next one ends it.
  process.on(signal, () => {
    if (isLeaving) process.exit(1);
    isLeaving = true;
    worker.leave(config.drainDeadlineS);
    setTimeout(() => process.exit(1), config.drainDeadlineS * 1000 + LET_GO_MS);
  });
}
const { reason, message } = await worker.run();
if (reason !== "CLOSE_REASON_DRAINED") console.error(`this worker ends: ${message}`);
process.exit(reason === "CLOSE_REASON_DRAINED" ? 0 : 1);
