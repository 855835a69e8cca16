// Decodes PNG files of 16 bits, of which a browser's own decoder keeps 8.
"use strict";

const PNG_CHANNELS = { 0: 1, 2: 3, 4: 2, 6: 4 }; // by kind of colour; of 2 and 4, the last is alpha
const FULL = 65535; // the highest level of 16 bits
// Adam7: the first column and row of each pass, and its steps.
const PASSES = [
  [0, 0, 8, 8],
  [4, 0, 8, 8],
  [0, 4, 4, 8],
  [2, 0, 4, 4],
  [0, 2, 2, 4],
  [1, 0, 2, 2],
  [0, 1, 1, 2],
];

// What each filter of a row expects of a byte by the bytes on its left, above it, and above on the
// left.
const FILTERS = [
  () => 0,
  (left) => left,
  (left, above) => above,
  (left, above) => (left + above) >> 1,
  paeth,
];

function paeth(left, above, corner) {
  const estimate = left + above - corner;
  const toLeft = Math.abs(estimate - left);
  const toAbove = Math.abs(estimate - above);
  const toCorner = Math.abs(estimate - corner);
  if (toLeft <= toAbove && toLeft <= toCorner) return left;
  return toAbove <= toCorner ? above : corner;
}

// Whether a file is a PNG of 16 bits.
const isWidePng = (bytes, format) => format === "PNG" && bytes[24] === 16;

// The size of a PNG in pixels.
const sizeOfPng = (bytes) => [wholeAt(bytes, 16, 4), wholeAt(bytes, 20, 4)];

// A PNG of 16 bits -> its pixels in 8 bits: RGBA, colours so that `white` becomes 255. Throws
// Problem.
async function decodeWidePng(bytes, white) {
  const [width, height] = sizeOfPng(bytes);
  const channels = PNG_CHANNELS[bytes[25]];
  const interlacing = bytes[28];
  if (!channels || interlacing > 1) throw new Problem("is a damaged PNG file");

  const passes = passesOf(width, height, interlacing);
  const { data, key } = pngChunks(bytes, channels);
  const step = 2 * channels; // bytes of a pixel
  const size = passes.reduce((sum, { columns, rows }) => sum + rows * (1 + step * columns), 0);
  const inflated = await inflate(data, size);

  const rgba = new Uint8ClampedArray(width * height * 4);
  const levels = { channels, key, colours: scalingTable(white), alphas: scalingTable(FULL) };
  let at = 0;
  for (const { left, top, across, down, columns, rows } of passes) {
    let above = new Uint8Array(step * columns);
    for (let row = 0; row < rows; row++) {
      const line = inflated.subarray(at + 1, at + 1 + above.length);
      unfilter(line, above, inflated[at], step);
      writePixels(line, levels, rgba, 4 * ((top + row * down) * width + left), 4 * across);
      above = line;
      at += 1 + line.length;
    }
  }
  return rgba;
}

// The passes that have pixels, each with its number of columns and rows.
function passesOf(width, height, interlacing) {
  const passes = [];
  for (const [left, top, across, down] of interlacing ? PASSES : [[0, 0, 1, 1]]) {
    const columns = Math.ceil((width - left) / across);
    const rows = Math.ceil((height - top) / down);
    if (columns > 0 && rows > 0) passes.push({ left, top, across, down, columns, rows });
  }
  return passes;
}

// The compressed pixels of a PNG, and its transparent colour as bytes, or null.
function pngChunks(bytes, channels) {
  const data = [];
  let key = null;
  for (let at = 8; at < bytes.length; at += 12 + wholeAt(bytes, at, 4)) {
    const content = bytes.subarray(at + 8, at + 8 + wholeAt(bytes, at, 4));
    if (startsWith(bytes, "IDAT", at + 4)) data.push(content);
    if (startsWith(bytes, "tRNS", at + 4) && content.length === 2 * channels) key = content;
    if (startsWith(bytes, "IEND", at + 4)) break;
  }
  return { data, key };
}

// The first `size` bytes of compressed parts. Throws Problem.
async function inflate(parts, size) {
  if (typeof DecompressionStream === "undefined") {
    throw new Problem("has 16 bits, which this browser is too old to read: save it with 8 bits");
  }

  const bytes = new Uint8Array(size);
  const inflating = new DecompressionStream("deflate");
  const reader = new Blob(parts).stream().pipeThrough(inflating).getReader();
  let at = 0;
  while (at < size) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Problem("is cut off or damaged: its data ends before its last row");
    bytes.set(value.subarray(0, size - at), at);
    at += value.length;
  }
  reader.cancel().catch(() => null); // of a file that says too little of its size
  return bytes;
}

// Undo the filter of a row in place. above: the row above it; step: bytes of a pixel.
function unfilter(line, above, filter, step) {
  const expected = FILTERS[filter];
  if (!expected) throw new Problem("is a damaged PNG file");
  if (filter === 0) return;
  for (let i = 0; i < line.length; i++) {
    const left = i < step ? 0 : line[i - step];
    const corner = i < step ? 0 : above[i - step];
    line[i] += expected(left, above[i], corner);
  }
}

// What each level of 16 bits becomes, so that `white` becomes 255.
function scalingTable(white) {
  const table = new Uint8Array(FULL + 1);
  for (let level = 0; level <= FULL; level++) {
    const scaled = Math.min(level, white) * 255 + Math.floor(white / 2);
    table[level] = Math.floor(scaled / white);
  }
  return table;
}

// Write a row of 16-bit samples as RGBA from `to` on, the pixels `step` bytes apart.
function writePixels(line, { channels, key, colours, alphas }, rgba, to, step) {
  const hasAlpha = channels % 2 === 0;
  const green = channels < 3 ? 0 : 2; // those of a grey pixel are the same bytes
  const blue = channels < 3 ? 0 : 4;
  const level = (at) => (line[at] << 8) | line[at + 1];

  for (let at = 0; at < line.length; at += 2 * channels) {
    rgba[to] = colours[level(at)];
    rgba[to + 1] = colours[level(at + green)];
    rgba[to + 2] = colours[level(at + blue)];
    if (hasAlpha) rgba[to + 3] = alphas[level(at + 2 * channels - 2)];
    else rgba[to + 3] = key && isKey(line, at, key) ? 0 : 255;
    to += step;
  }
}

// Whether the pixel at `at` has the transparent colour.
const isKey = (line, at, key) => key.every((byte, i) => line[at + i] === byte);
