// An image file as export/images.py reads it: upright, on white where it is transparent, without its colour profile;
// of an animated one the first frame. Then squashed as Pillow does.

import { resize } from "./resize.js";

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
    return resize(pixels(bitmap), bitmap.width, bitmap.height, width, height);
  } finally {
    bitmap.close();
  }
}

/** RGBA bytes of a bitmap, opaque. */
function pixels(bitmap) {
  const { width, height } = bitmap;
  const all = new Uint8ClampedArray(4 * width * height);
  const canvas = new OffscreenCanvas(width, Math.min(height, BAND));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  for (let y = 0; y < height; y += BAND) {
    context.fillRect(0, 0, width, canvas.height);
    context.drawImage(bitmap, 0, -y);
    const { data } = context.getImageData(0, 0, width, Math.min(height - y, BAND));
    all.set(data, 4 * y * width);
  }
  return all;
}

/** The graph's input, (3, height, width): (x / 255 - mean) / std. */
export function normalize(rgb, mean, std) {
  const size = rgb.length / 3;
  const out = new Float32Array(rgb.length);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < size; i++) out[c * size + i] = (rgb[3 * i + c] / 255 - mean[c]) / std[c];
  return out;
}
