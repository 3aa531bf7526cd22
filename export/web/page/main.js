// The page: an image that is chosen, dropped or pasted goes to the worker, its answer into the list.

const $ = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

let site;
let loaded = 0;
let asked = 0; // questions to the worker; only the newest one's answer is shown
let shown = null; // the URL of the image in view

const worker = new Worker("worker.js", { type: "module" });
worker.onmessage = ({ data }) => hear(data);
worker.onerror = () => tell(new Error("The model's script did not start; a browser of 2023 or later is needed."));

$("hint").hidden = true;
start().catch(tell);

async function start() {
  const response = await fetch("site.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`site.json could not be loaded (the server says ${response.status}).`);
  site = await response.json();
  describe();
  listen();
  $("loading").hidden = false;
  worker.postMessage({ site });
  const beside = new URLSearchParams(location.search).get("image");
  if (beside) await choose(await fetched(beside));
}

function describe() {
  const { model, runtime, tasks } = site;
  document.title = $("title").textContent = site.title;
  $("about").textContent = `${model.name}, ${megabytes(model.file.bytes)}, ${model.variant}`;
  $("runtime").textContent = `ONNX Runtime Web ${runtime.version}, © Microsoft, MIT license.`;
  if (!window.isSecureContext)
    $("runtime").textContent += " Checksums were not compared: the browser does so on https and on localhost only.";
  $("task").replaceChildren(...tasks.map((task, i) => new Option(task.name, i)));
  $("chooser").hidden = tasks.length < 2;
  clear();
}

function listen() {
  $("file").addEventListener("change", () => {
    take($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  });
  $("task").addEventListener("change", () => (shown ? ask() : show([])));
  document.addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files));
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // the browser would leave the page for the image
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files);
    });
}

function take(files) {
  if (files.length === 1) return choose(files[0]).catch(tell);
  tell(new Error(files.length ? `${files.length} files at once: one image, please.` : "What was dropped is no file."));
}

async function choose(file) {
  clear();
  const id = ++asked;
  const url = URL.createObjectURL(file);
  const wrong = complaint(file.name, await opened(url));
  if (wrong || id !== asked) URL.revokeObjectURL(url);
  if (id !== asked) return; // another one was chosen meanwhile
  if (wrong) throw new Error(wrong);
  shown = url;
  Object.assign($("preview"), { src: url, alt: file.name, hidden: false });
  ask(file);
}

/** An image whose size is known and whose pixels nobody has decoded yet; null for what is no image. */
function opened(url) {
  const image = new Image();
  return new Promise((done) => {
    image.onload = () => done(image);
    image.onerror = () => done(null);
    image.src = url;
  });
}

function complaint(name, image) {
  if (!image) return `${name} is not an image that this browser reads.`;
  const { naturalWidth: width, naturalHeight: height } = image;
  const limit = site.max_pixels;
  if (!(width * height)) return `${name} has no pixels.`;
  if (width * height <= limit) return null;
  return `${name} is too large: ${width} × ${height}, and ${limit.toLocaleString("en")} pixels are the limit.`;
}

function ask(file) {
  tell(null);
  $("status").textContent = $("loading").hidden ? "Classifying …" : "Waiting for the model …";
  worker.postMessage({ id: ++asked, task: Number($("task").value), file });
}

function clear() {
  tell(null);
  if (shown) URL.revokeObjectURL(shown);
  shown = null;
  $("preview").hidden = true;
  $("preview").removeAttribute("src");
  $("status").textContent = "No image yet.";
  show([]);
}

function show(top) {
  $("heading").textContent = `Most probable${site.tasks.length > 1 ? `: ${site.tasks[$("task").value].name}` : ""}`;
  $("results").replaceChildren(...top.map(row));
}

function row({ label, probability }) {
  const item = document.createElement("li");
  const name = Object.assign(document.createElement("span"), { className: "label", textContent: label });
  const value = Object.assign(document.createElement("data"), { textContent: percent.format(probability) });
  value.value = probability;
  const track = Object.assign(document.createElement("span"), { className: "track" });
  const bar = Object.assign(document.createElement("span"), { className: "bar" });
  track.setAttribute("aria-hidden", "true");
  track.append(bar);
  item.append(name, " ", value, track);
  requestAnimationFrame(() => (bar.style.width = `${100 * probability}%`));
  return item;
}

function tell(error) {
  $("error").textContent = error ? error.message : "";
}

/** ?image=photo.jpg: a file of this site; the page may load no others. */
async function fetched(path) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) throw new Error(`${path} could not be loaded; ?image= takes a file beside this page.`);
  return new File([await response.blob()], path);
}

function hear(message) {
  if (message.loaded) advance(message.loaded);
  else if (message.ready) $("loading").hidden = true;
  else if (message.id === undefined) fail(message); // the model did not load
  else if (message.id === asked) (message.error ? fail : answer)(message);
}

function advance(bytes) {
  const { model, runtime, tasks } = site;
  const total = model.file.bytes + runtime.wasm.bytes + (tasks[0].slots?.bytes ?? 0);
  loaded += bytes;
  $("progress").value = loaded / total;
  $("loaded").textContent = loaded < total ? `${megabytes(loaded)} of ${megabytes(total)}` : "Starting …";
}

function answer({ top, preparing, running }) {
  show(top);
  const best = document.createElement("span"); // the list says it to those who see it
  best.className = "unseen";
  best.textContent = `${top[0].label}, ${percent.format(top[0].probability)}. `;
  $("status").replaceChildren(best, `Prepared in ${Math.round(preparing)} ms, classified in ${Math.round(running)} ms.`);
}

function fail({ error }) {
  $("loading").hidden = true;
  clear();
  tell(new Error(error));
}
