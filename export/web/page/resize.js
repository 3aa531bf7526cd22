// Pillow's resize(size, BICUBIC), to the bit: the model was trained on its images, and canvas smooths otherwise.
//
//   out[x] = Σ_i w(x, i) in[i],   w(x, i) = cubic((i + 0.5 - c) / s) / Σ,   c = (x + 0.5) from / to,   s = max(from / to, 1)
//
// Wider than two pixels when it shrinks (s > 1), hence free of aliasing. Rows come first, then columns, unless much more
// is to go in height; between the two each value is rounded to 8 bits, so the order matters. Weights are fixed-point
// numbers of 22 fractional bits. Source: Pillow 13, Resample.c; older ones never begin with the columns.

const BITS = 22;
const HALF = 1 << (BITS - 1);

/** Keys' cubic with a = -0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((2.5 - 0.5 * x) * x - 4) * x + 2;
  return 0;
}

/** RGBA bytes (height, width, 4) to RGB bytes (toHeight, toWidth, 3). */
export function resize(rgba, width, height, toWidth, toHeight) {
  const across = weights(width, toWidth);
  const down = weights(height, toHeight);
  if (height > toHeight && height - toHeight > 2 * (width - toWidth))
    return rows(columns(rgba, 4, width, down), 3, width, toHeight, across);
  return columns(rows(rgba, 4, width, height, across), 3, toWidth, down);
}

/** For each of `to` outputs: its first input, and its weights, `size` places apart. */
function weights(from, to) {
  const scale = from / to;
  const wide = Math.max(scale, 1);
  const support = 2 * wide;
  const size = 2 * Math.ceil(support) + 1;
  const table = { to, size, first: new Int32Array(to), count: new Int32Array(to), taps: new Int32Array(to * size) };
  for (let x = 0; x < to; x++) {
    const center = (x + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const count = Math.min(Math.trunc(center + support + 0.5), from) - first;
    const taps = Array.from({ length: count }, (_, i) => cubic((i + first - center + 0.5) / wide));
    const sum = taps.reduce((a, b) => a + b, 0);
    table.first[x] = first;
    table.count[x] = count;
    taps.forEach((tap, i) => {
      const fixed = (tap / sum) * 2 ** BITS;
      table.taps[x * size + i] = Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    });
  }
  return table;
}

/** One line of pixels: `step` bytes apart in `from` from `start` on, `stride` apart in `to` from `at` on. */
function line(from, start, step, to, at, stride, table) {
  const { size, first, count, taps } = table;
  for (let x = 0; x < table.to; x++, at += stride) {
    let red = HALF, green = HALF, blue = HALF;
    let place = start + first[x] * step;
    const tap = x * size;
    for (let i = 0; i < count[x]; i++, place += step) {
      const weight = taps[tap + i];
      red += from[place] * weight;
      green += from[place + 1] * weight;
      blue += from[place + 2] * weight;
    }
    to[at] = red >> BITS; // a clamped array: below 0 is 0, above 255 is 255
    to[at + 1] = green >> BITS;
    to[at + 2] = blue >> BITS;
  }
}

/** Each of `height` rows, of `width` pixels of `step` bytes, to `table.to` RGB pixels. */
function rows(from, step, width, height, table) {
  const to = new Uint8ClampedArray(height * table.to * 3);
  for (let y = 0; y < height; y++) line(from, y * width * step, step, to, y * table.to * 3, 3, table);
  return to;
}

/** Each of `width` columns, of pixels of `step` bytes, to `table.to` RGB pixels. */
function columns(from, step, width, table) {
  const to = new Uint8ClampedArray(table.to * width * 3);
  for (let x = 0; x < width; x++) line(from, x * step, width * step, to, x * 3, width * 3, table);
  return to;
}
