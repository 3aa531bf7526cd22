// Pillow's resize(size, BICUBIC), to the bit: the model was trained on its images, and canvas smooths otherwise.
//
//   out[x] = Σ_i w(x, i) in[i],   w(x, i) = cubic((i + 0.5 - c) / s) / Σ,   c = (x + 0.5) from / to,   s = max(from / to, 1)
//
// Wider than two pixels when it shrinks (s > 1), hence free of aliasing. Rows come first, then columns; between the two
// each value is rounded to 8 bits. Weights are fixed-point numbers of 22 fractional bits. Source: Pillow, Resample.c.

const BITS = 22;
const HALF = 1 << (BITS - 1);

/** Keys' cubic with a = -0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((2.5 - 0.5 * x) * x - 4) * x + 2;
  return 0;
}

/** For each of `to` outputs: its first input, and its weights, `size` places apart. */
export function weights(from, to) {
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

/** One line: `length` outputs of 3 channels, `step` apart in `from` and `stride` apart in `to`. */
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

/** RGBA rows of `width` pixels to RGB rows of `table.to` pixels. */
export function rows(rgba, width, count, table) {
  const out = new Uint8ClampedArray(count * table.to * 3);
  for (let y = 0; y < count; y++) line(rgba, y * width * 4, 4, out, y * table.to * 3, 3, table);
  return out;
}

/** RGB columns of any height to columns of `table.to` pixels. */
export function columns(rgb, width, table) {
  const out = new Uint8ClampedArray(table.to * width * 3);
  for (let x = 0; x < width; x++) line(rgb, x * 3, width * 3, out, x * 3, width * 3, table);
  return out;
}
