// How this worker reaches the server: which credentials, and the services on one connection.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTO = fileURLToPath(new URL("../../proto", import.meta.url));
const FILES = ["lattice/v1/worker.proto", "lattice/v1/artifact.proto"];
const LOADING = { includeDirs: [PROTO], keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true };
const { lattice } = grpc.loadPackageDefinition(loadSync(FILES, LOADING));

const OPTIONS = {
  "grpc.max_receive_message_length": 256 * 1024 * 1024,
  // A connection that fell silent must not be taken again: each channel dials for itself.
  "grpc.use_local_subchannel_pool": 1,
};

export const isLoopback = (target) => /^(localhost|127(\.\d+){3}|\[::1\]):\d+$/.test(target);

/** TLS when there is a certificate to know the server by; plain, or without a token, is for this machine only. */
function credentialsFor(target, { LATTICE_TLS_CA: ca, LATTICE_TLS_CERT: cert, LATTICE_TLS_KEY: key, LATTICE_TOKEN: token }) {
  const bytes = (file) => (file ? readFileSync(file) : null);
  if (!token && !isLoopback(target)) {
    throw new Error(`${target} is beyond this machine: set LATTICE_TOKEN to the token that its server asks for`);
  }
  if (ca) return grpc.credentials.createSsl(bytes(ca), bytes(key), bytes(cert));
  if (isLoopback(target)) return grpc.credentials.createInsecure();
  throw new Error(`${target} is beyond this machine: set LATTICE_TLS_CA to the certificate it is known by`);
}

/** Open a channel; `metadata()` tells the server who calls. */
export function open(target, environment = process.env) {
  const credentials = credentialsFor(target, environment);
  // What goes to this machine must not take a way over another one, whatever proxy the environment names.
  const options = { ...OPTIONS, "grpc.enable_http_proxy": isLoopback(target) ? 0 : 1 };
  const workers = new lattice.v1.WorkerService(target, credentials, options);
  const artifacts = new lattice.v1.ArtifactService(target, credentials, { channelOverride: workers.getChannel() });
  const metadata = () => {
    const found = new grpc.Metadata();
    if (environment.LATTICE_TOKEN) found.set("authorization", `Bearer ${environment.LATTICE_TOKEN}`);
    return found;
  };
  return { workers, artifacts, metadata, close: () => workers.close() };
}
