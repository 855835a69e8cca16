// Decodes an image file to the pixels that step3_infer.py sees. exif.js reads which way up it is,
// png.js decodes what a browser's own decoder would reduce, spec.js has the Problem.
"use strict";

// Pixels read from a canvas at once: phones limit the size of a canvas, not of an image.
const TILE = 512;
const MAX_SIDE = 65_535; // pixels, as in step3_infer.py
const MAX_PIXELS = 178_956_970;

const USUAL = ["PNG", "JPEG", "GIF", "BMP", "WebP"]; // which all browsers decode

// The formats that files are known by: [where, the first characters, the name].
const SIGNATURES = [
  [0, "\x89PNG", "PNG"],
  [0, "\xff\xd8", "JPEG"],
  [0, "GIF8", "GIF"],
  [0, "BM", "BMP"],
  [8, "WEBP", "WebP"],
  [4, "ftypavi", "AVIF"],
  [4, "ftyp", "HEIF"],
  [0, "II*\0", "TIFF"],
  [0, "MM\0*", "TIFF"],
  [0, "II+\0", "TIFF"],
  [0, "MM\0+", "TIFF"],
  [4, "jP  ", "JPEG 2000"],
  [0, "\xff\x4f\xff\x51", "JPEG 2000"],
  [0, "qoif", "QOI"],
  [0, "DDS ", "DDS"],
  [0, "\x01\xda", "SGI"],
  [0, "\0\0\x01\0", "ICO"],
  [0, "(\0\0\0", "DIB"],
];

// The name of an image file's format by its first bytes, or null.
function formatOf(bytes) {
  for (const [at, text, name] of SIGNATURES) {
    if (startsWith(bytes, text, at)) return name;
  }
  const start = String.fromCharCode(...bytes.subarray(0, 3));
  if (/^P[1-7]\s/.test(start)) return "PNM";
  if (/^\n[\0-\x05]\x01/.test(start)) return "PCX";
  const end = "TRUEVISION-XFILE.\0"; // the start of a TGA may be anything
  return startsWith(bytes, end, bytes.length - end.length) ? "TGA" : null;
}

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

// An image file, and the spec's `white` -> {bitmap (to be closed), orientation (in which the bitmap
// is stored), rgba (its bytes, or null if the bitmap has them)}. Throws Problem.
async function decode(file, white) {
  if (file.size === 0) throw new Problem("empty file");
  const bytes = new Uint8Array(await file.arrayBuffer());
  const format = formatOf(bytes);
  // Some browsers read it, but not how many bits it has, or whether 0 is white.
  if (format === "TIFF") throw undecodable(format);
  await checkFile(file);

  if (format === "BMP") forgetEmptyAlpha(bytes);
  const { orientation, rest } = takeOrientation(bytes, format);
  if (!isWidePng(bytes, format)) {
    return { bitmap: await decodeByBrowser(rest, format), orientation, rgba: null };
  }

  const [width, height] = sizeOfPng(bytes);
  checkSize(width, height);
  const rgba = await decodeWidePng(bytes, white);
  const bitmap = await createImageBitmap(new ImageData(rgba, width, height));
  return { bitmap, orientation, rgba };
}

// Take the alpha out of the header of a BMP of 32 bits a pixel if it is 0 everywhere: the program
// that wrote it left it unused, and the picture is meant to be seen.
function forgetEmptyAlpha(bytes) {
  const masks = 54 + 16; // the bytes of a header that has them
  if (bytes.length < masks) return;

  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const hasMasks = view.getUint16(28, true) === 32 && view.getUint32(30, true) === 3;
  if (!hasMasks || view.getUint32(66, true) !== 0xff000000) return;

  for (let at = view.getUint32(10, true) + 3; at < bytes.length; at += 4) {
    if (bytes[at] > 0) return;
  }
  view.setUint32(66, 0, true);
}

function undecodable(format) {
  if (!format) return new Problem("not an image that this browser can decode");
  if (USUAL.includes(format)) {
    return new Problem(`a damaged ${format} file, or one that this browser cannot decode`);
  }
  const reason = "which this page cannot decode: save it as PNG";
  return new Problem(`a file in the format ${format}, ${reason}`);
}

// An image file -> ImageBitmap, colours as stored. Throws Problem.
async function decodeByBrowser(file, format) {
  const asStored = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const older = (error) => (error instanceof TypeError ? createImageBitmap(file) : null);
  const bitmap = await createImageBitmap(file, asStored)
    .catch(older) // a browser that does not know the options
    .catch(() => null);
  if (!bitmap) throw undecodable(format);

  try {
    checkSize(bitmap.width, bitmap.height); // an <img> believes the EXIF block, which may lie
  } catch (error) {
    bitmap.close();
    throw error;
  }
  return bitmap;
}

// Copy the RGBA bytes from..end to pixels `step` apart, the first of which is number `to`. ground:
// the grey level under transparent pixels, or null to drop their alpha; 1 channel is Pillow's
// convert("L"). Returns whether all of them are opaque.
function pack(rgba, from, end, { pixels, to, step, channels, ground }) {
  const over = (colour, alpha) => {
    if (ground === null || alpha === 255) return colour;
    return Math.floor((colour * alpha + ground * (255 - alpha) + 127) / 255);
  };

  let opaque = 255;
  let place = to * channels;
  for (let at = from; at < end; at += 4) {
    const alpha = rgba[at + 3];
    const red = over(rgba[at], alpha);
    const green = over(rgba[at + 1], alpha);
    const blue = over(rgba[at + 2], alpha);
    opaque &= alpha;
    if (channels === 1) {
      pixels[place] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16;
    } else {
      pixels[place] = red;
      pixels[place + 1] = green;
      pixels[place + 2] = blue;
    }
    place += step * channels;
  }
  return opaque === 255;
}

// A decoded image -> {pixels: uint8 [height x width x channels] of the upright image, transparent:
// whether some are, exact: whether all colours are as stored}. ground: the spec's, "white", "black"
// or null.
function readPixels({ bitmap, orientation, rgba }, channels, ground) {
  const { width, height } = bitmap;
  const place = placement(orientation, width, height);
  const pixels = new Uint8Array(width * height * channels);
  const level = { white: 255, black: 0 }[ground] ?? null;
  const target = { pixels, step: place.across, channels, ground: level };
  const whole = { left: 0, top: 0, width, height };

  if (rgba) {
    const opaque = packRows(rgba, whole, place, target);
    return { pixels, transparent: !opaque, exact: true };
  }

  const opaque = packTiles(bitmap, place, { ...target, ground: null });
  if (opaque) return { pixels, transparent: false, exact: true };
  if (ground) {
    packTiles(bitmap, place, target);
    return { pixels, transparent: true, exact: true };
  }

  const stored = readUnderAlpha(bitmap);
  if (stored) packRows(stored, whole, place, target);
  return { pixels, transparent: true, exact: stored !== null };
}

// pack() for the rows of a part of an image. Returns whether all pixels are opaque.
function packRows(rgba, { left, top, width, height }, place, target) {
  let opaque = true;
  for (let row = 0; row < height; row++) {
    const to = place.first + (top + row) * place.down + left * place.across;
    opaque = pack(rgba, row * width * 4, (row + 1) * width * 4, { ...target, to }) && opaque;
  }
  return opaque;
}

// packRows() for an ImageBitmap, by way of a canvas. With a ground, the canvas composites, so that
// all pixels are opaque.
function packTiles(bitmap, place, target) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(bitmap.width, TILE);
  canvas.height = Math.min(bitmap.height, TILE);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const { ground } = target;
  context.fillStyle = ground === null ? "transparent" : `rgb(${ground} ${ground} ${ground})`;

  let opaque = true;
  for (let top = 0; top < bitmap.height; top += TILE) {
    for (let left = 0; left < bitmap.width; left += TILE) {
      const width = Math.min(TILE, bitmap.width - left);
      const height = Math.min(TILE, bitmap.height - top);
      context.clearRect(0, 0, width, height);
      context.fillRect(0, 0, width, height);
      context.drawImage(bitmap, left, top, width, height, 0, 0, width, height);
      const { data } = context.getImageData(0, 0, width, height);
      opaque = packRows(data, { left, top, width, height }, place, target) && opaque;
    }
  }
  return opaque;
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
