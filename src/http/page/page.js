// The web page: a form, a stream of events, and a history stored in this browser. It uses the native
// API at v1/invocations, which takes an API key, and models/NAME for other models than the first.
// Models, samplers and limits come from /info and /v1/models.

const $ = id => document.getElementById(id);
const form = $("form");
/** Maximum number of images in the history; the oldest is deleted first. */
const MAX_HISTORY = 300;
const CHOICES = ["model", "prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "scheduler", "schedule", "n"];

let limits = {};
/** The model that the server was started with; null if all are selected by name. */
let first = null;
/** The input image: { blob, mask }; the mask is a canvas, white in the area to inpaint. */
let input = null;
/** The record that is shown with its parameters, and all records of the same request. */
let shown = null;
let group = [];
const empty = $("empty");
/** The AbortController of the request in flight. */
let running = null;

// ---- the server

const key = () => localStorage.getItem("key");

async function call(path, { quiet, ...options } = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401 && !quiet) $("key-dialog").showModal();
  throw new Error(error?.message ?? `the server responded with ${response.status}`);
}

/** Yields [name, data] of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const field = name => part.split("\n").find(line => line.startsWith(`${name}:`))?.slice(name.length + 1).trim();
      if (field("data")) yield [field("event"), JSON.parse(field("data"))];
    }
  }
}

async function connect() {
  try {
    const info = await (await fetch("info")).json();
    limits = info.limits;
    if (info.phase === "ready") return await setUp(info);
    $("model").textContent = info.phase === "loading" ? "loading the model…" : `server ${info.phase}`;
  } catch {
    $("model").textContent = "the server does not respond";
  }
  setTimeout(connect, 1500);
}

/** Fills the form with the model's defaults, then with the last choices. Blank fields take the
 * model's defaults on the server. */
async function setUp({ model, schedulers, schedules }) {
  first = model?.name ?? null;
  $("model").textContent = model ? `${first} · ${model.device} · ${model.dtype}` : "select a model";
  const none = model ? [] : [new Option("model default", "")];
  const options = (list) => [...none.map((option) => option.cloneNode(true)), ...list.map(({ name, title }) => new Option(title, name))];
  $("sampler").replaceChildren(...options(schedulers));
  $("schedule").replaceChildren(...options(schedules));
  $("width").placeholder = $("height").placeholder = model ? "" : "default";
  $("steps").max = limits.max_steps;
  $("count").max = limits.max_images;
  const { num_inference_steps: steps = 50, guidance_scale = 7.5, ...rest } = model?.defaults ?? {};
  put({ ...rest, steps, guidance_scale });
  await listModels();
  const last = JSON.parse(localStorage.getItem("choices") ?? "null");
  if ([...$("which").options].some(({ value }) => value === last?.model)) put(last);
}

/** Lists the available models. */
async function listModels() {
  let names = first === null ? [] : [first];
  try {
    const response = await call("v1/models", { quiet: first !== null });
    names = (await response.json()).data.map(({ id }) => id);
    if (!names.length) $("model").textContent = "no models available";
  } catch (error) {
    if (first === null) fail(error.message);
  }
  const chosen = $("which").value;
  $("which").replaceChildren(...names.map(name => new Option(name)));
  $("models").hidden = names.length < 2 && first !== null;
  put({ model: chosen });
}

// ---- the form

/** Sets the form fields of these names. */
function put(values) {
  for (const name of CHOICES) {
    const field = form.elements[name];
    const known = !field.options || [...field.options].some(({ value }) => value === values[name]);
    if (values[name] !== undefined && known) field.value = values[name];
  }
  showSliders();
}

/** Shows the values of the sliders. */
function showSliders() {
  for (const output of document.querySelectorAll("output")) output.value = $(output.htmlFor.value).value;
}

function choices() {
  const values = {};
  for (const name of CHOICES) {
    const { value, type } = form.elements[name];
    values[name] = value !== "" && ["number", "range"].includes(type) ? Number(value) : value;
  }
  return values;
}

const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);
const locked = () => $("lock").getAttribute("aria-pressed") === "true";

const setLock = on => $("lock").setAttribute("aria-pressed", on);

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

async function generate() {
  if (running) return;
  if (!locked()) $("seed").value = randomSeed();
  const request = choices();
  localStorage.setItem("choices", JSON.stringify(request));
  if ($("seed").value !== "") request.seed = $("seed").value;
  // A seed has 64 bits, more than a JavaScript number: its digits go into the JSON text unchanged.
  const seed = /^\d+$/.test(request.seed ?? "") ? BigInt(request.seed) : null;
  const body = { ...request, stream: true, preview: true, output_format: "png" };
  const blank = ([name, value]) => value === "" && name !== "prompt";
  for (const [name] of Object.entries(request).filter(blank)) delete body[name];
  delete body.seed;
  delete body.model;
  const named = request.model && request.model !== first;
  const path = named ? `models/${request.model.split("/").map(encodeURIComponent).join("/")}` : "v1/invocations";
  running = new AbortController();
  setRunning(true);
  try {
    if (input) {
      body.image = await base64(input.blob);
      body.strength = Number($("strength").value);
      if (input.mask) body.mask = await base64(await new Promise(done => input.mask.toBlob(done)));
    }
    const text = JSON.stringify(body).replace(/}$/, seed === null ? "}" : `,"seed":${seed}}`);
    const response = await call(path, {
      method: "POST", body: text, signal: running.signal,
      headers: { "content-type": "application/json" },
    });
    for await (const [name, data] of events(response)) await handle(name, data, request);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    running = null;
    setRunning(false);
  }
}

async function handle(name, data, request) {
  if (name === "queued") showProgress(0, data.position > 1 ? ahead(data.position - 1) : "starting", data.seconds_left);
  if (name === "step") showProgress(data.step / data.steps, `step ${data.step} of ${data.steps}`, data.seconds_left);
  if (name === "preview") showPreview(data);
  if (name === "error") throw new Error(data.error.message);
  if (name === "result") await save(data, request);
}

const ahead = count => `${count} image${count === 1 ? "" : "s"} ahead`;

function setRunning(on) {
  $("draw").disabled = on;
  $("cancel").hidden = $("progress").hidden = !on;
  if (on) {
    $("error").hidden = $("caption").hidden = true;
    showProgress(0, "request sent");
    if (matchMedia("(max-width: 46rem)").matches) $("stage").scrollIntoView({ block: "nearest" });
  } else if (shown) {
    show(shown, group);
  } else {
    $("views").replaceChildren(empty);
  }
}

function showProgress(share, text, left) {
  $("bar").value = share;
  $("told").textContent = left == null ? text : `${text}, ${left < 1 ? "less than a second" : `about ${Math.round(left)} s`} left`;
}

function fail(message) {
  $("error").textContent = message[0].toUpperCase() + message.slice(1);
  $("error").hidden = false;
}

// ---- the current images

/** Shows a live preview; a request may have several. */
function showPreview({ index, content_type, data }) {
  const views = $("views");
  if (!views.querySelector(".forming")) views.replaceChildren();
  let image = views.querySelector(`[data-index="${index}"]`);
  if (!image) {
    image = new Image();
    image.alt = "Live preview";
    image.className = "forming small";
    image.dataset.index = index;
    views.append(image);
  }
  image.src = `data:${content_type};base64,${data}`;
}

function show(record, others = [record]) {
  [shown, group] = [record, others];
  $("views").replaceChildren(...group.map(one => {
    const image = new Image();
    image.alt = one.prompt || "Image without a prompt";
    image.src = objectUrl(one);
    image.className = one.width < 448 ? "small" : "";
    image.onclick = () => running || show(one);
    return image;
  }));
  const { width, height, steps, guidance_scale, scheduler, schedule, seed, negative_prompt } = record;
  const negative = negative_prompt ? ` — negative: ${negative_prompt}` : "";
  const parts = [`${record.prompt}${negative}`, `${width}×${height}`, `${steps} steps`, `guidance ${guidance_scale}`, scheduler, schedule === "model" ? "" : schedule, `seed ${seed}`];
  if (record.model && record.model !== first) parts.splice(1, 0, record.model);
  $("parameters").textContent = parts.filter(Boolean).join(" · ");
  $("download").href = objectUrl(record);
  $("download").download = `${seed}.png`;
  $("caption").hidden = false;
  for (const button of $("history").querySelectorAll("button")) {
    button.setAttribute("aria-current", button.dataset.id === String(record.id));
  }
}

/** The object URL of a record's file, created once. */
function objectUrl(record) {
  record.url ??= URL.createObjectURL(record.blob);
  return record.url;
}

// ---- the history

const database = new Promise((done, failed) => {
  const request = indexedDB.open("sd-server", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});
database.catch(() => fail("this browser stores no images for this page; they are lost when it is closed"));

async function store(mode, act) {
  const request = act((await database).transaction("pictures", mode).objectStore("pictures"));
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

/** Shows the images of a result and adds them to the history. */
async function save(result, request) {
  const images = result.images ?? [result];
  const records = [];
  for (const [place, { data, seed }] of images.entries()) {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    // JSON.parse rounds a long seed; the requested one counts up by image.
    const exact = request.seed ? String(BigInt.asUintN(64, BigInt(request.seed) + BigInt(place))) : String(seed);
    const blob = new Blob([bytes], { type: result.content_type });
    const { width, height } = await createImageBitmap(blob);
    const record = { ...request, width, height, seed: exact, blob };
    try {
      record.id = await store("readwrite", images => images.add(record));
    } catch {
      record.id = `unsaved ${performance.now()}`;
    }
    list(record);
    records.push(record);
  }
  show(records[0], records);
  if (result.warnings?.length) fail(result.warnings.join("; "));
  const surplus = [...$("history").children].slice(MAX_HISTORY);
  for (const item of surplus) await remove(item.record);
}

function list(record) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = new Image();
  image.src = objectUrl(record);
  image.alt = record.prompt || "Image without a prompt";
  image.loading = "lazy";
  button.type = "button";
  button.dataset.id = record.id;
  button.append(image);
  button.onclick = () => running || show(record);
  item.record = record;
  item.append(button);
  $("history").prepend(item);
}

async function remove(record) {
  await store("readwrite", images => images.delete(record.id)).catch(() => {});
  const item = [...$("history").children].find(item => item.record === record);
  const next = (item?.nextSibling ?? item?.previousSibling)?.record;
  item?.remove();
  URL.revokeObjectURL(record.url);
  if (shown !== record) return;
  shown = null;
  if (next) return show(next);
  $("caption").hidden = true;
  $("views").replaceChildren(empty);
}

// ---- the input image and its mask

async function setInput(blob) {
  if (!blob?.type.startsWith("image/")) return fail("that file is not an image");
  const image = await createImageBitmap(blob).catch(() => null);
  if (!image) return fail("this browser cannot read that image");
  input = { blob, mask: null, width: image.width, height: image.height };
  // The area of the current size in the image's aspect ratio, in multiples of 8.
  const area = Math.min(Number($("width").value) * Number($("height").value), limits.max_pixels ?? 1 << 20);
  const scale = Math.sqrt(area / (image.width * image.height));
  const side = length => Math.max(8, Math.floor(length * scale / 8) * 8);
  // Without a current size, the server uses the image's own.
  if (area) put({ width: side(image.width), height: side(image.height) });
  URL.revokeObjectURL($("start-picture").src);
  $("start-picture").src = URL.createObjectURL(blob);
  $("drop").hidden = true;
  $("chosen").hidden = false;
  $("paint").textContent = "Inpaint";
}

function editMask() {
  const canvas = $("mask");
  const scale = Math.min(1, 1024 / Math.max(input.width, input.height));
  canvas.width = Math.max(1, Math.round(input.width * scale));
  canvas.height = Math.max(1, Math.round(input.height * scale));
  $("under").src = $("start-picture").src;
  if (input.strokes) canvas.getContext("2d").drawImage(input.strokes, 0, 0);
  $("mask-dialog").showModal();
}

/** Turns the strokes into a mask, white on black; without strokes there is no mask. */
function applyMask() {
  const canvas = $("mask");
  const context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const painted = pixels.data.some((value, i) => i % 4 === 3 && value > 127);
  const copy = () => Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  input.strokes = copy();
  input.strokes.getContext("2d").drawImage(canvas, 0, 0);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  input.mask = painted ? copy() : null;
  input.mask?.getContext("2d").putImageData(pixels, 0, 0);
  $("paint").textContent = painted ? "Edit mask" : "Inpaint";
}

{
  const canvas = $("mask");
  let last = null;
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * canvas.width, (event.clientY - box.top) / box.height * canvas.height];
  };
  const stroke = event => {
    const context = canvas.getContext("2d");
    const [x, y] = place(event);
    context.globalCompositeOperation = $("rub").getAttribute("aria-pressed") === "true" ? "destination-out" : "source-over";
    context.strokeStyle = "#e2483d";
    context.lineCap = "round";
    context.lineWidth = Number($("brush").value) / 100 * Math.max(canvas.width, canvas.height);
    context.beginPath();
    context.moveTo(...last);
    // A tap draws a dot; a line of length zero would draw nothing.
    context.lineTo(x, y + 0.01);
    context.stroke();
    last = [x, y];
  };
  canvas.onpointerdown = event => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(event);
  };
  canvas.onpointermove = event => last && stroke(event);
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; };
}

// ---- event handlers

form.oninput = showSliders;
form.onsubmit = event => { event.preventDefault(); generate(); };
$("cancel").onclick = () => running?.abort();
$("dice").onclick = () => { $("seed").value = randomSeed(); setLock(true); };
$("lock").onclick = () => setLock(!locked());
$("seed").oninput = () => setLock($("seed").value !== "");
$("swap").onclick = () => put({ width: $("height").value, height: $("width").value });
$("choose").onclick = () => $("file").click();
$("file").onchange = () => { setInput($("file").files[0]); $("file").value = ""; };
$("remove").onclick = () => { input = null; $("drop").hidden = false; $("chosen").hidden = true; };
$("paint").onclick = editMask;
$("mask-dialog").onclose = applyMask;
$("rub").onclick = () => $("rub").setAttribute("aria-pressed", $("rub").getAttribute("aria-pressed") !== "true");
$("wipe").onclick = () => $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height);
$("reuse").onclick = () => { put({ ...shown, n: 1 }); $("seed").value = shown.seed; setLock(true); $("prompt").focus(); };
$("begin").onclick = () => setInput(shown.blob);
$("delete").onclick = () => remove(shown);
$("open-key").onclick = () => $("key-dialog").showModal();
$("key-dialog").onclose = () => {
  if ($("key-dialog").returnValue !== "save") return;
  if ($("key").value) localStorage.setItem("key", $("key").value); else localStorage.removeItem("key");
  $("key").value = "";
  $("error").hidden = true;
  listModels();
};
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
});
document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(file => file.type.startsWith("image/"));
  if (file) setInput(file);
});
document.addEventListener("dragover", event => { event.preventDefault(); $("start").classList.add("over"); });
document.addEventListener("dragleave", () => $("start").classList.remove("over"));
document.addEventListener("drop", event => {
  event.preventDefault();
  $("start").classList.remove("over");
  if (event.dataTransfer.files[0]) setInput(event.dataTransfer.files[0]);
});

connect();
for (const record of await store("readonly", images => images.getAll()).catch(() => [])) list(record);
