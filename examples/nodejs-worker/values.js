// How values travel: JSON as text, bytes as they are, and what is too long for a message as an artifact of this node.

import { randomUUID } from "node:crypto";

export const JSON_TYPE = "application/json";
export const BYTES_TYPE = "application/octet-stream";
const CHUNK_BYTES = 1 << 20;

/** A value, a binding or an output that cannot be read or written. */
export class PayloadError extends Error {}

/** Return the part of a JSON value at the end of a path: keys of objects, and positions in arrays. */
export function partOf(value, path) {
  for (const step of path) {
    const isThere =
      step.step === "key"
        ? value !== null && typeof value === "object" && !Array.isArray(value) && Object.hasOwn(value, step.key)
        : Array.isArray(value) && step.index >= -value.length && step.index < value.length;
    const name = step.step === "key" ? JSON.stringify(step.key) : step.index;
    if (!isThere) throw new PayloadError(`the output it is wired to has no part [${name}]`);
    value = step.step === "key" ? value[step.key] : value.at(step.index);
  }
  return value;
}

/** Large values made here, and the way to those made elsewhere; `read(id)` gets the bytes of one from the server. */
export class Values {
  inlineLimitBytes = 256 * 1024;
  #kept = new Map();
  #nodeId;
  #read;

  constructor(nodeId, read) {
    this.#nodeId = nodeId;
    this.#read = read;
  }

  /** Return the value of a binding; `upstream` are the outputs of the lease that the attempt's lease follows. */
  async bound(binding, upstream) {
    switch (binding.source) {
      case "list":
        return Promise.all(binding.list.items.map((item) => this.bound(item, upstream)));
      case "map": {
        const entries = Object.entries(binding.map.entries);
        return Object.fromEntries(await Promise.all(entries.map(async ([k, v]) => [k, await this.bound(v, upstream)])));
      }
      case "selection":
        return partOf(await this.bound(binding.selection.value, upstream), binding.selection.path);
      case "output":
        return partOf(await this.decoded(upstream[binding.output.output]), binding.output.path);
      default:
        return this.decoded(binding.payload);
    }
  }

  async decoded(payload) {
    const type = payload.media_type || JSON_TYPE;
    const isKnown = type === JSON_TYPE || type === BYTES_TYPE;
    if (!isKnown) throw new PayloadError(`a value is ${type}, which cannot be read here`);
    if (typeof payload.json === "string") return JSON.parse(payload.json);
    const bytes = payload.artifact ? await this.#bytes(payload.artifact.artifact_id) : payload.data;
    return type === JSON_TYPE ? JSON.parse(bytes.toString()) : bytes;
  }

  encoded(value) {
    if (value instanceof Uint8Array) return this.#inline(BYTES_TYPE, Buffer.from(value), (data) => ({ data }));
    let text;
    try {
      text = JSON.stringify(value ?? null);
    } catch (error) {
      throw new PayloadError(`a value is not JSON: ${error.message}`);
    }
    if (text === undefined) throw new PayloadError(`a ${typeof value} is not JSON`);
    return this.#inline(JSON_TYPE, Buffer.from(text), () => ({ json: text }));
  }

  /** Write the bytes of an artifact, as the server asked for them, into the call of `UploadArtifact`. */
  upload({ transfer_id: transferId, artifact_id: artifactId, offset }, call) {
    const bytes = this.#kept.get(artifactId);
    call.write(bytes ? { transfer_id: transferId, size_bytes: Math.max(0, bytes.length - offset) } : { transfer_id: transferId });
    if (!bytes) call.write({ not_found: true });
    for (let at = offset; bytes && at < bytes.length; at += CHUNK_BYTES) {
      call.write({ data: bytes.subarray(at, at + CHUNK_BYTES) });
    }
    call.end();
  }

  drop(artifactIds) {
    for (const id of artifactIds) this.#kept.delete(id);
  }

  /** Drop all: the server that knew of them is gone. */
  clear() {
    this.#kept.clear();
  }

  #inline(type, bytes, content) {
    if (bytes.length <= this.inlineLimitBytes) return { media_type: type, ...content(bytes) };
    const id = `${this.#nodeId}-${randomUUID()}`;
    this.#kept.set(id, bytes);
    return { media_type: type, artifact: { artifact_id: id, size_bytes: bytes.length, node_id: this.#nodeId } };
  }

  async #bytes(artifactId) {
    const kept = this.#kept.get(artifactId);
    if (kept) return kept;
    try {
      return await this.#read(artifactId);
    } catch (error) {
      throw new PayloadError(`a large value cannot be had: ${error.message}`);
    }
  }
}
