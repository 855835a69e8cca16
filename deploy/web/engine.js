// An exported model.onnx in a browser: this file decodes images as step3_infer.py does, predicts
// and runs the self-test, with the spec that spec.js reads. It does not touch the page: page.js
// does, with the globals of both files.
"use strict";

const RUNTIME = ["ort/ort.wasm.bundle.min.js", "ort/ort-wasm-simd-threaded.wasm"];
// Pixels read from a canvas at once: phones limit the size of a canvas, not of an image.
const TILE = 512;
const WHITE = 65535; // of 16-bit greys, what browsers make 255
const MAX_SIDE = 65_535; // pixels, as in step3_infer.py
const MAX_PIXELS = 178_956_970;
const TOLERATED = 1e-3; // beyond 0..1, of a probability of an int8 file

let ort = null; // the runtime's module
// {session, spec, source, bytes, limits: the file's own thresholds, which may be changed}
let model = null;

// A number with its noun in the singular or plural: 1 sample, 2 samples.
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// A number with six decimals, as step3_infer.py writes and compares it.
const rounded = (value) => Math.round(value * 1e6) / 1e6;

// ------------------------------------------------------------------------------------------- model

// {bytes, source} of the first address with a model. Throws Problem.
async function fetchModel(addresses) {
  for (const address of addresses) {
    const response = await fetch(address, { cache: "no-cache" }).catch(() => null);
    // Some servers send their start page for a missing file.
    if (response?.ok && !response.headers.get("content-type")?.startsWith("text/html")) {
      return { bytes: new Uint8Array(await response.arrayBuffer()), source: address };
    }
  }
  const remedy = "Put one there, or choose a file here.";
  throw new Problem(`There is no model at ${addresses.join(" or ")}. ${remedy}`);
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

// A tensor of batch 1 -> [outputs, one for each class; known, the share of images like those
// trained on that look less familiar, or null if the file does not say it]. Throws Problem.
async function run(tensor) {
  const { session, spec } = model;
  let results;
  try {
    results = await session.run({ [session.inputNames[0]]: tensor });
  } catch (error) {
    const shape = tensor.dims.join("x");
    throw new Problem(`the model cannot run on ${shape} input: ${error.message ?? error}`);
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

// Throws Problem for outputs that no honest classifier computes.
function checkShares(shares) {
  if (!shares.every(Number.isFinite)) {
    throw new Problem("the model computes NaN or infinity for this image");
  }
  if (!shares.every((share) => share >= -TOLERATED && share <= 1 + TOLERATED)) {
    throw new Problem("the model computes probabilities outside 0..1 for this image");
  }
}

// What to answer instead of the best guess, by the rule of step3_infer.py: "unknown", "unsure", or
// null.
function verdict(probabilities, known, { reject, probability }) {
  const best = rounded(Math.max(...probabilities));
  if (reject !== null && known !== null && rounded(known) < rounded(1 - reject)) return "unknown";
  if (probability !== null && best < probability) return "unsure";
  return null;
}

// ------------------------------------------------------------------------------------------ images

// Throws Problem for an image of so many pixels that its memory would be a burden.
function checkSize(width, height) {
  const text = (number) => number.toLocaleString("en");
  const side = Math.max(width, height);
  if (side > MAX_SIDE) {
    throw new Problem(`has a side of ${text(side)} pixels, more than ${text(MAX_SIDE)}`);
  }
  if (width * height > MAX_PIXELS) {
    const size = `${text(width)} x ${text(height)} pixels`;
    throw new Problem(`has ${size}, more than ${text(MAX_PIXELS)}`);
  }
}

// Check the size of an image file before it is decoded: an <img> that is not drawn reads only what
// the file says. A file that it cannot read has no size. Throws Problem.
async function checkFile(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  await new Promise((resolve) => {
    image.onload = resolve;
    image.onerror = resolve;
  });
  const { naturalWidth, naturalHeight } = image;
  URL.revokeObjectURL(image.src);
  image.src = "";
  checkSize(naturalWidth, naturalHeight);
}

// An image file -> ImageBitmap, EXIF orientation applied, colours as stored. Throws Problem.
async function decode(file) {
  if (file.size === 0) throw new Problem("empty file");
  await checkFile(file);

  const asStored = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const older = (error) => (error instanceof TypeError ? createImageBitmap(file) : null);
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", ...asStored })
    .catch(older) // a browser that does not know the options
    .catch(() => null);
  if (!bitmap) throw new Problem("not an image that this browser can decode");

  try {
    checkSize(bitmap.width, bitmap.height); // an <img> believes the EXIF block, which may lie
  } catch (error) {
    bitmap.close();
    throw error;
  }
  return bitmap;
}

// Copy the RGBA bytes from..end to `pixels` at `to` without alpha; 1 channel is Pillow's
// convert("L"). Returns whether all of them are opaque.
function pack(rgba, from, end, pixels, to, channels) {
  let alpha = 255;
  for (let at = from; at < end; at += 4) {
    const red = rgba[at];
    const green = rgba[at + 1];
    const blue = rgba[at + 2];
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

// ImageBitmap -> {pixels: uint8 [height x width x channels], exact: whether all colours are as
// stored}.
function readPixels(bitmap, channels) {
  const { width, height } = bitmap;
  const pixels = new Uint8Array(width * height * channels);
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(width, TILE);
  canvas.height = Math.min(height, TILE);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";

  let opaque = true;
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const w = Math.min(TILE, width - left);
      const h = Math.min(TILE, height - top);
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

// ImageBitmap -> its RGBA bytes as stored, or null if this device cannot read them. A 2D canvas
// multiplies colours by alpha and so loses those of transparent pixels, which Pillow keeps, and so
// does a WebGL texture.
function readUnderAlpha(bitmap) {
  const { width, height } = bitmap;
  const gl = document.createElement("canvas").getContext("webgl");
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;

  const rgba = new Uint8Array(width * height * 4);
  const texture = gl.createTexture();
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

// Whether a file is a PNG of 16-bit greys, by its header: the only 16-bit greys that browsers
// decode.
async function hasWideGreys(file) {
  const header = new Uint8Array(await file.slice(0, 26).arrayBuffer());
  const isPng = header[1] === 0x50 && header[2] === 0x4e;
  return isPng && header[24] === 16 && header[25] === 0; // bits, and the kind of colour
}

// Stretch 8-bit pixels, which the browser made from 16 bits, as if `white` had become 255. Levels
// between the 8-bit ones are lost.
function stretch(pixels, white) {
  for (let at = 0; at < pixels.length; at++) {
    pixels[at] = Math.min(255, Math.round((pixels[at] * WHITE) / white));
  }
}

// An image file -> {bitmap (to be closed), probabilities, known, exact, stretched (whether 16-bit
// greys are approximate), decoding and network in milliseconds}. Throws Problem.
async function predict(file) {
  const { channels, white } = model.spec;
  const start = performance.now();
  const bitmap = await decode(file);
  try {
    const { pixels, exact } = readPixels(bitmap, channels);
    const stretched = white !== WHITE && (await hasWideGreys(file));
    if (stretched) stretch(pixels, white);

    const decoded = performance.now();
    const shape = [1, bitmap.height, bitmap.width, channels];
    const [probabilities, known] = await run(new ort.Tensor("uint8", pixels, shape));
    checkShares([...probabilities, known ?? 0]);

    const decoding = decoded - start;
    const network = performance.now() - decoded;
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
  const tensor = new ort.Tensor("float32", Float32Array.from(values), [1, count]);
  const [[prediction]] = await run(tensor);
  return Number(prediction.toPrecision(7)); // what float32 holds
}

// --------------------------------------------------------------------------------------- self-test

// The PNG of a golden sample as a file of this name. Throws Problem.
function goldenFile(sample, name) {
  let characters;
  try {
    characters = atob(sample.image);
  } catch {
    throw new Problem("the golden samples are malformed");
  }
  return new File([Uint8Array.from(characters, (character) => character.charCodeAt(0))], name);
}

// Run the golden samples -> {count, difference (the largest of any output), tolerance,
// knownDifference and knownTolerance (the same of known, null without), passed}. Throws Problem.
async function selfTest() {
  const { golden, known } = model.spec;
  const { output: tolerance, known: knownTolerance } = tolerancesOf(model.spec);
  let difference = 0;
  let knownDifference = known ? 0 : null;
  for (const sample of golden) {
    const differences = await sampleDifferences(sample);
    difference = Math.max(difference, differences[0]); // which keeps NaN
    if (known) knownDifference = Math.max(knownDifference, differences[1]);
  }

  const isKnown = !known || knownDifference <= knownTolerance;
  const passed = difference <= tolerance && isKnown;
  const count = golden.length;
  return { count, difference, tolerance, knownDifference, knownTolerance, passed };
}

// One golden sample -> [the largest difference of its outputs from the expected ones, relative
// above 1; the difference of known, null without].
async function sampleDifferences(sample) {
  let outputs;
  let expected = sample.probabilities;
  let known = null;
  if (model.spec.task === "regression") {
    outputs = [await predictValues(sample.features)];
    expected = sample.prediction;
  } else {
    const result = await predict(goldenFile(sample, "sample"));
    result.bitmap.close();
    outputs = Array.from(result.probabilities);
    known = result.known;
  }

  const matches = expected?.length === outputs.length && (known === null || isShare(sample.known));
  if (!matches) throw new Problem("the golden samples do not match the model");

  const differences = outputs.map((output, i) => {
    return Math.abs(output - expected[i]) / Math.max(1, Math.abs(expected[i]));
  });
  return [Math.max(...differences), known === null ? null : Math.abs(known - sample.known)];
}
