// An exported model.onnx in a browser: this file reads its spec, decodes images as step3_infer.py does,
// predicts and runs the self-test. It does not touch the page: page.js does, with the globals of this file.
"use strict";

const SCHEMA = 1; // the newest spec that this page understands
const RUNTIME = ["ort/ort.wasm.bundle.min.js", "ort/ort-wasm-simd-threaded.wasm"];
const TILE = 512; // pixels read from a canvas at once: phones limit the size of a canvas, not of an image
const WHITE = 65535; // the level of 16-bit greys that becomes 255, for a spec that does not say it
const MEGAPIXELS = 100; // of one image
const FLOAT_TOLERANCE = 1e-4; // of the self-test, for a file whose spec has no self_test_tolerance
const INT8_TOLERANCE = 2e-2; // processors round int8 products differently

let ort = null; // the runtime's module
let model = null; // {session, spec, source, bytes, limits: the file's own thresholds, which may be changed}

// A number with its noun in the singular or plural: 1 sample, 2 samples.
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// A failure that the user can correct: the text is the whole message.
class Problem extends Error {}

const isShare = (value) => typeof value === "number" && value >= 0 && value <= 1;

// A number with six decimals, as step3_infer.py writes and compares it.
const rounded = (value) => Math.round(value * 1e6) / 1e6;

// ----------------------------------------------------------------------------------------------------- model

// The [field number, bytes or null] of a protobuf message; only length-delimited fields have bytes here.
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

// ModelProto.metadata_props (field 14, entries of key 1 and value 2) as a Map: the runtime hides it.
function readMetadata(bytes) {
  const metadata = new Map();
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14 || !entry) continue;
    const pair = new Map(fields(entry));
    const text = (number) => new TextDecoder().decode(pair.get(number) ?? new Uint8Array());
    metadata.set(text(1), text(2));
  }
  return metadata;
}

// The spec (an object) in an ONNX file's bytes. Throws Problem where it is missing, malformed or too new.
function readSpec(bytes, source) {
  let text, spec;
  if (!bytes.length) throw new Problem(`${source} is empty.`);
  try {
    text = readMetadata(bytes).get("spec");
  } catch (error) {
    throw new Problem(`${source} is not an ONNX file or is damaged: ${error.message}.`);
  }
  if (!text) throw new Problem(`${source} carries no spec: it was not made by step2_export.py.`);
  try {
    spec = JSON.parse(text);
  } catch (error) {
    throw new Problem(`${source} has a malformed spec: ${error.message}.`);
  }
  if (spec?.schema > SCHEMA) {
    const newest = `has a spec of schema ${spec.schema}, and this page understands schemas up to ${SCHEMA}`;
    throw new Problem(`${source} ${newest}. Use the page of the Threestep version that exported it.`);
  }
  const regression = spec?.task === "regression";
  const names = Array.isArray(spec?.classes) ? spec.classes : [];
  const named = names.length > (regression ? 0 : 1) && names.every((name) => typeof name === "string");
  const shaped = regression ? spec.channels > 0 : [1, 3].includes(spec?.channels);
  const white = spec?.white ?? WHITE, levelled = Number.isInteger(white) && white > 0 && white <= WHITE;
  if (!(regression || spec?.task === "classification") || !named || !shaped || !levelled) {
    throw new Problem(`${source} has a malformed spec: its task, classes, channels or white are invalid.`);
  }
  if (spec.fixed) {
    throw new Problem(`${source} takes resized images only. Use model.onnx of the same export, which resizes.`);
  }
  const { known = null, reject = null, min_probability: least = null } = spec;
  const bounded = Number.isFinite(known?.tolerance) && known.tolerance >= 0;
  const tolerable = known === null || (bounded && !regression);
  const limited = (reject === null || (known && isShare(reject))) && (least === null || isShare(least));
  if (!tolerable || !limited) {
    throw new Problem(`${source} has a malformed spec: its known, reject or min_probability are invalid.`);
  }
  return { ...spec, white, known, reject, min_probability: least };
}

// {bytes, source} of the first address with a model. Throws Problem.
async function fetchModel(addresses) {
  for (const address of addresses) {
    const response = await fetch(address, { cache: "no-cache" }).catch(() => null);
    // Some servers send their start page for a missing file.
    if (response?.ok && !response.headers.get("content-type")?.startsWith("text/html")) {
      return { bytes: new Uint8Array(await response.arrayBuffer()), source: address };
    }
  }
  throw new Problem(`There is no model at ${addresses.join(" or ")}. Put one there, or choose a file here.`);
}

function runtimeProblem(path) {
  const remedy = "In the page's folder, run: sh get-ort.sh";
  return new Problem(`The runtime is missing: ${path} cannot be loaded. ${remedy}`);
}

async function loadRuntime() {
  const [script, binary] = RUNTIME.map((path) => new URL(path, document.baseURI).href);
  const runtime = await import(script).catch(() => {
    throw runtimeProblem(RUNTIME[0]);
  });
  runtime.env.logLevel = "error";
  runtime.env.wasm.wasmPaths = { wasm: binary };
  // Threads need shared memory, which browsers grant only to cross-origin isolated pages.
  const cores = navigator.hardwareConcurrency || 1;
  runtime.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, cores) : 1;
  return runtime;
}

// Make a file's bytes the model of this page. Throws Problem.
async function useModel({ bytes, source }) {
  const spec = readSpec(bytes, source);
  let session;
  try {
    ort ??= await loadRuntime();
    session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  } catch (error) {
    if (error instanceof Problem) throw error;
    const response = await fetch(RUNTIME[1], { method: "HEAD" }).catch(() => null);
    if (!response?.ok) throw runtimeProblem(RUNTIME[1]);
    throw new Problem(`This browser cannot run ${source}: ${error.message}`);
  }
  await model?.session.release();
  const limits = { reject: spec.reject, probability: spec.min_probability };
  model = { session, spec, source, bytes: bytes.length, limits };
}

// A tensor of batch 1 -> [outputs, one for each class; known, the share of images like those trained on that
// look less familiar, or null if the file does not say it]. Throws Problem.
async function run(tensor) {
  const { session, spec } = model;
  let results;
  try {
    results = await session.run({ [session.inputNames[0]]: tensor });
  } catch (error) {
    throw new Problem(`the model cannot run on ${tensor.dims.join("x")} input: ${error.message ?? error}`);
  }
  const [outputs, known] = session.outputNames.map((name) => results[name].data);
  if (outputs.length !== spec.classes.length) {
    const found = `${spec.classes.length} classes, ${outputs.length} outputs`;
    throw new Problem(`the spec does not match the model: ${found}`);
  }
  if (spec.known && known?.length !== 1) {
    throw new Problem("the spec does not match the model: it does not fit the output known");
  }
  return [outputs, spec.known ? known[0] : null];
}

// What to answer instead of the best guess, by the rule of step3_infer.py: "unknown", "unsure", or null.
function verdict(probabilities, known, { reject, probability }) {
  if (reject !== null && known !== null && rounded(known) < rounded(1 - reject)) return "unknown";
  return probability !== null && rounded(Math.max(...probabilities)) < probability ? "unsure" : null;
}

// ---------------------------------------------------------------------------------------------------- images

// An image file -> ImageBitmap, EXIF orientation applied, colours as stored. Throws Problem.
async function decode(file) {
  if (file.size === 0) throw new Problem("empty file");
  const asStored = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", ...asStored })
    .catch((error) => (error instanceof TypeError ? createImageBitmap(file) : null)) // an older browser
    .catch(() => null);
  if (!bitmap) throw new Problem("not an image that this browser can decode");
  const size = (bitmap.width * bitmap.height) / 1e6;
  if (size <= MEGAPIXELS) return bitmap;
  throw new Problem(`the image has ${size.toFixed()} megapixels; this page accepts up to ${MEGAPIXELS}`);
}

// Copy the RGBA bytes from..end to `pixels` at `to` without alpha; 1 channel is Pillow's convert("L").
// Returns whether all of them are opaque.
function pack(rgba, from, end, pixels, to, channels) {
  let alpha = 255;
  for (let at = from; at < end; at += 4) {
    const red = rgba[at], green = rgba[at + 1], blue = rgba[at + 2];
    alpha &= rgba[at + 3];
    if (channels === 1) {
      pixels[to++] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16;
    } else {
      pixels[to++] = red;
      pixels[to++] = green;
      pixels[to++] = blue;
    }
  }
  return alpha === 255;
}

// ImageBitmap -> {pixels: uint8 [height x width x channels], exact: whether all colours are as stored}.
function readPixels(bitmap, channels) {
  const { width, height } = bitmap;
  const pixels = new Uint8Array(width * height * channels);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.min(width, TILE), Math.min(height, TILE)];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";
  let opaque = true;
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const w = Math.min(TILE, width - left), h = Math.min(TILE, height - top);
      context.drawImage(bitmap, left, top, w, h, 0, 0, w, h);
      const { data } = context.getImageData(0, 0, w, h);
      for (let row = 0; row < h; row++) {
        const to = ((top + row) * width + left) * channels;
        opaque = pack(data, row * w * 4, (row + 1) * w * 4, pixels, to, channels) && opaque;
      }
    }
  }
  const rgba = opaque ? null : readUnderAlpha(bitmap);
  if (rgba) pack(rgba, 0, rgba.length, pixels, 0, channels);
  return { pixels, exact: opaque || rgba !== null };
}

// ImageBitmap -> its RGBA bytes as stored, or null if this device cannot read them. A 2D canvas multiplies
// colours by alpha and so loses those of transparent pixels, which Pillow keeps, and so does a WebGL texture.
function readUnderAlpha(bitmap) {
  const { width, height } = bitmap;
  const gl = document.createElement("canvas").getContext("webgl");
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  const rgba = new Uint8Array(width * height * 4), texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // a browser keeps only a few
  return failed ? null : rgba;
}

// Whether a file is a PNG of 16-bit greys, by its header: the only 16-bit greys that browsers decode.
async function hasWideGreys(file) {
  const header = new Uint8Array(await file.slice(0, 26).arrayBuffer());
  return header[1] === 0x50 && header[2] === 0x4e && header[24] === 16 && header[25] === 0;
}

// Stretch 8-bit pixels, which the browser made from 16 bits, as if `white` had become 255. Levels between the
// 8-bit ones are lost.
function stretch(pixels, white) {
  for (let at = 0; at < pixels.length; at++) {
    pixels[at] = Math.min(255, Math.round((pixels[at] * WHITE) / white));
  }
}

// An image file -> {bitmap (to be closed), probabilities, known, exact, stretched (whether 16-bit greys are
// approximate), decoding and network in milliseconds}.
// Throws Problem.
async function predict(file) {
  const start = performance.now(), { channels, white } = model.spec;
  const bitmap = await decode(file);
  try {
    const { pixels, exact } = readPixels(bitmap, channels);
    const stretched = white !== WHITE && (await hasWideGreys(file));
    if (stretched) stretch(pixels, white);
    const decoded = performance.now();
    const shape = [1, bitmap.height, bitmap.width, channels];
    const [probabilities, known] = await run(new ort.Tensor("uint8", pixels, shape));
    const decoding = decoded - start, network = performance.now() - decoded;
    return { bitmap, probabilities, known, exact, stretched, decoding, network };
  } catch (error) {
    bitmap.close();
    if (error instanceof Problem) throw error;
    throw new Problem(`the image is too large for this device: ${error.message}`);
  }
}

// For regression: features (numbers) -> the prediction. Throws Problem.
async function predictValues(values) {
  const count = model.spec.channels;
  if (values.length !== count || !values.every(Number.isFinite)) {
    throw new Problem(`This model takes ${counted(count, "number")}, separated by commas.`);
  }
  const [[prediction]] = await run(new ort.Tensor("float32", Float32Array.from(values), [1, count]));
  return Number(prediction.toPrecision(7)); // what float32 holds
}

// ------------------------------------------------------------------------------------------------- self-test

// The golden samples in the file: each an input, and the outputs computed for it on the training machine.
function goldenSamples() {
  return Array.isArray(model.spec.golden) ? model.spec.golden : [];
}

// The PNG of a golden sample as a file of this name.
function goldenFile(sample, name) {
  return new File([Uint8Array.from(atob(sample.image), (character) => character.charCodeAt(0))], name);
}

// The largest difference that the self-test accepts: the rule of step3_infer.py and of the C++ program.
function selfTestTolerance(spec) {
  return spec.self_test_tolerance ?? ("quantization" in spec ? INT8_TOLERANCE : FLOAT_TOLERANCE);
}

// Run the golden samples -> {count, difference (the largest of any output), tolerance, knownDifference and
// knownTolerance (the same of known, null without), passed}. Throws Problem.
async function selfTest() {
  const { known } = model.spec, tolerance = selfTestTolerance(model.spec);
  let count = 0, difference = 0, knownDifference = known ? 0 : null;
  for (const sample of goldenSamples()) {
    const differences = await sampleDifferences(sample);
    difference = Math.max(difference, differences[0]); // which keeps NaN
    if (known) knownDifference = Math.max(knownDifference, differences[1]);
    count += 1;
  }
  const knownTolerance = known ? known.tolerance : null;
  const passed = difference <= tolerance && (!known || knownDifference <= knownTolerance);
  return { count, difference, tolerance, knownDifference, knownTolerance, passed };
}

// One golden sample -> [the largest difference of its outputs from the expected ones, relative above 1; the
// difference of known, null without].
async function sampleDifferences(sample) {
  let outputs, expected, known = null;
  if (model.spec.task === "regression") {
    [outputs, expected] = [[await predictValues(sample.features)], sample.prediction];
  } else {
    const { bitmap, probabilities, ...result } = await predict(goldenFile(sample, "sample"));
    bitmap.close();
    [outputs, expected, known] = [Array.from(probabilities), sample.probabilities, result.known];
  }
  const matches = expected.length === outputs.length && (known === null || isShare(sample.known));
  if (!matches) throw new Problem("the golden samples do not match the model");
  const difference = (output, i) => Math.abs(output - expected[i]) / Math.max(1, Math.abs(expected[i]));
  return [Math.max(...outputs.map(difference)), known === null ? null : Math.abs(known - sample.known)];
}
