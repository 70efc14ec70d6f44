// Rooms, as `rooms.py` has them, for functions of the Node.js worker.

import { appendFileSync, existsSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

const WAIT_MS = 60_000;

async function enter({ room, name }, { signal, log }) {
  appendFileSync(`${room}/notes`, `+${name}\n`);
  log(`${name} is in the room`);
  const deadline = Date.now() + WAIT_MS;
  while (!existsSync(`${room}/open`)) {
    if (Date.now() > deadline) throw new Error(`${room} was not opened`);
    try {
      await sleep(10, undefined, { signal });
    } catch (error) {
      appendFileSync(`${room}/notes`, `!${name}\n`);
      throw error;
    }
  }
  appendFileSync(`${room}/notes`, `-${name}\n`);
  return name;
}

export default {
  "js/enter": enter,
  "js/stay": async (inputs, { log }) => enter(inputs, { log }), // never told to stop
  "js/sum": async ({ numbers, more = {} }) => [...numbers, ...Object.values(more)].reduce((a, b) => a + b, 0),
  "js/both": async ({ number }) => ({ half: number / 2, double: number * 2 }),
  "js/squares": async (items) => items.map(({ x }) => (x < 0 ? new RangeError(`${x} is below zero`) : x * x)),
  "js/range": async ({ size }) => Array.from({ length: size }, (_, index) => index),
  "js/repeat": async ({ text, times }) => text.repeat(times),
  "js/length": async ({ text }) => text.length,
  "js/fail": async ({ message }) => {
    throw new TypeError(message);
  },
};
