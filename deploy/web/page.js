// What the page shows and how it is used; engine.js does the work. Class names, file names and the spec's texts are
// strangers' data: they reach the page through textContent only.
"use strict";

const TOP = 5; // classes shown for an image
const CARDS = 200; // results kept on the page
const THUMBNAIL = 192; // pixels, two for each of the screen's
const $ = (id) => document.getElementById(id);
const percent = (probability) => `${(100 * probability).toFixed(2)} %`;
const milliseconds = (time) => `${time.toFixed(time < 10 ? 1 : 0)} ms`;

// Names in a sentence must not turn the writing direction of what follows them.
const isolate = (name) => `\u2068${name}\u2069`;

let queue = Promise.resolve(); // work is done in the order in which it was asked for

// A new element below `parent`, with this class and text.
function add(parent, tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return parent.appendChild(element);
}

function say(text) {
  $("status").textContent = text;
}

function warn(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
}

// Do `work` after all that was asked for before; show its Problem as the page's own.
function later(work) {
  queue = queue.then(work).catch((error) => {
    if (!(error instanceof Problem)) console.error(error);
    warn(error.message);
    say("");
    if (!model) $("choose").textContent = "Choose a model.onnx";
  });
}

// ------------------------------------------------------------------------------------------------------------ model

// Load a model from `find`'s {bytes, source}, describe it and test it.
async function start(find) {
  if (location.protocol === "file:") {
    const way = "In its folder, run python3 -m http.server, and open http://localhost:8000";
    throw new Problem(`A page that is opened as a file cannot load its model. ${way}`);
  }
  if (typeof WebAssembly === "undefined") {
    throw new Problem("This browser has no WebAssembly, or it is switched off (as in lockdown mode): use another one.");
  }
  $("problem").hidden = true;
  say("Loading the model and the runtime …");
  await useModel(await find());
  describe(model.spec);
  await showSelfTest();
  say("Ready.");
}

function describe(spec) {
  const regression = spec.task === "regression";
  const accuracy = Number.isFinite(spec.test_accuracy) ? percent(spec.test_accuracy) : null;
  $("title").textContent = document.title = regression ? "Regression" : "Image classifier";
  const count = spec.classes.length, isolated = spec.classes.map(isolate);
  const names = isolated.slice(0, 12).join(", ") + (count > 12 ? ", …" : ".");
  const knows = regression ? `From ${spec.channels} numbers predicts: ${names}` : `Knows ${count} classes: ${names}`;
  $("summary").textContent = knows + (accuracy ? ` Right for ${accuracy} of its test images.` : "");
  $("tools").hidden = regression;
  $("numbers").hidden = !regression;
  $("files").accept = "image/*";
  $("choose").textContent = "Choose images";
  $("shoot").hidden = false;
  $("samples").hidden = regression || !goldenSamples().length;
  const { numThreads } = ort.env.wasm;
  const size = Array.isArray(spec.image_size) ? spec.image_size.join(" × ") : "?"; // height first, as in the spec
  const input = `${spec.channels === 1 ? "grey" : "colour"}, any size, resized to ${size} inside the model`;
  const facts = [
    [regression ? "Output" : "Classes", isolated.join(", ")],
    ["Trained on", spec.dataset],
    ["Network", spec.model],
    ["Parameters", spec.parameters?.toLocaleString?.("en")],
    ["Test accuracy", accuracy],
    ["Input", regression ? null : input],
    ["Exported", spec.exported],
    ["Checkpoint SHA-256", spec.checkpoint_sha256],
    ["File", `${model.source}, ${(model.bytes / 1e6).toFixed(2)} MB`],
    ["Runtime", `onnxruntime-web ${ort.env.versions.web}, ${numThreads} thread${numThreads > 1 ? "s" : ""}`],
  ];
  const list = $("about").querySelector("dl");
  list.replaceChildren();
  for (const [name, value] of facts) {
    if (value === undefined || value === null) continue;
    add(list, "dt", "", name);
    add(list, "dd", "", String(value));
  }
  $("footer").hidden = false;
}

async function showSelfTest() {
  let text, passed = false;
  try {
    const { count, difference, ...result } = await selfTest();
    passed = result.passed || !count;
    const samples = `${count} sample${count > 1 ? "s" : ""} inside the file`;
    const differ = `largest difference from the training machine ${difference ? difference.toExponential(1) : 0}`;
    text = `${passed ? "passed" : "FAILED"}: ${samples}, ${differ}`;
    if (!count) text = "not possible: the file holds no samples";
  } catch (error) {
    text = `FAILED: ${error.message}`;
  }
  $("selftest").textContent = `Self-test ${text}.`;
  if (!passed) warn(`Do not trust this page's answers. Self-test ${text}.`);
}

// ---------------------------------------------------------------------------------------------------------- results

// Predict the images among `files`, in order, newest batch on top; an .onnx file among them becomes the model.
function take(files) {
  const images = Array.from(files).filter((file) => !/\.onnx$/i.test(file.name));
  for (const file of files) {
    if (images.includes(file)) continue;
    later(() => start(async () => ({ bytes: new Uint8Array(await file.arrayBuffer()), source: file.name })));
  }
  if (images.length) later(() => classify(images));
}

async function classify(files) {
  if (!model) return;
  if (model.spec.task === "regression") return say("This model takes numbers, not images.");
  const results = $("results"), newest = results.firstElementChild;
  let failed = 0;
  for (const [index, file] of files.entries()) {
    const name = file.name || "pasted image", card = document.createElement("article");
    say(`${files.length > 1 ? `${index + 1} of ${files.length}: ` : ""}${name} …`);
    let answer;
    try {
      answer = await predict(file).then((result) => showResult(card, name, result));
    } catch (error) {
      failed += 1;
      card.className = "bad";
      answer = `${name}: ${error.message}.`;
      add(card, "p", "", answer);
    }
    results.insertBefore(card, newest);
    while (results.children.length > CARDS) results.lastElementChild.remove();
    if (files.length === 1) say(answer);
  }
  if (files.length > 1) say(`${files.length} images done${failed ? `, ${failed} of them could not be used` : ""}.`);
}

// Fill a card; -> the answer in words.
function showResult(card, name, { bitmap, probabilities, exact, decoding, network }) {
  const picture = thumbnail(bitmap, name), { width, height } = bitmap;
  bitmap.close();
  card.append(picture);
  const text = add(card, "div");
  add(text, "h2", "", name);
  const list = add(text, "ol");
  const best = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, TOP);
  for (const index of best) {
    const row = add(list, "li");
    add(row, "bdi", "", model.spec.classes[index]);
    add(row, "span", "percent", percent(probabilities[index]));
    add(add(row, "span", "bar"), "span").style.width = `${100 * probabilities[index]}%`;
  }
  add(text, "p", "quiet", `${width} × ${height} pixels · ${milliseconds(decoding + network)}`);
  add(text, "p", "quiet", `decoding ${milliseconds(decoding)}, network ${milliseconds(network)}`);
  if (!exact) add(text, "p", "quiet", "It has transparent pixels, whose colours this browser does not give exactly.");
  return `${isolate(name)}: ${isolate(model.spec.classes[best[0]])}, ${percent(probabilities[best[0]])}`;
}

// A canvas with the image: small ones as they are (to be shown in large pixels), others shrunk.
function thumbnail(bitmap, name) {
  const canvas = document.createElement("canvas");
  const scale = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.className = canvas.width * canvas.height < 64 * 64 ? "pixels" : "";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// ----------------------------------------------------------------------------------------------------------- events

for (const [button, input] of [["drop", "files"], ["shoot", "camera"]]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => {
    take(Array.from($(input).files));
    $(input).value = ""; // the same file may be chosen again
  });
}

// The whole page takes drops: one beside the button would otherwise replace the page by the image.
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take(Array.from(event.dataTransfer.files));
  });
}

document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(Array.from(event.clipboardData.files));
});

$("numbers").addEventListener("submit", (event) => {
  event.preventDefault();
  later(async () => {
    const values = $("values").value.split(",").map((text) => (text.trim() ? Number(text) : NaN));
    const answer = predictValues(values).then((value) => `${isolate(model.spec.classes[0])}: ${value}`);
    say(await answer.catch((error) => error.message));
  });
});

$("again").addEventListener("click", () => later(showSelfTest));

$("samples").addEventListener("click", () => {
  take(goldenSamples().map((sample, index) => goldenFile(sample, `sample ${index + 1}`)));
});

const asked = new URLSearchParams(location.search).get("model");
later(() => start(() => fetchModel(asked ? [asked] : ["model.onnx", "../model.onnx"])));
