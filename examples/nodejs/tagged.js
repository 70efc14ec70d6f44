// Tagged JSON, the encoding of values of sandboxed tasks that JSON alone lacks: ../../docs/contract.md lists the tags.
//
// What JavaScript has a value for becomes that: Set, Map, Uint8Array, BigInt, NaN, Date. Other values stay their tag.

const WORDS = { nan: NaN, inf: Infinity, "-inf": -Infinity };
const MAX_LEVELS = 101;

/** The value in tagged JSON; throws an Error when it is malformed. */
export function untagged(text) {
  return read(JSON.parse(text), 0, []);
}

function read(node, level, shared) {
  if (level > MAX_LEVELS) throw new Error("tagged JSON is nested too deep");
  const nested = (item) => read(item, level + 1, shared);
  if (Array.isArray(node)) return node.map(nested);
  if (node === null || typeof node !== "object") return node;
  const keys = Object.keys(node);
  if (!keys.some((key) => key.startsWith("$"))) {
    return Object.fromEntries(keys.map((key) => [key, nested(node[key])]));
  }
  if (keys.length !== 1) throw new Error(`a tag stands alone in its object: ${keys}`);
  const [tag] = keys;
  const body = node[tag];
  switch (tag) {
    case "$shared": {
      const value = read(body[1], level, shared);
      shared[body[0]] = value;
      return value;
    }
    case "$same":
      if (!(body in shared)) throw new Error(`no value before has the number ${body}`);
      return shared[body];
    case "$tuple":
      return body.map(nested);
    case "$set":
    case "$frozenset":
      return new Set(body.map(nested));
    case "$dict":
      return new Map(body.map(([key, value]) => [nested(key), nested(value)]));
    case "$bytes":
    case "$bytearray":
      return new Uint8Array(Buffer.from(body, "base64"));
    case "$int":
      return body.startsWith("-") ? -BigInt(body.slice(1)) : BigInt(body);
    case "$float":
      return WORDS[body];
    case "$str":
      return String.fromCodePoint(...body);
    case "$datetime":
      return typeof body === "string" ? new Date(body) : node;
    case "$uuid":
    case "$date":
      return body;
    case "$time":
    case "$timedelta":
    case "$decimal":
    case "$complex":
    case "$array":
    case "$scalar":
      return node;
    default:
      throw new Error(`${tag} is no tag`);
  }
}
