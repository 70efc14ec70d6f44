// How this client reaches a server: credentials, and options of its connection.

import { readFileSync } from "node:fs";

import grpc from "@grpc/grpc-js";

const isNear = (target) => /^(localhost|127(\.\d+){3}|\[::1\]):\d+$/.test(target);

/**
 * The arguments of a service's constructor: target, credentials, options.
 *
 * `LATTICE_TLS_CA` names a file with the certificate to know the server by, `LATTICE_TLS_CERT` and `LATTICE_TLS_KEY` the
 * caller's own, and `LATTICE_TOKEN` is the token to show. Without TLS or a token the server must be on this machine.
 */
export function dialling(target, environment = process.env) {
  const { LATTICE_TLS_CA: ca, LATTICE_TLS_CERT: cert, LATTICE_TLS_KEY: key, LATTICE_TOKEN: token } = environment;
  if (!isNear(target) && !(ca && token)) {
    throw new Error(`${target} is beyond this machine: set LATTICE_TLS_CA and LATTICE_TOKEN`);
  }
  const bytes = (file) => (file ? readFileSync(file) : null);
  const credentials = ca ? grpc.credentials.createSsl(bytes(ca), bytes(key), bytes(cert)) : grpc.credentials.createInsecure();
  const options = {
    // Results bring the outputs of all final tasks in one message.
    "grpc.max_receive_message_length": 256 * 1024 * 1024,
    // Tells when a server is gone that never said so.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.max_reconnect_backoff_ms": 2000,
    // Not by way of another machine, whatever proxy the environment names.
    "grpc.enable_http_proxy": isNear(target) ? 0 : 1,
    interceptors: token ? [bearer(token)] : [],
  };
  return [target, credentials, options];
}

/** Shows a token with each call. */
const bearer = (token) => (options, nextCall) =>
  new grpc.InterceptingCall(nextCall(options), {
    start(metadata, listener, next) {
      metadata.set("authorization", `Bearer ${token}`);
      next(metadata, listener);
    },
  });
