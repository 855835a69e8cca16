// An exported model.onnx in a browser: read its spec, decode images as step3_infer.py does, predict, self-test.
// Nothing here touches the page; page.js does, with the globals of this file.
"use strict";

const SCHEMA = 1; // the newest spec this page understands
const RUNTIME = ["ort/ort.wasm.bundle.min.js", "ort/ort-wasm-simd-threaded.wasm"];
const TILE = 512; // pixels read from a canvas at once; phones limit the size of a canvas, not that of an image
const MEGAPIXELS = 100; // of one image
const TOLERANCE = { float: 1e-3, int8: 5e-2 }; // of the self-test; int8 is rounded differently on every processor

let ort = null; // the runtime's module
let model = null; // {session, spec, source, bytes}

// A failure that its user can mend: the text is the whole message.
class Problem extends Error {}

// ------------------------------------------------------------------------------------------------------------ model

// The [field number, bytes or null] of a protobuf message; length-delimited fields alone have bytes here.
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
    if (![0, 1, 2, 5].includes(wire)) throw new RangeError("it is no protobuf");
    if (wire === 0) varint();
    const length = { 0: 0, 1: 8, 5: 4 }[wire] ?? varint();
    if (at + length > bytes.length) throw new RangeError("it ends early");
    yield [Math.floor(tag / 8), wire === 2 ? bytes.subarray(at, at + length) : null];
    at += length;
  }
}

// ModelProto.metadata_props (field 14, entries of key 1 and value 2) as a Map: the runtime does not give them.
function readMetadata(bytes) {
  const metadata = new Map();
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14 || !entry) continue;
    const pair = new Map(fields(entry));
    const [key, value] = [1, 2].map((number) => new TextDecoder().decode(pair.get(number) ?? new Uint8Array()));
    metadata.set(key, value);
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
    throw new Problem(`${source} is not an ONNX file, or is damaged: ${error.message}.`);
  }
  if (!text) throw new Problem(`${source} carries no spec: it was not made by step2_export.py.`);
  try {
    spec = JSON.parse(text);
  } catch (error) {
    throw new Problem(`${source} has a malformed spec: ${error.message}.`);
  }
  if (spec?.schema > SCHEMA) {
    const newest = `has a spec of schema ${spec.schema}, this page knows up to ${SCHEMA}`;
    throw new Problem(`${source} ${newest}: use the page of the Threestep that made it.`);
  }
  const regression = spec?.task === "regression";
  const names = Array.isArray(spec?.classes) ? spec.classes : [];
  const named = names.length > (regression ? 0 : 1) && names.every((name) => typeof name === "string");
  const shaped = regression ? spec.channels > 0 : [1, 3].includes(spec?.channels);
  if (!(regression || spec?.task === "classification") || !named || !shaped) {
    throw new Problem(`${source} has a malformed spec: its task, classes or channels make no sense.`);
  }
  return spec;
}

// {bytes, source} of the first address that answers. Throws Problem.
async function fetchModel(addresses) {
  for (const address of addresses) {
    const answer = await fetch(address, { cache: "no-cache" }).catch(() => null);
    // Some servers send their start page for whatever is missing.
    if (answer?.ok && !answer.headers.get("content-type")?.startsWith("text/html")) {
      return { bytes: new Uint8Array(await answer.arrayBuffer()), source: address };
    }
  }
  throw new Problem(`There is no model at ${addresses.join(" or ")}. Put it there, or choose it here.`);
}

function missing(path) {
  return new Problem(`The runtime is missing: ${path} cannot be loaded. In this page's folder, run: sh get-ort.sh`);
}

async function loadRuntime() {
  const [script, binary] = RUNTIME.map((path) => new URL(path, document.baseURI).href);
  const runtime = await import(script).catch(() => {
    throw missing(RUNTIME[0]);
  });
  runtime.env.logLevel = "error";
  runtime.env.wasm.wasmPaths = { wasm: binary };
  // More threads need shared memory, which browsers give only to pages that a server declares isolated.
  runtime.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
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
    const there = await fetch(RUNTIME[1], { method: "HEAD" }).then((answer) => answer.ok, () => false);
    throw there ? new Problem(`${source} cannot be run by this browser: ${error.message}`) : missing(RUNTIME[1]);
  }
  await model?.session.release();
  model = { session, spec, source, bytes: bytes.length };
}

// A tensor of batch 1 -> the outputs for it, one for each class. Throws Problem.
async function run(tensor) {
  const { session, spec } = model;
  let outputs;
  try {
    outputs = (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]].data;
  } catch (error) {
    throw new Problem(`the model cannot run on ${tensor.dims.join("x")} input: ${error.message ?? error}`);
  }
  if (outputs.length === spec.classes.length) return outputs;
  throw new Problem(`the file's spec is wrong: ${spec.classes.length} classes, ${outputs.length} outputs`);
}

// ----------------------------------------------------------------------------------------------------------- images

// An image file -> ImageBitmap, EXIF orientation applied, colours as stored. Throws Problem.
async function decode(file) {
  if (file.size === 0) throw new Problem("empty file");
  const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, options)
    .catch((error) => (error instanceof TypeError ? createImageBitmap(file) : null)) // an older browser lacks an option
    .catch(() => null);
  if (!bitmap) throw new Problem("not an image that this browser can decode");
  const size = (bitmap.width * bitmap.height) / 1e6;
  if (size <= MEGAPIXELS) return bitmap;
  throw new Problem(`${size.toFixed()} megapixels, and this page takes ${MEGAPIXELS}`);
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

// ImageBitmap -> {pixels: uint8 [height x width x channels], exact: false where colours under alpha were lost}.
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

// ImageBitmap -> its RGBA bytes as stored, or null where this device cannot. A 2D canvas multiplies colours by alpha
// and has lost what lies under transparent pixels, which Pillow shows; a WebGL texture keeps it.
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

// An image file -> {bitmap (to be closed), probabilities, exact, decoding and network in milliseconds}. Throws Problem.
async function predict(file) {
  const start = performance.now(), { channels } = model.spec;
  const bitmap = await decode(file);
  try {
    const { pixels, exact } = readPixels(bitmap, channels);
    const decoded = performance.now();
    const probabilities = await run(new ort.Tensor("uint8", pixels, [1, bitmap.height, bitmap.width, channels]));
    return { bitmap, probabilities, exact, decoding: decoded - start, network: performance.now() - decoded };
  } catch (error) {
    bitmap.close();
    throw error instanceof Problem ? error : new Problem(`too large for this device: ${error.message}`);
  }
}

// For regression: features (numbers) -> the prediction. Throws Problem.
async function predictValues(values) {
  const count = model.spec.channels;
  if (values.length !== count || !values.every(Number.isFinite)) {
    throw new Problem(`This model takes ${count} numbers, separated by commas.`);
  }
  const [prediction] = await run(new ort.Tensor("float32", Float32Array.from(values), [1, count]));
  return Number(prediction.toPrecision(7)); // what float32 holds
}

// -------------------------------------------------------------------------------------------------------- self-test

// The samples inside the file, which hold an input and what the network said on the training machine.
function goldenSamples() {
  return Array.isArray(model.spec.golden) ? model.spec.golden : [];
}

// The PNG of a golden sample as a file of this name.
function goldenFile(sample, name) {
  return new File([Uint8Array.from(atob(sample.image), (character) => character.charCodeAt(0))], name);
}

// Run the golden samples -> {count, difference: the largest from what the training machine said, passed}.
async function selfTest() {
  let count = 0, difference = 0;
  for (const sample of goldenSamples()) {
    difference = Math.max(difference, await sampleDifference(sample)); // which keeps NaN
    count += 1;
  }
  const tolerance = model.spec.quantization ? TOLERANCE.int8 : TOLERANCE.float;
  return { count, difference, passed: difference <= tolerance };
}

// One golden sample -> the largest difference of its outputs from the expected ones, relative to those above 1.
async function sampleDifference(sample) {
  let outputs, expected;
  if (model.spec.task === "regression") {
    [outputs, expected] = [[await predictValues(sample.features)], sample.prediction];
  } else {
    const { bitmap, probabilities } = await predict(goldenFile(sample, "sample"));
    bitmap.close();
    [outputs, expected] = [Array.from(probabilities), sample.probabilities];
  }
  if (expected.length !== outputs.length) throw new Problem("the golden samples do not fit the model");
  return Math.max(...outputs.map((output, i) => Math.abs(output - expected[i]) / Math.max(1, Math.abs(expected[i]))));
}
