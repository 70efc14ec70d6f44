// Against a real server at LATTICE_TARGET, through a proxy that breaks connections.

import assert from "node:assert/strict";
import net from "node:net";
import { test } from "node:test";

import { dialling } from "./dial.js";
import { LatticeClient, source, task, value } from "./lattice.js";

const [host, port] = (process.env.LATTICE_TARGET || "127.0.0.1:50051").split(":");
const connect = (target = `${host}:${port}`, patienceMs = 3000) => new LatticeClient(target, { patienceMs });

const naps = (count, seconds) => ({
  functions: { nap: source("nap", "import time\n\ndef nap(seconds):\n    time.sleep(seconds)\n    return seconds\n") },
  tasks: Array.from({ length: count }, (_, i) => ({
    ...task(`nap-${i}`, "nap", { seconds: value(seconds) }),
    after: i ? [`nap-${i - 1}`] : [],
  })),
});

/** A TCP proxy to the server; `cut()` breaks every connection, new ones work. */
async function proxy() {
  const sockets = new Set();
  let connections = 0;
  const server = net.createServer((near) => {
    connections += 1;
    const far = net.connect(Number(port), host);
    near.pipe(far).pipe(near);
    for (const socket of [near, far]) {
      sockets.add(socket);
      socket.on("error", () => {});
      socket.on("close", () => {
        sockets.delete(socket);
        near.destroy();
        far.destroy();
      });
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const cut = () => sockets.forEach((socket) => socket.destroy());
  return {
    target: `127.0.0.1:${server.address().port}`,
    connections: () => connections,
    cut,
    close: () => (server.close(), cut()),
  };
}

test("a stream that breaks goes on after the last event", async () => {
  const between = await proxy();
  const client = connect(between.target);
  try {
    const seen = [];
    for await (const { sequence, event } of client.execute(naps(5, 0.3))) {
      seen.push(sequence);
      if (event === "task_succeeded") between.cut();
    }
    assert.deepEqual(seen, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    assert.ok(between.connections() > 2);
  } finally {
    client.close();
    between.close();
  }
});

test("a reader may leave, and the run goes on", async () => {
  const client = connect();
  try {
    const runId = `run-left-${Date.now()}`;
    for await (const { event } of client.execute(naps(2, 0.3), runId)) if (event === "task_started") break;
    assert.deepEqual(await client.outputs(runId), { "nap-1": { result: 0.3 } });
  } finally {
    client.close();
  }
});

test("a task that fails is an error of the run, with its message", async () => {
  const client = connect();
  try {
    const runId = `run-failed-${Date.now()}`;
    const workflow = {
      functions: { fail: source("fail", "def fail():\n    raise ValueError('no such word')\n") },
      tasks: [task("fail", "fail", {})],
    };
    for await (const { event } of client.execute(workflow, runId)) assert.notEqual(event, "task_succeeded");
    await assert.rejects(client.outputs(runId), /RUN_STATE_FAILED.*no such word/);
  } finally {
    client.close();
  }
});

test("calls end when there is no server", async () => {
  const between = await proxy();
  const client = connect(between.target, 1000);
  try {
    const runId = `run-alone-${Date.now()}`;
    const reading = async () => {
      for await (const { event } of client.execute(naps(1, 30), runId)) if (event === "task_started") between.close();
    };
    await assert.rejects(reading(), /nothing was heard of the server for 1 s/);
    await assert.rejects(client.outputs(runId), /nothing was heard of the server for 1 s/);
  } finally {
    client.close();
    between.close();
  }
});

test("a server beyond this machine needs TLS and a token", () => {
  assert.throws(() => dialling("192.0.2.1:50051", {}), /set LATTICE_TLS_CA and LATTICE_TOKEN/);
  assert.throws(() => dialling("192.0.2.1:50051", { LATTICE_TOKEN: "x" }), /set LATTICE_TLS_CA and LATTICE_TOKEN/);
});
