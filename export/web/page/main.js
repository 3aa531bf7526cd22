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
  $("runtime").textContent = `Made by capavision. ONNX Runtime Web ${runtime.version}, © Microsoft, MIT license.`;
  if (!window.isSecureContext)
    $("runtime").textContent += " Checksums were not compared: the browser does so on https and on localhost only.";
  $("task").replaceChildren(...tasks.map((task, i) => new Option(task.name, i)));
  $("chooser").hidden = tasks.length < 2;
  show([]);
}

function listen() {
  $("file").addEventListener("change", () => {
    take($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  });
  $("task").addEventListener("change", () => shown && ask());
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

/** Look at the image's size before anything decodes it; then show it and ask. */
async function choose(file) {
  clear();
  const id = ++asked;
  const { name } = file;
  const url = URL.createObjectURL(file);
  const probe = new Image();
  const known = await new Promise((done) => {
    probe.onload = () => done(true);
    probe.onerror = () => done(false);
    probe.src = url;
  });
  if (id !== asked) return URL.revokeObjectURL(url); // another one was chosen meanwhile
  const { naturalWidth: width, naturalHeight: height } = probe;
  const wrong = !known
    ? `${name} is not an image that this browser reads.`
    : !(width * height)
      ? `${name} has no pixels.`
      : width * height > site.max_pixels
        ? `${name} is too large: ${width} × ${height}, and ${site.max_pixels.toLocaleString("en")} pixels are the limit.`
        : null;
  if (wrong) {
    URL.revokeObjectURL(url);
    throw new Error(wrong);
  }
  shown = url;
  $("preview").src = url;
  $("preview").alt = name;
  $("preview").hidden = false;
  ask(file);
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
  $("status").textContent = "";
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
  if (error) $("status").textContent = "";
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
  else if (message.id === undefined) fail(message.error); // the model did not load
  else if (message.id === asked) message.error ? fail(message.error) : answer(message);
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
  const best = `${top[0].label}, ${percent.format(top[0].probability)}.`;
  $("status").textContent = `${best} Prepared in ${Math.round(preparing)} ms, classified in ${Math.round(running)} ms.`;
}

function fail(sentence) {
  $("loading").hidden = true;
  clear();
  tell(new Error(sentence));
}
