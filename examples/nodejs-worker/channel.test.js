// What is dialled without TLS or without a token: this machine, and nothing beyond it.

import assert from "node:assert/strict";
import test from "node:test";

import { open } from "./channel.js";

test("this machine is dialled as it is", () => {
  for (const target of ["localhost:1", "127.0.0.1:1", "127.1.2.3:1", "[::1]:1"]) open(target, {}).close();
});

test("beyond this machine a token and a certificate are needed", () => {
  for (const target of ["10.1.2.3:1", "example.test:1", "127.0.0.1.example.test:1"]) {
    assert.throws(() => open(target, {}), /LATTICE_TOKEN/);
    assert.throws(() => open(target, { LATTICE_TLS_CA: "ca.pem" }), /LATTICE_TOKEN/);
    assert.throws(() => open(target, { LATTICE_TOKEN: "secret" }), /LATTICE_TLS_CA/);
  }
});
