// The stage: the pictures that are looked at, or the live previews of a generation.

import { $, make } from "./elements.js";
import { markShown, objectUrl } from "./history.js";

/** The record that is shown with its parameters, and all records of the same generation. */
let [shown, group] = [null, []];
/** The generation whose previews are shown. */
let watched = null;
/** Whether the user chose what is shown. */
let pinned = false;
const empty = $("empty");

export const current = () => shown;
export const watching = () => watched;

/** The next generation that has a preview is watched. */
export const unpin = () => { pinned = false; };

/** Watches a generation that the user chose. */
export function watch(job) {
  pinned = true;
  watched = job;
  showPreviews();
}

/** A generation has a new preview. */
export function previewed(job) {
  if (!watched && !pinned) watched = job;
  if (watched === job) showPreviews();
}

/** A generation ended, with these records if it succeeded. */
export function ended(job, records = []) {
  const mine = watched === job || (!watched && !pinned);
  if (watched === job) watched = null;
  if (records.length && mine) return show(records[0], records);
  if (mine) clear();
}

/** Shows a record that the user chose. */
export function choose(record) {
  pinned = true;
  watched = null;
  show(record);
}

/** The record that is shown was deleted: shows the one beside it. */
export function deleted(next) {
  [shown, group] = [next, [next]];
  clear();
}

/** Shows what was shown before the previews, or nothing. */
function clear() {
  if (shown) return show(shown, group);
  $("caption").hidden = true;
  $("views").classList.remove("many");
  $("views").replaceChildren(empty);
}

function showPreviews() {
  const previews = watched.previews.filter(Boolean);
  const images = $("views").querySelectorAll(".forming");
  // In place, since a new element is blank until its image is decoded.
  if (previews.length && images.length === previews.length) return images.forEach((image, place) => { image.src = previews[place]; });
  $("caption").hidden = true;
  markShown(null);
  $("views").classList.toggle("many", previews.length > 1);
  $("views").replaceChildren(...previews.length
    ? previews.map(src => make("img", { src, alt: "Live preview", className: "forming small" }))
    : [make("p", { className: "faint" }, "No preview yet")]);
}

function show(record, others = [record]) {
  [shown, group] = [record, others];
  $("views").replaceChildren(...group.map(one => {
    const { prompt, width } = one;
    const image = make("img", { alt: prompt || "Image without a prompt", src: objectUrl(one), className: width < 448 ? "small" : "" });
    if (group.length > 1) image.onclick = () => choose(one);
    return image;
  }));
  $("views").classList.toggle("many", group.length > 1);
  $("said").textContent = record.prompt;
  $("said").hidden = !record.prompt;
  $("parameters").textContent = describe(record);
  $("warnings").replaceChildren(...(record.warnings ?? []).map(text => make("li", {}, text)));
  $("download").href = objectUrl(record);
  $("download").download = `${record.seed}.png`;
  $("caption").hidden = false;
  markShown(record);
}

/** The parameters in words: those in the file, where the server read them. */
function describe(record) {
  const { width, height, seed, variation_seed: varied, negative_prompt: negative, model, parameters: read = {} } = record;
  const asked = record.request ?? record;
  const [steps, guidance] = [read.Steps ?? asked.steps, read["CFG scale"] ?? asked.guidance_scale];
  const parts = [
    model, `${width}×${height}`, steps && `${steps} steps`, read.Sampler ?? asked.scheduler, guidance && `guidance ${guidance}`,
    ...(asked.nets ?? []).map(net => `ControlNet ${net.model ?? net}`), ...(record.loras ?? []).map(({ name, scale }) => `${name} ${scale}`),
    read["Hires upscaler"] && `hires ${read["Hires upscaler"]}`, read["Clip skip"] && `clip skip ${read["Clip skip"] - 1}`,
    varied && `variation ${read["Variation seed strength"]} of ${varied}`, `seed ${seed}`,
  ];
  const text = parts.filter(Boolean).join(" · ");
  return negative ? `${text} · without ${negative}` : text;
}
