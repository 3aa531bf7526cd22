// The tensors of a safetensors file: 8 bytes of length, a JSON header of that length, the values.

/** {name: {shape, data: Float32Array}} of a file's bytes; float32 alone is in a site. */
export function tensors(bytes) {
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const found = {};
  for (const [name, { dtype, shape, data_offsets: range }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F32") throw new Error(`${name} is of type ${dtype}, not F32`);
    const values = bytes.slice(8 + length + range[0], 8 + length + range[1]); // a copy starts at a multiple of 4
    found[name] = { shape, data: new Float32Array(values.buffer) };
  }
  return found;
}
