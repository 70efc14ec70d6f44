// The functions this worker has, by the names tasks call them by. Each takes its inputs as one object, and a context:
// `signal` tells when to stop, `log` writes to the attempt's output. A batched task gives it a list and wants a list.

import { setTimeout as sleep } from "node:timers/promises";

export default {
  /** Count words. */
  "js/word_count": async ({ text }) => {
    const counts = {};
    for (const word of text.toLowerCase().match(/\p{L}+/gu) ?? []) counts[word] = (counts[word] ?? 0) + 1;
    return counts;
  },

  /** Wait, and return for how long. */
  "js/sleep": async ({ seconds }, { signal, log }) => {
    log(`sleeping for ${seconds} s`);
    await sleep(seconds * 1000, undefined, { signal });
    return seconds;
  },

  /** Return a number's square root; a negative one is an error. */
  "js/square_root": async ({ x }) => {
    if (x < 0) throw new RangeError(`${x} has no square root`);
    return Math.sqrt(x);
  },
};
