// The page: a form, a stream of events, and a history that stays in this browser. It speaks the
// native dialect at v1/invocations, which takes an API key, and knows nothing that /info and /v1/models do not say. Another model than the first is at models/NAME.

const $ = id => document.getElementById(id);
const form = $("form");
/** The history's most pictures; the oldest goes first. */
const KEPT = 300;
const CHOICES = ["model", "prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "scheduler", "n"];

let limits = {};
/** The model that the server was started on; null where all are chosen by name. */
let first = null;
/** The picture to start from: { blob, mask }, the mask a canvas that is white where it changes. */
let start = null;
/** The record on the stage that is described, and those that came with it. */
let shown = null;
let group = [];
const empty = $("empty");
/** Ends the request under way. */
let drawing = null;

// ---- the server

const key = () => localStorage.getItem("key");

async function call(path, { quiet, ...options } = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  const { error } = await reply.json().catch(() => ({}));
  if (reply.status === 401 && !quiet) $("key-dialog").showModal();
  throw new Error(error?.message ?? `the server answered ${reply.status}`);
}

/** Yields [name, data] of each server-sent event. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
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

async function greet() {
  try {
    const info = await (await fetch("info")).json();
    limits = info.limits;
    if (info.phase === "ready") return await settle(info);
    $("model").textContent = info.phase === "loading" ? "the model is loading…" : `the server is ${info.phase}`;
  } catch {
    $("model").textContent = "the server does not answer";
  }
  setTimeout(greet, 1500);
}

/** Fills the form with what the model likes, and then with what was chosen last. What is left blank
 * is the model's own. */
async function settle({ model, schedulers }) {
  first = model?.name ?? null;
  $("model").textContent = model ? `${first} · ${model.device} · ${model.precision}` : "choose a model";
  const own = model ? [] : [new Option("the model's own", "")];
  $("sampler").replaceChildren(...own, ...schedulers.map(({ name, title }) => new Option(title, name)));
  $("width").placeholder = $("height").placeholder = model ? "" : "its own";
  $("steps").max = limits.max_steps;
  $("count").max = limits.max_images;
  const { num_inference_steps: steps = 50, guidance_scale = 7.5, ...rest } = model?.defaults ?? {};
  put({ ...rest, steps, guidance_scale });
  await offer();
  const last = JSON.parse(localStorage.getItem("choices") ?? "null");
  if ([...$("which").options].some(({ value }) => value === last?.model)) put(last);
}

/** Fills in which models there are. */
async function offer() {
  let names = first === null ? [] : [first];
  try {
    const reply = await call("v1/models", { quiet: first !== null });
    names = (await reply.json()).data.map(({ id }) => id);
    if (!names.length) $("model").textContent = "no model is here";
  } catch (error) {
    if (first === null) fail(error.message);
  }
  const chosen = $("which").value;
  $("which").replaceChildren(...names.map(name => new Option(name)));
  $("models").hidden = names.length < 2 && first !== null;
  put({ model: chosen });
}

// ---- the form

/** Puts values into the fields of the form that have their names. */
function put(values) {
  for (const name of CHOICES) {
    const field = form.elements[name];
    const known = !field.options || [...field.options].some(({ value }) => value === values[name]);
    if (values[name] !== undefined && known) field.value = values[name];
  }
  echo();
}

/** Shows the numbers of the sliders. */
function echo() {
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

const dice = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);
const locked = () => $("lock").getAttribute("aria-pressed") === "true";

const setLock = on => $("lock").setAttribute("aria-pressed", on);

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

async function draw() {
  if (drawing) return;
  if (!locked()) $("seed").value = dice();
  const asked = choices();
  localStorage.setItem("choices", JSON.stringify(asked));
  if ($("seed").value !== "") asked.seed = $("seed").value;
  // Seeds are of 64 bits, more than a number holds here: the digits go into the text as they are.
  const seed = /^\d+$/.test(asked.seed ?? "") ? BigInt(asked.seed) : null;
  const body = { ...asked, stream: true, preview: true, output_format: "png" };
  const blank = ([name, value]) => value === "" && name !== "prompt";
  for (const [name] of Object.entries(asked).filter(blank)) delete body[name];
  delete body.seed;
  delete body.model;
  const named = asked.model && asked.model !== first;
  const path = named ? `models/${asked.model.split("/").map(encodeURIComponent).join("/")}` : "v1/invocations";
  drawing = new AbortController();
  wait(true);
  try {
    if (start) {
      body.image = await base64(start.blob);
      body.strength = Number($("strength").value);
      if (start.mask) body.mask = await base64(await new Promise(done => start.mask.toBlob(done)));
    }
    const text = JSON.stringify(body).replace(/}$/, seed === null ? "}" : `,"seed":${seed}}`);
    const reply = await call(path, {
      method: "POST", body: text, signal: drawing.signal,
      headers: { "content-type": "application/json" },
    });
    for await (const [name, data] of events(reply)) await hear(name, data, asked);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    drawing = null;
    wait(false);
  }
}

async function hear(name, data, asked) {
  if (name === "queued") tell(0, data.position > 1 ? `${data.position - 1} ahead` : "about to begin", data.seconds_left);
  if (name === "step") tell(data.step / data.steps, `step ${data.step} of ${data.steps}`, data.seconds_left);
  if (name === "preview") look(data);
  if (name === "error") throw new Error(data.error.message);
  if (name === "result") await keep(data, asked);
}

function wait(on) {
  $("draw").disabled = on;
  $("cancel").hidden = $("progress").hidden = !on;
  if (on) {
    $("error").hidden = $("caption").hidden = true;
    tell(0, "sent");
    if (matchMedia("(max-width: 46rem)").matches) $("stage").scrollIntoView({ block: "nearest" });
  } else if (shown) {
    show(shown, group);
  } else {
    $("views").replaceChildren(empty);
  }
}

function tell(share, what, left) {
  $("bar").value = share;
  $("told").textContent = left == null ? what : `${what}, ${left < 1 ? "less than a second" : `about ${Math.round(left)} s`} left`;
}

function fail(message) {
  $("error").textContent = message[0].toUpperCase() + message.slice(1);
  $("error").hidden = false;
}

// ---- the stage

/** A picture in the making; there may be several. */
function look({ index, content_type, data }) {
  const views = $("views");
  if (!views.querySelector(".forming")) views.replaceChildren();
  let image = views.querySelector(`[data-index="${index}"]`);
  if (!image) {
    image = new Image();
    image.alt = "A picture in the making";
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
    image.alt = one.prompt || "A picture without a prompt";
    image.src = address(one);
    image.className = one.width < 448 ? "small" : "";
    image.onclick = () => drawing || show(one);
    return image;
  }));
  const { width, height, steps, guidance_scale, scheduler, seed, negative_prompt } = record;
  const not = negative_prompt ? ` — not: ${negative_prompt}` : "";
  const told = [`${record.prompt}${not}`, `${width}×${height}`, `${steps} steps`, `guidance ${guidance_scale}`, scheduler, `seed ${seed}`];
  if (record.model && record.model !== first) told.splice(1, 0, record.model);
  $("parameters").textContent = told.filter(Boolean).join(" · ");
  $("download").href = address(record);
  $("download").download = `${seed}.png`;
  $("caption").hidden = false;
  for (const button of $("history").querySelectorAll("button")) {
    button.setAttribute("aria-current", button.dataset.id === String(record.id));
  }
}

/** An object URL for a record's file, made once. */
function address(record) {
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
database.catch(() => fail("this browser keeps no pictures here; they are gone when the page is closed"));

async function store(mode, act) {
  const request = act((await database).transaction("pictures", mode).objectStore("pictures"));
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

/** Shows the pictures of a result and puts them into the history. */
async function keep(result, asked) {
  const images = result.images ?? [result];
  const records = [];
  for (const [place, { data, seed }] of images.entries()) {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    // JSON.parse has rounded a long seed; the one that was asked for counts up.
    const exact = asked.seed ? String(BigInt.asUintN(64, BigInt(asked.seed) + BigInt(place))) : String(seed);
    const blob = new Blob([bytes], { type: result.content_type });
    const { width, height } = await createImageBitmap(blob);
    const record = { ...asked, width, height, seed: exact, blob };
    try {
      record.id = await store("readwrite", pictures => pictures.add(record));
    } catch {
      record.id = `unkept ${performance.now()}`;
    }
    list(record);
    records.push(record);
  }
  show(records[0], records);
  if (result.warnings?.length) fail(result.warnings.join("; "));
  const surplus = [...$("history").children].slice(KEPT);
  for (const item of surplus) await forget(item.record);
}

function list(record) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = new Image();
  image.src = address(record);
  image.alt = record.prompt || "A picture without a prompt";
  image.loading = "lazy";
  button.type = "button";
  button.dataset.id = record.id;
  button.append(image);
  button.onclick = () => drawing || show(record);
  item.record = record;
  item.append(button);
  $("history").prepend(item);
}

async function forget(record) {
  await store("readwrite", pictures => pictures.delete(record.id)).catch(() => {});
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

// ---- the picture to start from

async function begin(blob) {
  if (!blob?.type.startsWith("image/")) return fail("that is not a picture");
  const picture = await createImageBitmap(blob).catch(() => null);
  if (!picture) return fail("this browser cannot read that picture");
  start = { blob, mask: null, width: picture.width, height: picture.height };
  // As much area as is chosen now, in the shape of the picture, in eights.
  const area = Math.min(Number($("width").value) * Number($("height").value), limits.max_pixels ?? 1 << 20);
  const scale = Math.sqrt(area / (picture.width * picture.height));
  const side = length => Math.max(8, Math.floor(length * scale / 8) * 8);
  // Where none is chosen, the picture's own.
  if (area) put({ width: side(picture.width), height: side(picture.height) });
  URL.revokeObjectURL($("start-picture").src);
  $("start-picture").src = URL.createObjectURL(blob);
  $("drop").hidden = true;
  $("chosen").hidden = false;
  $("paint").textContent = "Paint a mask";
}

function paint() {
  const canvas = $("mask");
  const scale = Math.min(1, 1024 / Math.max(start.width, start.height));
  canvas.width = Math.max(1, Math.round(start.width * scale));
  canvas.height = Math.max(1, Math.round(start.height * scale));
  $("under").src = $("start-picture").src;
  if (start.strokes) canvas.getContext("2d").drawImage(start.strokes, 0, 0);
  $("mask-dialog").showModal();
}

/** What was painted, white on black. Nothing painted is no mask. */
function masked() {
  const canvas = $("mask");
  const context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const painted = pixels.data.some((value, i) => i % 4 === 3 && value > 127);
  const copy = () => Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  start.strokes = copy();
  start.strokes.getContext("2d").drawImage(canvas, 0, 0);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  start.mask = painted ? copy() : null;
  start.mask?.getContext("2d").putImageData(pixels, 0, 0);
  $("paint").textContent = painted ? "Change the mask" : "Paint a mask";
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
    // A tap is a dot, but a line without any length is nothing.
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

// ---- what is pressed

form.oninput = echo;
form.onsubmit = event => { event.preventDefault(); draw(); };
$("cancel").onclick = () => drawing?.abort();
$("dice").onclick = () => { $("seed").value = dice(); setLock(true); };
$("lock").onclick = () => setLock(!locked());
$("seed").oninput = () => setLock($("seed").value !== "");
$("swap").onclick = () => put({ width: $("height").value, height: $("width").value });
$("choose").onclick = () => $("file").click();
$("file").onchange = () => { begin($("file").files[0]); $("file").value = ""; };
$("remove").onclick = () => { start = null; $("drop").hidden = false; $("chosen").hidden = true; };
$("paint").onclick = paint;
$("mask-dialog").onclose = masked;
$("rub").onclick = () => $("rub").setAttribute("aria-pressed", $("rub").getAttribute("aria-pressed") !== "true");
$("wipe").onclick = () => $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height);
$("reuse").onclick = () => { put({ ...shown, n: 1 }); $("seed").value = shown.seed; setLock(true); $("prompt").focus(); };
$("begin").onclick = () => begin(shown.blob);
$("delete").onclick = () => forget(shown);
$("open-key").onclick = () => $("key-dialog").showModal();
$("key-dialog").onclose = () => {
  if ($("key-dialog").returnValue !== "save") return;
  if ($("key").value) localStorage.setItem("key", $("key").value); else localStorage.removeItem("key");
  $("key").value = "";
  $("error").hidden = true;
  offer();
};
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape" && drawing && !document.querySelector("dialog[open]")) drawing.abort();
});
document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(file => file.type.startsWith("image/"));
  if (file) begin(file);
});
document.addEventListener("dragover", event => { event.preventDefault(); $("start").classList.add("over"); });
document.addEventListener("dragleave", () => $("start").classList.remove("over"));
document.addEventListener("drop", event => {
  event.preventDefault();
  $("start").classList.remove("over");
  if (event.dataTransfer.files[0]) begin(event.dataTransfer.files[0]);
});

greet();
for (const record of await store("readonly", pictures => pictures.getAll()).catch(() => [])) list(record);
