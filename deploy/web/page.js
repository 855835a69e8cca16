// What the page displays and how it reacts; engine.js does the work. Class names, file names and
// the texts of the spec are untrusted: they reach the page through shown() and textContent only.
"use strict";

const TOP = 5; // classes displayed for an image
const CARDS = 200; // results kept on the page
const THUMBNAIL = 192; // pixels, two for each of the screen's
const $ = (id) => document.getElementById(id);
const percent = (share, decimals = 2) => `${(100 * share).toFixed(decimals)}%`;
const LIMITS = { reject: "reject", probability: "least" }; // threshold -> id of its input, in %
const MAX_SHOWN = 256; // characters of a text that the page displays
const scientific = (value) => value === 0 ? "0" : value.toExponential(1);
const milliseconds = (time) => `${time.toFixed(time < 10 ? 1 : 0)} ms`;

// Untrusted text as the page displays it: without the characters that turn the writing direction of
// what follows, even out of an element or an isolate, and not too long.
function shown(text, limit = MAX_SHOWN) {
  const characters = Array.from(String(text).replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd"));
  const end = characters.length > limit ? "…" : "";
  return characters.slice(0, limit).join("") + end;
}

// A name in a sentence: its letters must not turn the direction of what follows them, either.
const isolate = (name) => `\u2068${shown(name)}\u2069`;

let queue = Promise.resolve(); // work is done in the order of the requests

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
  $("problem").textContent = shown(text, 4 * MAX_SHOWN);
  $("problem").hidden = false;
}

// Do `work` after everything requested before; display its Problem.
function enqueue(work) {
  queue = queue.then(work).catch((error) => {
    if (!(error instanceof Problem)) console.error(error);
    warn(error.message);
    say("");
    if (!model) $("choose").textContent = "Choose a model.onnx";
  });
}

// ------------------------------------------------------------------------------------------- model

// Load the model that `find` resolves to as {bytes, source}, describe it and test it.
async function startModel(find) {
  if (location.protocol === "file:") {
    const remedy = "Run python3 -m http.server in its folder, and open http://localhost:8000";
    throw new Problem(`A page that is opened as a file cannot load its model. ${remedy}`);
  }
  if (typeof WebAssembly === "undefined") {
    const cause = "This browser has no WebAssembly, or it is disabled";
    throw new Problem(`${cause}, for example by lockdown mode. Use another browser.`);
  }
  $("problem").hidden = true;
  say("Loading the model and the runtime …");
  const { bytes, source } = await find();
  await useModel({ bytes, source: shown(source) });
  describe(model.spec);
  await runSelfTest();
  say("Ready.");
}

function describe(spec) {
  const regression = spec.task === "regression";
  const accuracy = Number.isFinite(spec.test_accuracy) ? percent(spec.test_accuracy) : null;
  $("title").textContent = document.title = regression ? "Regression" : "Image classifier";
  const count = spec.classes.length;
  const isolated = spec.classes.map(isolate);
  const names = isolated.slice(0, 12).join(", ") + (count > 12 ? ", …" : ".");
  const said = accuracy ? ` Test accuracy: ${accuracy}.` : "";
  $("summary").textContent = regression
    ? `Predicts from ${counted(spec.channels, "number")}: ${names}`
    : `Predicts one of ${count} classes: ${names}${said}`;

  $("tools").hidden = regression;
  $("numbers").hidden = !regression;
  $("files").accept = "image/*";
  $("choose").textContent = "Choose images";
  $("shoot").hidden = false;
  $("samples").hidden = regression || !model.spec.golden.length;
  $("limits").hidden = regression;
  $("familiar").hidden = !spec.known;
  for (const name in LIMITS) showLimit(name);
  const { numThreads } = ort.env.wasm;
  const size = Array.isArray(spec.image_size) ? spec.image_size.join(" × ") : "?"; // height first
  const colours = spec.channels === 1 ? "grey" : "colour";
  const input = `${colours}, any size, resized to ${size} inside the model`;
  const facts = [
    [regression ? "Output" : "Classes", isolated.join(", ")],
    ["Dataset", fact(spec.dataset)],
    ["Network", fact(spec.model)],
    ["Parameters", fact(spec.parameters?.toLocaleString?.("en"))],
    ["Test accuracy", accuracy],
    ["Promises", regression ? null : promisesOf(spec)],
    ["Input", regression ? null : input],
    ["Trained", fact(spec.created)],
    ["Checkpoint SHA-256", fact(spec.checkpoint_sha256)],
    ["File", `${model.source}, ${(model.bytes / 1e6).toFixed(2)} MB`],
    ["Runtime", `onnxruntime-web ${ort.env.versions.web}, ${counted(numThreads, "thread")}`],
  ];
  const list = $("about").querySelector("dl");
  list.replaceChildren();
  for (const [name, value] of facts) {
    if (value === null) continue;
    add(list, "dt", "", name);
    add(list, "dd", "", value);
  }
  $("footer").hidden = false;
}

// The promises of a spec in words, or null if it has none.
function promisesOf({ promises }) {
  const texts = (promises ?? []).map(({ kind, name, share, threshold }) => {
    const least = `at least ${rounded(100 * share)}%`;
    const limit = `${rounded(100 * threshold)}%`;
    return kind === "accuracy"
      ? `accuracy of what is answered ${least} (unsure below ${limit})`
      : `recall of ${isolate(name)} ${least} (called so from ${limit} on)`;
  });
  return texts.join("; ") || null;
}

// A text of the spec, or null if it has none.
const fact = (value) => (value === undefined || value === null ? null : shown(value));

async function runSelfTest() {
  const compared = (difference, tolerance) => {
    return `${scientific(difference)}, tolerance ${scientific(tolerance)}`;
  };
  let text;
  let passed = false;
  try {
    const result = await selfTest();
    passed = result.passed;
    let measured = `largest difference ${compared(result.difference, result.tolerance)}`;
    if (result.knownTolerance !== null) {
      measured += `; of known ${compared(result.knownDifference, result.knownTolerance)}`;
    }
    const samples = counted(result.count, "golden sample");
    text = `${passed ? "passed" : "FAILED"}: ${samples}, ${measured}`;
    if (!result.count) text = "not run: the file contains no golden samples";
  } catch (error) {
    text = `FAILED: ${error.message}`;
  }
  $("selftest").textContent = `Self-test ${text}.`;
  if (!passed) warn(`Do not trust the predictions of this page. Self-test ${text}.`);
}

// -------------------------------------------------------------------------------------- thresholds

// Display a threshold of the model; none is an empty input.
function showLimit(name) {
  const share = model.limits[name];
  $(LIMITS[name]).value = share === null ? "" : String(rounded(100 * share));
  $(LIMITS[name]).removeAttribute("aria-invalid");
}

// Take a threshold from its input and judge the predictions on the page again. A wrong one changes
// nothing.
function changeLimit(name) {
  if (!model) return;
  const input = $(LIMITS[name]);
  if (!input.validity.valid) {
    input.setAttribute("aria-invalid", "true");
    return say("A threshold is a number from 0 to 100 percent; leave it empty for none.");
  }
  input.removeAttribute("aria-invalid");
  model.limits[name] = input.value === "" ? null : rounded(Number(input.value) / 100);
  const counts = { unknown: 0, unsure: 0 };
  const all = Array.from($("results").children);
  const judged = all.filter((card) => card.prediction?.model === model);
  for (const card of judged) {
    const { answer } = judge(card) ?? {};
    if (answer in counts) counts[answer] += 1;
  }
  say(`${counted(judged.length, "image")}: ${counts.unknown} unknown, ${counts.unsure} unsure.`);
}

// Write the verdict on a card's prediction above its classes; -> {answer, said: in a sentence}, or
// null for the best guess.
function judge(card) {
  const { probabilities, known } = card.prediction;
  const line = card.querySelector(".verdict");
  const found = verdict(probabilities, known, model.limits, model.promises);
  line.replaceChildren();
  line.hidden = found === null;
  card.classList.toggle("held", found !== null);
  if (!found) return null;

  const { answer, number, threshold } = found;
  const limit = `${rounded(100 * threshold)}%`;
  const reason = {
    unknown: `known is below ${limit}`,
    unsure: `probability is below ${limit}`,
    class: `promised from ${limit} on`,
  }[answer];
  const name = answer === "class" ? model.spec.classes[number] : answer;
  add(line, "strong", "", shown(name));
  add(line, "span", "quiet", `${reason}. Best guess:`);
  return { answer, said: answer === "class" ? isolate(name) : answer };
}

// ----------------------------------------------------------------------------------------- results

// Predict the images among `files`, in order, newest batch on top; an .onnx file becomes the model.
function acceptFiles(files) {
  const images = Array.from(files).filter((file) => !/\.onnx$/i.test(file.name));
  for (const file of files) {
    if (images.includes(file)) continue;
    enqueue(() => startModel(async () => {
      return { bytes: new Uint8Array(await file.arrayBuffer()), source: file.name };
    }));
  }
  if (images.length) enqueue(() => classify(images));
}

async function classify(files) {
  if (!model) return;
  if (model.spec.task === "regression") return say("This model takes numbers, not images.");
  const results = $("results"), newest = results.firstElementChild;
  let failed = 0;
  for (const [index, file] of files.entries()) {
    const name = shown(file.name || "pasted image");
    const card = document.createElement("article");
    const place = files.length > 1 ? `${index + 1} of ${files.length}: ` : "";
    say(`${place}${isolate(name)} …`);
    let summary;
    try {
      summary = fillCard(card, name, await predict(file));
    } catch (error) {
      failed += 1;
      card.className = "bad";
      summary = `${name}: ${shown(error.message)}.`;
      add(card, "p", "", summary);
    }
    results.insertBefore(card, newest);
    while (results.children.length > CARDS) results.lastElementChild.remove();
    if (files.length === 1) say(summary);
  }
  if (files.length > 1) say(`${files.length - failed} of ${files.length} images predicted.`);
}

// Fill a card; -> the prediction in words.
function fillCard(card, name, result) {
  const { bitmap, orientation, probabilities, known, decoding, network } = result;
  const { width, height } = placement(orientation, bitmap.width, bitmap.height);
  card.append(thumbnail(bitmap, orientation, name));
  bitmap.close();

  const text = add(card, "div");
  add(text, "h2", "", name);
  add(text, "div", "verdict");
  const list = add(text, "ol");
  const ranked = Array.from(probabilities.keys());
  ranked.sort((a, b) => probabilities[b] - probabilities[a]);
  const best = ranked.slice(0, TOP);
  for (const index of best) {
    const row = add(list, "li");
    add(row, "bdi", "", shown(model.spec.classes[index]));
    add(row, "span", "percent", percent(probabilities[index]));
    add(add(row, "span", "bar"), "span").style.width = `${100 * probabilities[index]}%`;
  }
  if (known !== null) {
    const row = add(text, "div", "known");
    add(row, "span", "", "known");
    add(row, "span", "percent", percent(known, 1));
    add(add(row, "span", "bar"), "span").style.width = `${100 * known}%`;
  }
  add(text, "p", "quiet", `${width} × ${height} pixels · ${milliseconds(decoding + network)}`);
  add(text, "p", "quiet", `decoding ${milliseconds(decoding)}, network ${milliseconds(network)}`);
  if (result.transparent) {
    const { ground } = model.spec;
    let said = ground ? `laid on ${ground}` : "whose alpha the model drops";
    if (!result.exact) said = "whose exact colours this browser does not expose";
    add(text, "p", "quiet", `The image has transparent pixels, ${said}.`);
  }

  card.prediction = { model, probabilities, known };
  const judged = judge(card);
  const guess = isolate(model.spec.classes[best[0]]);
  const said = `${guess}, ${percent(probabilities[best[0]])}`;
  return `${isolate(name)}: ${judged ? `${judged.said}; best guess ${said}` : said}`;
}

// A canvas with the upright image on the ground of the model: small images keep their pixels, which
// the page enlarges; others are shrunk.
function thumbnail(bitmap, orientation, name) {
  const canvas = document.createElement("canvas");
  const { width, height } = placement(orientation, bitmap.width, bitmap.height);
  const scale = Math.min(1, THUMBNAIL / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.className = canvas.width * canvas.height < 64 * 64 ? "pixels" : "";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", name);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = model.spec.ground ?? "transparent";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.scale(canvas.width / width, canvas.height / height);
  context.transform(...turning(orientation, bitmap.width, bitmap.height));
  context.drawImage(bitmap, 0, 0);
  return canvas;
}

// ------------------------------------------------------------------------------------------ events

for (const [button, input] of [["drop", "files"], ["shoot", "camera"]]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => {
    acceptFiles(Array.from($(input).files));
    $(input).value = ""; // the same file may be chosen again
  });
}

// The whole page accepts drops: one beside the button would otherwise replace the page by the
// image.
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") acceptFiles(Array.from(event.dataTransfer.files));
  });
}

document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) acceptFiles(Array.from(event.clipboardData.files));
});

$("numbers").addEventListener("submit", (event) => {
  event.preventDefault();
  enqueue(async () => {
    const parts = $("values").value.split(",");
    const values = parts.map((text) => (text.trim() ? Number(text) : NaN));
    try {
      say(`${isolate(model.spec.classes[0])}: ${await predictValues(values)}`);
    } catch (error) {
      say(shown(error.message));
    }
  });
});

for (const name in LIMITS) $(LIMITS[name]).addEventListener("change", () => changeLimit(name));

$("again").addEventListener("click", () => enqueue(runSelfTest));

$("samples").addEventListener("click", () => enqueue(() => {
  acceptFiles(model.spec.golden.map((sample, index) => goldenFile(sample, `sample ${index + 1}`)));
}));

const requested = new URLSearchParams(location.search).get("model");
const places = requested ? [requested] : ["model.onnx", "../model.onnx", "ort/model.onnx"];
enqueue(() => startModel(() => fetchModel(places)));
