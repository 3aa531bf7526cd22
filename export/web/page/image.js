// An image file as export/images.py reads it: upright, on white where it is transparent, without its colour profile;
// of an animated one the first frame. Then squashed as Pillow does.

import { columns, rows, weights } from "./resize.js";

const BAND = 256; // rows at a time: a canvas as large as a phone's photo may stay blank without an error

/** RGB bytes (height, width, 3) of a file. */
export async function read(file, height, width) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name} is not an image that this browser reads.`);
  }
  try {
    return squash(bitmap, height, width);
  } finally {
    bitmap.close();
  }
}

function squash(bitmap, height, width) {
  const across = weights(bitmap.width, width);
  const narrow = new Uint8ClampedArray(bitmap.height * width * 3);
  for (let y = 0; y < bitmap.height; y += BAND) {
    const count = Math.min(BAND, bitmap.height - y);
    narrow.set(rows(band(bitmap, y, count), bitmap.width, count, across), y * width * 3);
  }
  return columns(narrow, width, weights(bitmap.height, height));
}

function band(bitmap, y, count) {
  const canvas = new OffscreenCanvas(bitmap.width, count);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, count);
  context.drawImage(bitmap, 0, -y);
  return context.getImageData(0, 0, bitmap.width, count).data;
}

/** The graph's input, (3, height, width): (x / 255 - mean) / std. */
export function normalize(rgb, mean, std) {
  const size = rgb.length / 3;
  const out = new Float32Array(rgb.length);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < size; i++) out[c * size + i] = (rgb[3 * i + c] / 255 - mean[c]) / std[c];
  return out;
}
