// The model, off the page's own thread, so that the page answers while it computes.
//
// Takes {site} once, then {id, task, file?}: the task's answer for that file, or for the last one again.
// Gives {loaded} bytes while it loads, {ready}, {id, top, preparing, running}, or {id, error}.

import * as ort from "./ort/ort.js";
import { download } from "./download.js";
import { normalize, read } from "./image.js";
import { tensors } from "./safetensors.js";

const TOP = 5;

let site, session, ready, image, preparing;
let newest; // of the questions asked; older ones that still wait are dropped
const slots = new Map(); // task -> promise of what it puts into the graph's slots

let waiting = Promise.resolve();
self.onmessage = ({ data }) => {
  newest = data.id;
  waiting = waiting.then(() => answer(data)).catch((error) => postMessage({ id: data.id, error: error.message }));
};

async function answer({ id, site: opened, task, file }) {
  if (opened) {
    site = opened;
    ready = load();
    await ready;
    postMessage({ ready: true });
    return;
  }
  await ready; // a model that did not load says so to every question
  if (file) await prepare(file); // even where a newer question waits: it may be about this file
  if (id === newest) postMessage({ id, preparing, ...(await classify(task)) });
}

const progress = (bytes) => postMessage({ loaded: bytes });

async function load() {
  ort.env.wasm.numThreads = 1; // more would need headers that http.server does not send
  ort.env.wasm.wasmBinary = await download(site.runtime.wasm, progress);
  ort.env.logLevel = "error";
  const model = await download(site.model.file, progress);
  await filled(site.tasks[0]);
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  await logits(new Float32Array(3 * site.height * site.width), site.tasks[0]); // the first run is slow
}

async function prepare(file) {
  image = undefined;
  const start = performance.now();
  image = normalize(await read(file, site.height, site.width), site.mean, site.std);
  preparing = performance.now() - start;
}

async function classify(number) {
  const task = site.tasks[number];
  await filled(task);
  const start = performance.now();
  const scores = softmax(await logits(image, task));
  const running = performance.now() - start;
  const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a]);
  return { running, top: order.slice(0, TOP).map((k) => ({ label: task.labels[k], probability: scores[k] })) };
}

async function logits(input, task) {
  const feeds = { ...(await filled(task)), pixel_values: new ort.Tensor("float32", input, [1, 3, site.height, site.width]) };
  return (await session.run(feeds, ["logits"])).logits.data;
}

function filled(task) {
  if (!slots.has(task.name)) {
    const loading = task.slots ? download(task.slots, progress).then(inputs) : Promise.resolve({});
    loading.catch(() => slots.delete(task.name)); // the next switch tries again
    slots.set(task.name, loading);
  }
  return slots.get(task.name);
}

function inputs(bytes) {
  const entries = Object.entries(tensors(bytes));
  return Object.fromEntries(entries.map(([name, { shape, data }]) => [name, new ort.Tensor("float32", data, shape)]));
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (x) => Math.exp(x - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}
