// Reads the spec inside an exported model.onnx, by the rules of inference/spec.py: what one reader
// refuses, the others refuse, too. A new key that the page relies on is a line in the tables of
// rules.
"use strict";

const SCHEMA = 1; // the newest spec that this page understands

// Of the self-test, in files that do not say: the largest difference of an output, and of `known`.
const FLOAT_TOLERANCE = 1e-4;
const INT8_TOLERANCE = 2e-2; // processors round int8 products differently
const KNOWN_TOLERANCE = 5e-3;

// Limits that no file of step2_export.py reaches.
const MAX_CHARACTERS = 32 << 20; // of the spec's text
const MAX_DEPTH = 16; // of lists and objects inside each other
const MAX_NAME = 256; // characters of a class name
const MAX_GOLDEN = 64; // samples
const MAX_NETWORK_SIDE = 4096; // pixels that the network sees
const MAX_BATCH = 1024;
const MAX_PROMISES = 1024;
const MAX_FIXED_VALUES = 2 ** 28; // of the input of a file of fixed size
const MAX_TOLERANCE = 5e-2; // of the self-test: more would pass anything

// Keys that older files lack.
const DEFAULTS = {
  fit: null,
  white: 65535,
  ground: null,
  known: null,
  reject: null,
  min_probability: null,
  promises: null,
  fixed: null,
  golden: [],
  self_test_tolerance: null,
};

// A failure that the user can correct: the text is the whole message.
class Problem extends Error {}

// JSON that JavaScript reads and other readers do not, or that no honest file contains.
class Refused extends Error {}

// ------------------------------------------------------------------------------------ protobuf

// The [field number, bytes or null] of a message; only length-delimited fields have bytes here.
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; at < bytes.length && scale < 2 ** 70; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new RangeError("it ends early");
  };

  while (at < bytes.length) {
    const tag = varint();
    const wire = tag % 8;
    if (![0, 1, 2, 5].includes(wire)) throw new RangeError("it is not a protobuf message");

    if (wire === 0) varint();
    const length = { 0: 0, 1: 8, 5: 4 }[wire] ?? varint();
    if (at + length > bytes.length) throw new RangeError("it ends early");

    yield [Math.floor(tag / 8), wire === 2 ? bytes.subarray(at, at + length) : null];
    at += length;
  }
}

// ModelProto.metadata_props (field 14, entries of key 1 and value 2) as a Map of bytes: the runtime
// hides it.
function readMetadata(bytes) {
  const metadata = new Map();
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14 || !entry) continue;

    const pair = new Map(fields(entry));
    const key = new TextDecoder().decode(pair.get(1) ?? new Uint8Array());
    metadata.set(key, pair.get(2) ?? new Uint8Array());
  }
  return metadata;
}

// ---------------------------------------------------------------------------------------- JSON

// Lists and objects -> keys of their whole numbers that are written as fractions, such as 1.0:
// JavaScript does not tell them apart, other readers do.
const fractions = new WeakMap();

// For JSON.parse: looks at how each number is written.
function checkNumber(key, value, context) {
  if (typeof value !== "number") return value;

  const source = context?.source ?? String(value); // browsers older than 2025 do not say it
  const isFraction = /[.eE]/.test(source);
  if (isFraction && Number.isInteger(value)) {
    if (!fractions.has(this)) fractions.set(this, new Set());
    fractions.get(this).add(key);
  }
  if (!isFraction && !isExact(source)) throw new Refused("it contains a number that is too large");
  return value;
}

// Whether a whole number is at most 2 ** 53.
function isExact(source) {
  if (source.length > "-9007199254740992".length) return false;
  const number = BigInt(source);
  return -(2n ** 53n) <= number && number <= 2n ** 53n;
}

// Throws Refused for values that the readers in Python and C++ would not take.
function checkValues(spec) {
  const waiting = [[spec, 1]];
  while (waiting.length) {
    const [value, depth] = waiting.pop();
    if (depth > MAX_DEPTH) throw new Refused(`it is more than ${MAX_DEPTH} levels deep`);

    if (Array.isArray(value)) {
      for (const part of value) waiting.push([part, depth + 1]);
    } else if (value !== null && typeof value === "object") {
      for (const part of Object.entries(value).flat()) waiting.push([part, depth + 1]);
    } else if (typeof value === "number" && !Number.isFinite(value)) {
      throw new Refused("it contains a number that is too large");
    } else if (typeof value === "string" && /\p{Surrogate}/u.test(value)) {
      throw new Refused("it contains half of a surrogate pair");
    }
  }
}

// The object that JSON text describes. Throws Refused.
function readObject(text) {
  if (text.length > MAX_CHARACTERS) {
    throw new Refused(`it has more than ${MAX_CHARACTERS >> 20} MiB`);
  }

  let object;
  try {
    object = JSON.parse(text, checkNumber);
  } catch (error) {
    throw error instanceof Refused ? error : new Refused("it is not a JSON object");
  }
  if (object === null || typeof object !== "object" || Array.isArray(object)) {
    throw new Refused("it is not a JSON object");
  }
  checkValues(object);
  return object;
}

// --------------------------------------------------------------------------------------- rules

// Whether holder[key] is a whole number from low to high; 1.0 is none.
function isWhole(holder, key, low, high = 2 ** 31) {
  const value = holder[key];
  if (!Number.isInteger(value) || fractions.get(holder)?.has(String(key))) return false;
  return low <= value && value <= high;
}

// Whether it is a number that is not negative.
const isAmount = (value) => typeof value === "number" && value >= 0;

const isShare = (value) => isAmount(value) && value <= 1;

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function isName(value) {
  if (typeof value !== "string") return false;
  const length = Array.from(value).length; // of characters; value.length counts some as two
  return length >= 1 && length <= MAX_NAME;
}

// Whether it is a list of `least` different names or more.
function areNames(value, least) {
  if (!Array.isArray(value) || value.length < least) return false;
  return value.every(isName) && new Set(value).size === value.length;
}

function isSize(value) {
  if (!Array.isArray(value) || value.length !== 2) return false;
  return isWhole(value, 0, 1, MAX_NETWORK_SIDE) && isWhole(value, 1, 1, MAX_NETWORK_SIDE);
}

function isKnown(value) {
  if (value === null) return true;
  if (!isObject(value)) return false;
  return !Object.hasOwn(value, "tolerance") || isAmount(value.tolerance);
}

function isFixed(value) {
  if (value === null) return true;
  if (!isObject(value) || !Object.hasOwn(value, "batch")) return false;

  const isBatch = value.batch === null || isWhole(value, "batch", 1, MAX_BATCH);
  return isBatch && ["uint8", "float32"].includes(value.input);
}

function isPromise(value) {
  if (!isObject(value) || !["accuracy", "recall"].includes(value.kind)) return false;
  if (value.kind === "recall" && !isName(value.name)) return false;
  return isShare(value.threshold) && isShare(value.share);
}

function arePromises(value) {
  if (value === null) return true;
  return Array.isArray(value) && value.length <= MAX_PROMISES && value.every(isPromise);
}

function areGolden(value) {
  return Array.isArray(value) && value.length <= MAX_GOLDEN && value.every(isObject);
}

// [key, test of the spec, what the key must be]
const RULES = [
  ["schema", (spec) => isWhole(spec, "schema", 1), "a whole number"],
  [
    "task",
    (spec) => ["classification", "regression"].includes(spec.task),
    "classification or regression",
  ],
  [
    "classes",
    (spec) => areNames(spec.classes, 1),
    `a list of different names of 1 to ${MAX_NAME} characters`,
  ],
  ["channels", (spec) => isWhole(spec, "channels", 1), "a whole number"],
  ["white", (spec) => isWhole(spec, "white", 1, 65535), "a whole number from 1 to 65535"],
  [
    "ground",
    (spec) => [null, "white", "black"].includes(spec.ground),
    "white, black or null",
  ],
  ["known", (spec) => isKnown(spec.known), "null, or an object whose tolerance is a number"],
  [
    "reject",
    (spec) => spec.reject === null || isShare(spec.reject),
    "a number from 0 to 1, or null",
  ],
  [
    "min_probability",
    (spec) => spec.min_probability === null || isShare(spec.min_probability),
    "a number from 0 to 1, or null",
  ],
  [
    "promises",
    (spec) => arePromises(spec.promises),
    `null, or a list of at most ${MAX_PROMISES} promises, each with a kind (accuracy or recall), ` +
      "a threshold and a share from 0 to 1 and, of recall, a name",
  ],
  [
    "fit",
    (spec) => [null, "stretch", "crop", "letterbox"].includes(spec.fit),
    "stretch, crop, letterbox or null",
  ],
  [
    "fixed",
    (spec) => isFixed(spec.fixed),
    `null, or a batch (1 to ${MAX_BATCH}, or null) and an input (uint8 or float32)`,
  ],
  ["golden", (spec) => areGolden(spec.golden), `a list of at most ${MAX_GOLDEN} samples`],
  [
    "self_test_tolerance",
    (spec) => spec.self_test_tolerance === null || isAmount(spec.self_test_tolerance),
    "a number from 0, or null",
  ],
];

const IMAGE_RULES = [
  ["classes", (spec) => areNames(spec.classes, 2), "two different names or more"],
  ["channels", (spec) => [1, 3].includes(spec.channels), "1 or 3"],
  [
    "image_size",
    (spec) => isSize(spec.image_size),
    `[height, width], each from 1 to ${MAX_NETWORK_SIDE}`,
  ],
];

// ------------------------------------------------------------------------------------- reading

// Throws Refused for the first key that is missing or breaks its rule.
function validate(spec, rules) {
  for (const [key, isValid, wanted] of rules) {
    if (!Object.hasOwn(spec, key)) throw new Refused(`${key} is missing`);
    if (!isValid(spec)) throw new Refused(`${key} must be ${wanted}`);
  }
}

// Throws Refused if the only input size of a file would not fit into memory.
function checkFixedSize({ fixed, image_size: size, channels }) {
  if (fixed === null) return;
  const values = (fixed.batch ?? 1) * size[0] * size[1] * channels;
  if (values > MAX_FIXED_VALUES) {
    throw new Refused(`its fixed input has ${values.toLocaleString("en")} values`);
  }
}

// Throws Refused if a promise is about a class that the file does not have.
function checkPromises({ promises, classes }) {
  for (const { kind, name } of promises ?? []) {
    if (kind === "recall" && !classes.includes(name)) {
      throw new Refused("a promise names a class that the file does not have");
    }
  }
}

// The spec (an object) in an ONNX file's bytes; source: what to call the file. Throws Problem.
function readSpec(bytes, source) {
  if (!bytes.length) throw new Problem(`${source} is empty.`);

  let content;
  try {
    content = readMetadata(bytes).get("spec");
  } catch (error) {
    throw new Problem(`${source} is not an ONNX file or is damaged: ${error.message}.`);
  }
  if (!content?.length) {
    throw new Problem(`${source} carries no spec: it was not made by step2_export.py.`);
  }

  return parseBytes(content, source);
}

// A spec's JSON text in UTF-8 -> the spec. Throws Problem.
function parseBytes(content, source) {
  // A byte order mark is kept, and refused like other text that is no JSON.
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  try {
    return parseSpec(decoder.decode(content), source);
  } catch (error) {
    if (error instanceof Problem) throw error;
    const reason = error instanceof Refused ? error.message : "it is not a JSON object";
    throw new Problem(`${source} has a malformed spec: ${reason}.`);
  }
}

// A spec's JSON text -> the spec. Throws Refused, naming the first key that is wrong; Problem for a
// spec that needs another program.
function parseSpec(text, source) {
  const read = readObject(text);
  const spec = { ...DEFAULTS, ...read };
  if (fractions.has(read)) fractions.set(spec, fractions.get(read));

  if (isWhole(spec, "schema", SCHEMA + 1)) {
    const newest = `has a spec of schema ${spec.schema}, this page knows schemas up to ${SCHEMA}`;
    const remedy = "Use the page of the Threestep version that exported it.";
    throw new Problem(`${source} ${newest}. ${remedy}`);
  }

  validate(spec, RULES);
  if (spec.task === "classification") {
    validate(spec, IMAGE_RULES);
    checkFixedSize(spec);
    checkPromises(spec);
  }
  if (spec.reject !== null && spec.known === null) {
    throw new Refused("reject needs known, which the file does not have");
  }
  if (spec.fixed !== null) {
    const remedy = "Use model.onnx of the same export, which resizes.";
    throw new Problem(`${source} takes resized images only. ${remedy}`);
  }

  if (spec.known !== null) spec.known = { tolerance: KNOWN_TOLERANCE, ...spec.known };
  return spec;
}

// The largest differences that the self-test accepts, of an output and of `known`: by the rule of
// step3_infer.py and of the C++ program.
function tolerancesOf(spec) {
  const usual = "quantization" in spec ? INT8_TOLERANCE : FLOAT_TOLERANCE;
  const output = Math.min(spec.self_test_tolerance ?? usual, MAX_TOLERANCE);
  const known = spec.known ? Math.min(spec.known.tolerance, MAX_TOLERANCE) : null;
  return { output, known };
}
