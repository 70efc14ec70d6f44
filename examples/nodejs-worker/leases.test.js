// What a worker does with each command, without a server.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Leases } from "./leases.js";

/** Leases whose runs the test ends: `running` has the ends by lease id, `said` each report as text. */
function scene() {
  const running = new Map();
  const said = [];
  const stopped = [];
  const run = (assignment, upstream, report, end) => {
    running.set(assignment.lease_id, { upstream, end });
    return (kind) => stopped.push(`${assignment.lease_id} ${kind}`);
  };
  const leases = new Leases(run, ({ lease_id: id, item, sequence, time, ...fact }) => {
    said.push(`${sequence} ${id}/${item} ${Object.keys(fact)[0]}`);
  });
  leases.welcome({ session_id: "s", resumed: false });
  let sequence = 0;
  const assign = (id, { slot = 1, after = "", size = 1 } = {}) => {
    const attempts = Array(size).fill({});
    leases.assign({ lease_id: id, slot, after_lease_id: after, sequence: ++sequence, attempts });
  };
  return { leases, running, said, stopped, assign };
}

const good = (outputs = {}) => ({ succeeded: { outputs } });
const bad = { failed: { failure: {} } };

test("leases of one slot run one after the other, those of others beside them", () => {
  const { leases, running, said, assign } = scene();
  assign("a");
  assign("b");
  assign("c", { slot: 2 });
  assign("a");
  assert.deepEqual([...running.keys()], ["a", "c"]);
  running.get("a").end([good()]);
  assert.deepEqual([...running.keys()], ["a", "c", "b"]);
  assert.deepEqual(said, ["1 a/0 succeeded"]);
  assert.deepEqual(leases.held(), ["b", "c", "a"]);
  leases.acknowledge(1);
  assert.deepEqual(leases.held(), ["b", "c"]);
  assert.equal(leases.received, 4);
});

test("a lease gets the outputs of the one it follows", () => {
  const { running, assign } = scene();
  assign("a");
  assign("b", { after: "a" });
  running.get("a").end([good({ out: 1 })]);
  assert.deepEqual(running.get("b").upstream, { out: 1 });
});

test("a chain is given back when its first fails, or is not held", () => {
  const { running, said, assign } = scene();
  assign("a");
  assign("b", { after: "a" });
  assign("c", { after: "b" });
  running.get("a").end([bad]);
  assert.deepEqual(said, ["1 a/0 failed", "2 b/0 returned", "3 c/0 returned"]);
  assign("d", { after: "a" });
  assert.equal(said.at(-1), "4 d/0 returned");
  assert.deepEqual([...running.keys()], ["a"]);
});

test("none of several that follow a failed one starts, and what comes after them does", () => {
  const { running, said, assign } = scene();
  assign("a");
  assign("b", { after: "a" });
  assign("c", { after: "a" });
  assign("d");
  running.get("a").end([bad]);
  assert.deepEqual(said, ["1 a/0 failed", "2 b/0 returned", "3 c/0 returned"]);
  assert.deepEqual([...running.keys()], ["a", "d"]);
});

test("only what has not started is revoked; what has started is stopped", () => {
  const { leases, running, said, stopped, assign } = scene();
  assign("a");
  assign("b");
  assign("c", { size: 2 });
  for (const id of ["a", "b", "nobody"]) leases.revoke(id);
  assert.deepEqual(said, ["1 b/0 returned"]);
  for (const id of ["a", "c", "nobody"]) leases.stop(id);
  assert.deepEqual(stopped, ["a FAILURE_KIND_CANCELLED"]);
  assert.deepEqual(said.slice(1), ["2 c/0 failed", "3 c/1 failed"]);
  running.get("a").end([bad]);
  assert.deepEqual(said.slice(3), ["4 a/0 failed"]);
});

test("a session that goes on sends again what was not acknowledged, and drops what the server forgot", () => {
  const { leases, running, said, stopped, assign } = scene();
  assign("a");
  assign("b");
  assign("c", { slot: 2 });
  running.get("c").end([good()]);
  const again = leases.welcome({ session_id: "s", resumed: true, drop_lease_ids: ["a", "nobody"] });
  assert.deepEqual(again.map((report) => report.sequence), [1]);
  assert.deepEqual([...running.keys()], ["a", "c", "b"]);
  assert.deepEqual(stopped, ["a FAILURE_KIND_CANCELLED"]);
  running.get("a").end([good()]);
  assert.deepEqual(said, ["1 c/0 succeeded"]);
});

test("a new session forgets everything and counts from one", () => {
  const { leases, running, said, assign } = scene();
  assign("a");
  assign("b");
  assign("c", { slot: 2 });
  running.get("c").end([good()]);
  assert.deepEqual(leases.welcome({ session_id: "t", resumed: false, drop_lease_ids: ["a"] }), []);
  assert.deepEqual([leases.held(), leases.received, leases.sessionId], [[], 0, "t"]);
  running.get("a").end([good()]);
  assert.equal(running.has("b"), false);
  assign("e");
  running.get("e").end([good()]);
  assert.deepEqual(said, ["1 c/0 succeeded", "1 e/0 succeeded"]);
});

test("what is not acknowledged for two heartbeats is sent again", () => {
  const { leases, running, assign } = scene();
  assign("a");
  running.get("a").end([good()]);
  const late = () => leases.overdue().map((report) => report.sequence);
  assert.deepEqual([late(), late(), late()], [[], [], [1]]);
  leases.acknowledge(1);
  assert.deepEqual(late(), []);
});
