// Reads the EXIF orientation of an image file by its tag alone, as step3_infer.py does. The page
// does not leave this to the browser: each has rules of its own for a header that is written twice
// and for other tags that are damaged.
"use strict";

const UPRIGHT = 1; // of EXIF's orientations, 1 to 8
const ORIENTATION = 0x0112;
// Bytes of EXIF's types of whole numbers, without a sign and with one.
const TYPE_SIZES = { 1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4 };
const EXIF_HEADER = "Exif\0\0";
const XMP_HEADER = "http://ns.adobe.com/xap/1.0/\0";
const XMP_KEYWORD = "XML:com.adobe.xmp\0\0"; // and that the text is not compressed

// Whether the bytes from `at` on are these characters.
function startsWith(bytes, text, at = 0) {
  for (let i = 0; i < text.length; i++) {
    if (bytes[at + i] !== text.charCodeAt(i)) return false;
  }
  return true;
}

// A whole number of `count` bytes at `at`, the highest first or the lowest first. Beyond the end
// there are zeros.
function wholeAt(bytes, at, count, lowestFirst = false) {
  let value = 0;
  for (let i = 0; i < count; i++) {
    value = value * 256 + (bytes[lowestFirst ? at + count - 1 - i : at + i] ?? 0);
  }
  return value;
}

// The parts of a file that hold EXIF or XMP: {kind, start, end, content, instead: what a file
// without them has there}.
function* metadataParts(bytes, format) {
  if (format === "JPEG") yield* metadataOfJpeg(bytes);
  if (format === "PNG") yield* metadataOfPng(bytes);
  if (format === "WebP") yield* metadataOfWebp(bytes);
}

function* metadataOfJpeg(bytes) {
  let at = 2; // marker, length, content; the pixels start at marker FFDA
  while (bytes[at] === 0xff && bytes[at + 1] !== 0xda) {
    if (bytes[at + 1] === 0xff) { // bytes between segments
      at += 1;
      continue;
    }

    const end = at + 2 + wholeAt(bytes, at + 2, 2);
    for (const [kind, header] of [["exif", EXIF_HEADER], ["xmp", XMP_HEADER]]) {
      const from = at + 4 + header.length;
      const isWanted = bytes[at + 1] === 0xe1 && startsWith(bytes, header, at + 4);
      if (isWanted && from <= end) {
        yield { kind, start: at, end, content: bytes.subarray(from, end), instead: "" };
      }
    }
    at = end;
  }
}

function* metadataOfPng(bytes) {
  let at = 8;
  while (at < bytes.length && !startsWith(bytes, "IEND", at + 4)) {
    const end = at + 12 + wholeAt(bytes, at, 4); // length, type, content, checksum
    for (const [kind, header] of [["exif", "eXIf"], ["xmp", `iTXt${XMP_KEYWORD}`]]) {
      if (startsWith(bytes, header, at + 4)) {
        const content = bytes.subarray(at + 4 + header.length, end - 4);
        yield { kind, start: at, end, content, instead: "" };
      }
    }
    at = end;
  }
}

function* metadataOfWebp(bytes) {
  let at = 12;
  while (at < bytes.length) {
    const size = wholeAt(bytes, at + 4, 4, true);
    const end = at + 8 + size + (size % 2); // type, length, content, which has an even length
    for (const [kind, type] of [["exif", "EXIF"], ["xmp", "XMP "]]) {
      if (startsWith(bytes, type, at)) { // it keeps its place: the file's header says its size
        const content = bytes.subarray(at + 8, end);
        yield { kind, start: at, end: at + 4, content, instead: "XXXX" };
      }
    }
    at = end;
  }
}

// A file's bytes -> {orientation: 1 (upright) to 8, by EXIF or else by XMP; rest: a Blob of the
// file without them}.
function takeOrientation(bytes, format) {
  const found = { exif: [], xmp: [] };
  const rest = [];
  let at = 0;
  for (const { kind, start, end, content, instead } of metadataParts(bytes, format)) {
    if (format !== "JPEG") found[kind].length = 0; // a JPEG splits large EXIF over several segments
    found[kind].push(content);
    rest.push(bytes.subarray(at, start), instead);
    at = end;
  }
  rest.push(bytes.subarray(at));

  const orientation = orientationInExif(joined(found.exif)) ?? orientationInXmp(joined(found.xmp));
  const isValid = orientation >= 1 && orientation <= 8;
  return { orientation: isValid ? orientation : UPRIGHT, rest: new Blob(rest) };
}

// Byte arrays one after the other.
function joined(parts) {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

// The orientation in EXIF, whatever it is, or null. Other tags may hold anything: some cameras and
// programs write types that no standard allows.
function orientationInExif(exif) {
  let start = 0;
  while (startsWith(exif, EXIF_HEADER, start)) start += EXIF_HEADER.length; // some write it twice

  const lowestFirst = startsWith(exif, "II", start);
  if (!lowestFirst && !startsWith(exif, "MM", start)) return null;

  const directory = start + wholeAt(exif, start + 4, 4, lowestFirst);
  const count = wholeAt(exif, directory, 2, lowestFirst);
  for (let i = 0; i < count; i++) {
    const entry = directory + 2 + 12 * i; // tag, type, count, value: 2, 2, 4 and 4 bytes
    const size = TYPE_SIZES[wholeAt(exif, entry + 2, 2, lowestFirst)];
    if (wholeAt(exif, entry, 2, lowestFirst) === ORIENTATION && size) {
      return wholeAt(exif, entry + 8, size, lowestFirst);
    }
  }
  return null;
}

// The orientation in XMP, which is XML, or null.
function orientationInXmp(xmp) {
  const match = /tiff:Orientation(?:="|>)([0-9])/.exec(new TextDecoder().decode(xmp));
  return match && Number(match[1]);
}

// Where the pixels of a stored image lie when it is upright: {width, height} of the upright image,
// and the number of its pixel for the stored one at the top left, for one row further down and for
// one column further right.
function placement(orientation, width, height) {
  const isTurned = orientation >= 5;
  const fromBelow = [3, 4, 6, 7].includes(orientation);
  const fromRight = [2, 3, 7, 8].includes(orientation);

  const [uprightWidth, uprightHeight] = isTurned ? [height, width] : [width, height];
  const row = isTurned ? 1 : uprightWidth;
  const column = isTurned ? uprightWidth : 1;
  const first = (fromBelow ? (height - 1) * row : 0) + (fromRight ? (width - 1) * column : 0);
  return {
    width: uprightWidth,
    height: uprightHeight,
    first,
    down: fromBelow ? -row : row,
    across: fromRight ? -column : column,
  };
}

// The same as a matrix [a, b, c, d, e, f] of a 2D canvas.
function turning(orientation, width, height) {
  const fromBelow = [3, 4, 6, 7].includes(orientation);
  const fromRight = [2, 3, 7, 8].includes(orientation);
  const down = fromBelow ? -1 : 1;
  const across = fromRight ? -1 : 1;
  const x = fromRight ? width : 0;
  const y = fromBelow ? height : 0;
  return orientation >= 5 ? [0, across, down, 0, y, x] : [across, 0, 0, down, x, y];
}
