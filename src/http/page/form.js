// The form: its fields, by their names in the native API, and the request that they make. A blank
// field takes the model's default on the server, which its placeholder tells.

import { $, make } from "./elements.js";

export const form = $("form");
/** What is wrong where the model's own size is not known. */
const UNKNOWN_SIZE = "Hires fix needs a width and a height";

const fields = () => [...form.elements].filter(field => field.name);

function valueOf({ type, value, checked }) {
  if (type === "checkbox") return checked;
  return type === "number" && value !== "" ? Number(value) : value;
}

/** The values of the form. */
export const values = () => Object.fromEntries(fields().map(field => [field.name, valueOf(field)]));

/** Sets the fields of these names. Returns the choices that are not offered, which are left as they
 * are, in words. */
export function put(given) {
  const missing = [];
  for (const field of fields()) {
    const value = given[field.name];
    if (value === undefined) continue;
    if (field.type === "checkbox") field.checked = value === true;
    else if (!field.options || [...field.options].some(option => option.value === String(value))) field.value = value;
    else missing.push(`${field.labels[0].textContent} ${value}`);
  }
  refresh();
  return missing;
}

/** Sets every field that is not given as at first, but for the model and the prompts. Returns what
 * `put` does. */
export function replace(given) {
  const kept = ["model", "prompt", "negative_prompt"];
  const first = fields().filter(({ name }) => !kept.includes(name)).map(field => {
    const own = field.options ? field.options[0].value : field.defaultValue;
    return [field.name, field.type === "checkbox" ? field.defaultChecked : own];
  });
  const known = Object.entries(given).filter(([, value]) => value !== undefined);
  return put({ ...Object.fromEntries(first), ...Object.fromEntries(known) });
}

const shared = ["prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "scheduler", "schedule", "n", "seed",
  "prompt_syntax", "prompt_2", "negative_prompt_2", "refiner", "clip_skip", "eta", "s_noise", "guidance_rescale", "eta_noise_seed_delta", "tiling"];
const ofInput = ["strength"];
const ofMask = ["mask_blur", "mask_fill", "mask_invert"];
const ofHires = ["hires_upscaler", "hires_strength", "hires_steps", "hires_prompt", "hires_negative_prompt", "hires_guidance_scale",
  "hires_scheduler", "hires_schedule"];
const ofVariation = ["variation_strength", "variation_seed"];

/** The body of a request for these values, LoRAs, ControlNets, and input image and mask in base64. */
export function bodyOf(given, loras, controlnets, { image, mask }) {
  const names = [...shared];
  if (image) names.push(...ofInput);
  if (mask) names.push(...ofMask, ...given.only_masked ? ["mask_padding"] : []);
  if (given.hires) names.push(...ofHires);
  if (given.variation_strength) names.push(...ofVariation);
  if (given.refiner) names.push("refiner_switch_at");
  const asked = ([name, value]) => names.includes(name) && (name === "prompt" || (value !== "" && value !== false));
  const body = Object.fromEntries(Object.entries(given).filter(asked));
  if (given.hires) [body.hires_width, body.hires_height] = hiresSize(given);
  if (loras.length) body.loras = loras;
  if (controlnets.length) body.controlnets = controlnets;
  return { ...body, ...image && { image }, ...mask && { mask }, stream: true, preview: true, output_format: "png" };
}

/** Width and height: of the fields, else the model's own; NaN if the page does not know those. */
export const size = () => ["width", "height"].map(id => Number($(id).value || $(id).placeholder || NaN));

/** The size of the hires pass, in multiples of 8. */
function hiresSize({ width, height, hires_scale: scale }) {
  const [ownWidth, ownHeight] = size();
  return [width || ownWidth, height || ownHeight].map(side => Math.max(8, Math.round(side * scale / 8) * 8));
}

// ---- what the fields show of each other

/** The sliders beside number fields, which say what they do to nobody but the eye and the pointer. */
for (const field of form.querySelectorAll(".dial input")) {
  const { min, max, dataset: { far = max, by = 1 } } = field;
  const slider = make("input", { type: "range", min, max: far, step: by, tabIndex: -1 });
  slider.setAttribute("aria-hidden", true);
  slider.oninput = () => { field.value = slider.value; };
  field.slider = slider;
  field.after(slider);
  // Any number can be typed; the arrows take the steps of the slider.
  field.onkeydown = event => {
    const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    slider.value = Number(field.value || slider.value) + way * by;
    field.value = slider.value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
}

/** The bounds and the default of a number field. */
export function bound(id, { max, fallback }) {
  const field = $(id);
  if (max !== undefined) field.max = max;
  if (field.slider && max !== undefined) field.slider.max = Math.min(max, field.dataset.far ?? max);
  field.placeholder = fallback ?? "default";
  refresh();
}

/** Shows what depends on the values: sliders, the size of the hires pass, the schedules that the
 * sampler runs on, and which sections have something in them. */
export function refresh() {
  for (const field of form.querySelectorAll(".dial input")) {
    const fallback = Number(field.placeholder) || $(field.dataset.like)?.slider.value || field.min;
    if (field.slider) field.slider.value = field.value || fallback;
  }
  const given = values();
  $("hires-fields").hidden = !given.hires;
  $("padding").disabled = !given.only_masked;
  const sides = given.hires ? hiresSize(given) : [];
  const unknown = sides.some(Number.isNaN);
  $("hires-size").value = unknown || !sides.length ? "" : sides.join("×");
  $("width").setCustomValidity(unknown ? UNKNOWN_SIZE : "");
  const own = $("sampler").selectedOptions[0]?.schedules;
  limitTo($("schedule"), own);
  limitTo($("hires-schedule"), $("hires-sampler").selectedOptions[0]?.schedules ?? own);
  for (const section of form.querySelectorAll("details")) {
    section.querySelector("span").textContent = [...section.querySelectorAll("[name]")].filter(isChanged).map(told).join(", ");
  }
}

/** Lets only schedules be chosen that a sampler runs on, which are all if none is chosen. */
function limitTo(list, runs) {
  for (const option of list.options) option.disabled = Boolean(option.value && runs && !runs.includes(option.value));
  if (list.selectedOptions[0]?.disabled) list.value = "";
}

function isChanged(field) {
  if (field.type === "checkbox") return field.checked;
  return field.options ? field.selectedIndex > 0 : field.value !== "" && field.value !== field.defaultValue;
}

const told = ({ type, value, dataset }) => ["checkbox", "textarea"].includes(type) ? dataset.told : `${dataset.told} ${value}`.trim();

/** Marks the field that a reply found wrong, until it changes. */
export function mark(name) {
  const aliases = { num_inference_steps: "steps", num_images_per_prompt: "n", hires_width: "hires_scale", hires_height: "hires_scale" };
  const field = form.elements[aliases[name] ?? name];
  if (!field?.setAttribute) return;
  field.setAttribute("aria-invalid", true);
  field.closest("details")?.setAttribute("open", "");
}

// ---- seeds

export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);
export const isLocked = () => $("lock").getAttribute("aria-pressed") === "true";
export const setLock = on => $("lock").setAttribute("aria-pressed", on);

$("dice").onclick = () => { $("seed").value = randomSeed(); setLock(true); };
$("lock").onclick = () => setLock(!isLocked());
$("seed").oninput = () => setLock($("seed").value !== "");
$("swap").onclick = () => put({ width: $("height").value, height: $("width").value });
form.addEventListener("input", event => {
  event.target.removeAttribute("aria-invalid");
  refresh();
});
// The browser points at a field only where it can be seen.
form.addEventListener("invalid", event => event.target.closest("details")?.setAttribute("open", ""), true);
