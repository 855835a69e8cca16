// An exported model.onnx in a browser: this file predicts and runs the self-test, with the spec
// that spec.js reads and the pixels that images.js decodes. It does not touch the page: page.js
// does, with the globals of these files.
"use strict";

const RUNTIME = ["ort/ort.wasm.bundle.min.js", "ort/ort-wasm-simd-threaded.wasm"];
const TOLERATED = 1e-3; // beyond 0..1, of a probability of an int8 file

let ort = null; // the runtime's module
// {session, spec, source, bytes, limits: the file's own thresholds, which may be changed, promises:
// those that may not}
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
  model = { session, spec, source, bytes: bytes.length, limits, promises: promised(spec) };
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

// The thresholds of the promises in a spec: recalls [{number of the class, threshold}], of which the
// first that is reached counts, and the least probability of other answers.
function promised(spec) {
  const recalls = [];
  let least = 0;
  for (const { kind, name, threshold } of spec.promises ?? []) {
    if (kind === "accuracy") least = Math.max(least, threshold);
    else recalls.push({ number: spec.classes.indexOf(name), threshold });
  }
  return { recalls, least };
}

// What to answer instead of the best guess, by the rule of step3_infer.py, or null: {answer:
// "unknown" or "unsure", or "class" with its number; threshold: what decided}. promises: of
// promised().
function verdict(probabilities, known, { reject, probability }, promises) {
  const unfamiliar = reject === null ? 0 : rounded(1 - reject);
  if (reject !== null && known !== null && rounded(known) < unfamiliar) {
    return { answer: "unknown", threshold: unfamiliar };
  }

  const largest = Math.max(...probabilities);
  const guess = probabilities.indexOf(largest);
  for (const { number, threshold } of promises.recalls) {
    if (rounded(probabilities[number]) < threshold) continue;
    return number === guess ? null : { answer: "class", number, threshold };
  }

  const least = Math.max(probability ?? 0, promises.least);
  if (rounded(largest) < least) return { answer: "unsure", threshold: least };
  return null;
}

// ------------------------------------------------------------------------------------- predictions

// An image file -> {bitmap (to be closed), orientation (in which it is stored), probabilities,
// known, transparent, exact, decoding and network in milliseconds}. Throws Problem.
async function predict(file) {
  const { channels, white, ground } = model.spec;
  const start = performance.now();
  const image = await decode(file, white);
  const { bitmap, orientation } = image;
  try {
    const { pixels, transparent, exact } = readPixels(image, channels, ground);
    const { width, height } = placement(orientation, bitmap.width, bitmap.height);

    const decoded = performance.now();
    const shape = [1, height, width, channels];
    const [probabilities, known] = await run(new ort.Tensor("uint8", pixels, shape));
    checkShares([...probabilities, known ?? 0]);

    const decoding = decoded - start;
    const network = performance.now() - decoded;
    const times = { decoding, network };
    return { bitmap, orientation, probabilities, known, transparent, exact, ...times };
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
