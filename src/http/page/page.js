// The web page: a form, a queue of generations, and the pictures of this browser. It uses the native
// API at v1/invocations, which takes an API key, and models/NAME for other models than the first.
// Models, samplers, limits, LoRAs and upscalers come from the server's own lists.

import { $, announce, notice, warn } from "./page/elements.js";
import { bodyOf, bound, form, isLocked, put, randomSeed, refresh, replace, setLock, values } from "./page/form.js";
import * as controls from "./page/controls.js";
import * as history from "./page/history.js";
import { valuesOf } from "./page/infotext.js";
import * as input from "./page/input.js";
import * as loras from "./page/loras.js";
import * as queue from "./page/queue.js";
import { base64, events, key, lists, parametersIn, pathOf, read, setKey, upscaled } from "./page/server.js";
import * as stage from "./page/stage.js";

/** What /info says of the server. */
let info = {};
/** The model that the server was started with; null if all are selected by name. */
let first = null;

// ---- the server's lists

async function connect() {
  try {
    info = await read("info");
    if (info.phase === "ready") return await setUp();
    $("model").textContent = info.phase === "loading" ? "loading the model…" : `server ${info.phase}`;
  } catch {
    $("model").textContent = "the server does not respond";
  }
  setTimeout(connect, 1500);
}

/** Offers what the server has, and fills in the last choices. */
async function setUp() {
  const { model, limits } = info;
  first = model?.name ?? null;
  input.allow(limits.max_pixels);
  await list();
  const last = JSON.parse(localStorage.getItem("choices") ?? "null");
  if (last && [...$("which").options].some(({ value }) => value === last.model)) {
    put(last);
    loras.choose(last.loras ?? []);
  }
  tellDefaults();
  $("model").textContent = model ? `${first} · ${model.device} · ${model.dtype}` : "select a model";
}

/** Tells the defaults of the chosen model, which are known of the first. */
function tellDefaults() {
  const { model, limits, schedulers, schedules } = info;
  const own = model && $("which").value === first ? model.defaults : {};
  for (const [id, max, fallback] of [
    ["width", undefined, own.width], ["height", undefined, own.height],
    ["steps", limits.max_steps, own.num_inference_steps], ["count", limits.max_images, 1], ["guidance", undefined, own.guidance_scale],
    ["clip-skip", undefined, own.clip_skip], ["rescale", undefined, own.guidance_rescale], ["hires-steps", limits.max_steps, "same"],
  ]) bound(id, { max, fallback });
  const called = (entries, name) => {
    const title = entries.find(entry => entry.name === name)?.title;
    return title ? `Default: ${title}` : "Default";
  };
  offer("sampler", called(schedulers, own.scheduler), schedulers);
  offer("schedule", own.schedule === "model" ? "Default" : called(schedules, own.schedule), schedules);
  offer("hires-sampler", "as above", schedulers);
  offer("hires-schedule", "as above", schedules);
  // Of other models than the first it is not known.
  $("second").hidden = own.width !== undefined && !model.is_xl;
}

/** Fills a list and keeps what was chosen; its first line is blank in a request. */
function offer(id, blank, entries) {
  const options = entries.map(({ name, title, schedules }) => Object.assign(new Option(title, name), { schedules }));
  const chosen = $(id).value;
  $(id).replaceChildren(new Option(blank, ""), ...options);
  $(id).value = entries.some(({ name }) => name === chosen) ? chosen : "";
  refresh();
}

/** Offers the models, LoRAs and upscalers, which a key may be needed for. */
async function list() {
  const offered = await lists().catch(error => {
    if (error.status !== 401) warn(error.message);
    else $("open-key").hidden = false;
    // Without a first model there is nothing to do without the key.
    if (error.status === 401 && first === null) $("key-dialog").showModal();
    return { models: first === null ? [] : [first], loras: [], latent: [], upscalers: [], nets: [] };
  });
  const chosen = $("which").value;
  $("which").replaceChildren(...offered.models.map(name => new Option(name)));
  $("models").hidden = offered.models.length < 2 && first !== null;
  put({ model: chosen });
  tellDefaults();
  $("refiners").hidden = offered.models.length < 2;
  offer("refiner", "none", offered.models.map(name => ({ name, title: name })));
  const { latent, upscalers } = offered;
  const modes = [...latent, ...upscalers].map(name => ({ name, title: name }));
  offer("hires-upscaler", latent.length ? `Default: ${latent[0]}` : "Default", modes);
  $("upscaler").replaceChildren(...upscalers.map(name => new Option(name)));
  $("upscale").hidden = !upscalers.length;
  loras.offer(offered.loras);
  controls.offer(offered.nets, info.preprocessors ?? []);
}

// ---- generations

async function generate() {
  if (!isLocked()) $("seed").value = randomSeed();
  const given = values();
  const chosen = loras.chosen();
  localStorage.setItem("choices", JSON.stringify({ ...given, seed: "", loras: chosen }));
  stage.unpin();
  notice("");
  const nets = controls.chosen();
  const body = bodyOf(given, chosen, await controls.encoded(nets), await input.encoded());
  const path = pathOf(given.model, first);
  queue.submit({ begin: signal => events(path, body, signal), request: { ...given, loras: chosen, nets } });
  announce("Added to the queue");
  if (matchMedia("(max-width: 46rem)").matches) $("stage").scrollIntoView();
}

/** Upscales the image that is shown; the result has its settings. */
async function upscale() {
  const { request, prompt, negative_prompt, model, loras, seed, blob } = stage.current();
  const [upscaler, scale, image] = [$("upscaler").value, Number($("upscaling").value), await base64(blob)];
  stage.unpin();
  queue.submit({
    begin: signal => upscaled(image, upscaler, scale, signal), first: `${upscaler}, ${scale} times the size`,
    request: { ...request, prompt, negative_prompt, model, loras, seed },
  });
  announce("Added to the queue");
}

/** As much base64 of a file as holds its parameters, which are before its pixels. */
const HEAD = 1 << 17;

/** Stores and shows a result with what was asked for, and what the first file says of it. */
async function keep(job, result) {
  const { request } = job;
  const images = result.images ?? [result];
  const parameters = await parametersIn(images[0].data.slice(0, HEAD)).catch(() => undefined);
  const records = [];
  for (const [place, { data }] of images.entries()) {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    const blob = new Blob([bytes], { type: result.content_type });
    const { width, height } = await createImageBitmap(blob);
    // JSON.parse rounds a long seed; the requested one counts up by image, unless that of a variation does.
    const nth = seed => String(BigInt.asUintN(64, BigInt(seed) + BigInt(place)));
    const varied = request.variation_strength && parameters?.["Variation seed"];
    records.push({
      request, parameters, width, height, blob, warnings: result.warnings, loras: request.loras,
      prompt: request.prompt, negative_prompt: request.negative_prompt, model: request.model === first ? "" : request.model,
      seed: varied ? request.seed : nth(request.seed), variation_seed: varied ? nth(varied) : "",
    });
  }
  await history.add(records);
  stage.ended(job, records);
  announce(`${records.length} image${records.length === 1 ? "" : "s"} finished`);
}

queue.connect({ preview: stage.previewed, look: stage.watch, failed: job => stage.ended(job), result: keep });

// ---- settings that were used before

/** Fills the form with the settings of a picture of the history. What was the model's default is
 * what it was then. */
function reuse({ request, parameters, seed, variation_seed = "", ...old }) {
  const drawn = parameters ? valuesOf(parameters, info).values : {};
  const { steps, guidance_scale, width, height, scheduler, schedule } = drawn;
  const asked = Object.entries(request ?? old).filter(([, value]) => value !== "");
  const own = { steps, guidance_scale, width, height, scheduler, schedule, prompt: "", negative_prompt: "" };
  replace({ ...own, ...Object.fromEntries(asked), n: "", seed, variation_seed });
  loras.choose(request?.loras ?? []);
  controls.choose((request?.nets ?? []).filter(({ blob }) => blob));
  setLock(true);
  $("prompt").focus();
}

/** Fills the form with the settings in an image file. */
async function readSettings(file) {
  try {
    const parameters = await parametersIn(await base64(file));
    if (!parameters.Steps) return warn(`${file.name} holds no generation parameters`);
    const { values: found, loras: chosen, left } = valuesOf(parameters, info);
    const missing = replace({ n: "", ...found });
    loras.choose(chosen);
    setLock(found.seed !== undefined);
    const others = [...missing, ...left];
    notice(`Settings of ${file.name}${others.length ? `. Not taken: ${others.join(", ")}` : ""}`);
    $("prompt").focus();
  } catch (error) {
    warn(error.message);
  }
}

// ---- files

const zones = $("zones");
const hasFiles = event => [...event.dataTransfer?.types ?? []].includes("Files");

document.addEventListener("dragenter", event => { if (hasFiles(event)) zones.hidden = false; });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) zones.hidden = true; });
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault();
  zones.hidden = true;
  const file = event.dataTransfer?.files[0];
  const over = zone => event.target.closest(zone);
  if (file) (over("#zone-input, #start") ? input.setInput : over("#zone-control, #controls") ? controls.add : readSettings)(file);
});
document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) input.setInput(file);
});
$("read").onclick = () => $("read-file").click();
$("read-file").onchange = () => { readSettings($("read-file").files[0]); $("read-file").value = ""; };

// ---- buttons, dialogs and keys

form.onsubmit = event => { event.preventDefault(); generate(); };
$("which").onchange = tellDefaults;
$("cancel").onclick = () => queue.cancel(queue.oldest(stage.watching()));
$("reuse").onclick = () => reuse(stage.current());
$("reuse-seed").onclick = () => { put({ seed: stage.current().seed }); setLock(true); announce("Seed locked"); };
$("begin").onclick = () => input.setInput(stage.current().blob);
$("steer").onclick = () => controls.add(stage.current().blob);
$("delete").onclick = async () => stage.deleted(await history.remove(stage.current()));
$("upscale").onclick = () => $("upscale-dialog").showModal();
$("upscale-dialog").onclose = () => { if ($("upscale-dialog").returnValue === "upscale") upscale(); };
$("open-help").onclick = () => $("help-dialog").showModal();
$("open-key").onclick = () => $("key-dialog").showModal();
$("key-dialog").onclose = () => {
  if ($("key-dialog").returnValue !== "save") return;
  setKey($("key").value);
  $("key").value = "";
  $("error").hidden = true;
  list();
};
$("open-key").hidden = !key();

function browse(by) {
  const record = stage.current() && history.beside(stage.current(), by);
  if (record) stage.choose(record);
}

document.addEventListener("keydown", event => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const isTyped = event.target.matches("input, textarea, select");
  const job = queue.oldest(stage.watching());
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  else if (event.key === "Escape" && job) queue.cancel(job);
  else if (isTyped || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "?") $("help-dialog").showModal();
  else if (event.key === "ArrowLeft") browse(-1);
  else if (event.key === "ArrowRight") browse(1);
});

connect();
await history.open(stage.choose);
