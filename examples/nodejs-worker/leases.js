// What the worker holds and what it has to say. No network and no clock, so that it can be tested by calling it.
//
// The rule: whatever comes twice, late, or in another order than it was sent, a lease that is held is run once and
// ends in one last word, and one that is not held is never run.

const CANCELLED = "FAILURE_KIND_CANCELLED";

/** The leases of one worker, by slot, and the reports the server has not acknowledged. */
export class Leases {
  sessionId = "";
  /** The number of the last assignment received in this session. */
  received = 0;

  #run;
  #say;
  #held = new Map(); // lease id -> { assignment, upstream, stop }; `stop` once it has started
  #slots = new Map(); // slot -> leases in the order they came; the first one runs
  #outbox = []; // reports
  #lastSequence = 0;
  #marks = [0, 0];

  /**
   * `run(assignment, upstream, report, end)` starts an assignment and returns a function that stops it. It calls
   * `report(item, fact)` as it goes, and `end(facts)` once, later, with one fact for each attempt. `upstream` are the
   * outputs of the lease it follows. `say(report)` sends a report, if there is a stream.
   */
  constructor(run, say) {
    this.#run = run;
    this.#say = say;
  }

  /** Take the answer to `Hello`; return the reports to send again. */
  welcome({ session_id: sessionId, resumed, drop_lease_ids: dropped = [] }) {
    if (resumed) {
      for (const id of dropped) this.#drop(id);
      return [...this.#outbox];
    }
    const forgotten = [...this.#held.values()];
    this.#held.clear();
    this.#slots.clear();
    this.#outbox = [];
    this.#lastSequence = 0;
    this.#marks = [0, 0];
    this.received = 0;
    this.sessionId = sessionId;
    for (const lease of forgotten) lease.stop?.(CANCELLED, "the server forgot the lease");
    return [];
  }

  /** All leases, started or not, and those with reports the server may not have. */
  held() {
    return [...new Set([...this.#held.keys(), ...this.#outbox.map((report) => report.lease_id)])];
  }

  assign(assignment) {
    const { lease_id: id, slot, after_lease_id: after, sequence } = assignment;
    this.received = Math.max(this.received, sequence);
    if (this.#held.has(id)) return;
    if (after && !this.#held.has(after)) {
      this.#report(id, 0, { returned: {} });
      return;
    }
    const lease = { assignment, upstream: null, stop: null };
    this.#held.set(id, lease);
    const queue = this.#slots.get(slot) ?? [];
    this.#slots.set(slot, queue);
    if (queue.push(lease) === 1) this.#start(lease);
  }

  /** Give a lease back unless it has started. */
  revoke(id) {
    const lease = this.#held.get(id);
    if (!lease || lease.stop) return;
    this.#report(id, 0, { returned: {} });
    this.#end(lease, null);
  }

  /** End a lease, running or not. */
  stop(id) {
    const lease = this.#held.get(id);
    if (lease?.stop) lease.stop(CANCELLED, "the attempt was cancelled");
    else if (lease) {
      const failure = { kind: CANCELLED, message: "cancelled before it started" };
      lease.assignment.attempts.forEach((_, item) => this.#report(id, item, { failed: { failure } }));
      this.#end(lease, null);
    }
  }

  acknowledge(sequence) {
    this.#outbox = this.#outbox.filter((report) => report.sequence > sequence);
  }

  /** The reports that were there when this was called before last and are still not acknowledged. */
  overdue() {
    const late = this.#outbox.filter((report) => report.sequence <= this.#marks[0]);
    this.#marks = [this.#marks[1], this.#lastSequence];
    return late;
  }

  #start(lease) {
    const id = lease.assignment.lease_id;
    const isHeld = () => this.#held.get(id) === lease;
    const report = (item, fact) => isHeld() && this.#report(id, item, fact);
    const end = (facts) => {
      if (!isHeld()) return;
      facts.forEach((fact, item) => this.#report(id, item, fact));
      this.#end(lease, facts[0].succeeded?.outputs ?? null);
    };
    lease.stop = this.#run(lease.assignment, lease.upstream ?? {}, report, end);
  }

  /** Forget a lease that is over; feed what follows it, or give it back; start what is next in its slot. */
  #end(lease, outputs) {
    const { lease_id: id, slot } = lease.assignment;
    this.#held.delete(id);
    // It keeps its place until all that follow it are gone: none of them may start.
    for (const other of [...this.#held.values()]) {
      if (other.assignment.after_lease_id !== id) continue;
      if (outputs) other.upstream = outputs;
      else this.revoke(other.assignment.lease_id);
    }
    const queue = this.#slots.get(slot);
    const wasFirst = queue[0] === lease;
    queue.splice(queue.indexOf(lease), 1);
    if (!queue.length) this.#slots.delete(slot);
    else if (wasFirst) this.#start(queue[0]);
  }

  #drop(id) {
    const lease = this.#held.get(id);
    if (!lease) return;
    this.#end(lease, null);
    lease.stop?.(CANCELLED, "the server forgot the lease");
  }

  #report(leaseId, item, fact) {
    const report = { sequence: ++this.#lastSequence, lease_id: leaseId, item, time: now(), ...fact };
    this.#outbox.push(report);
    this.#say(report);
  }
}

/** The time on this worker's clock. */
export const now = () => {
  const ms = Date.now();
  return { seconds: Math.floor(ms / 1000), nanos: (ms % 1000) * 1e6 };
};
