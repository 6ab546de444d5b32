// The ControlNets of the next generation, each with the picture by which it steers, and what its
// preprocessor makes of it.

import { $, announce, button, make, warn } from "./elements.js";
import { base64, detected } from "./server.js";

let preprocessors = [];

/** Preprocessors that have thresholds: their defaults. */
const THRESHOLDS = { canny: [100, 200], threshold: [127] };

/** How long a threshold has to rest before the map is made again, in milliseconds. */
const REST = 300;

/** What the fields mean, for those who do not know. */
const MEANINGS = {
  preprocessor: "What is made of the picture before the net sees it", scale: "How much the net steers",
  start: "Share of the steps before which it does not steer", end: "Share of the steps after which it does not steer",
  low: "Brightness above which it is white, or contrast that continues an edge", high: "Contrast that begins an edge",
  guess_mode: "Only the prompted half of guidance is steered, the outer layers less",
};

const LABELS = { low: "Low threshold", high: "High threshold", guess_mode: "Guess mode" };

/** Offers these nets and preprocessors. */
export function offer(nets, names) {
  preprocessors = names;
  $("control").replaceChildren(...nets.map(name => new Option(name)));
  for (const id of ["controls", "zone-control", "steer"]) $(id).hidden = !nets.length;
}

const items = () => [...$("chosen-controls").children];

function given({ fields }) {
  const valueOf = ({ type, value, checked, disabled }) => {
    if (disabled || value === "") return "";
    return type === "checkbox" ? checked || "" : type === "number" ? Number(value) : value;
  };
  return Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, valueOf(field)]).filter(([, value]) => value !== ""));
}

/** The chosen ones with the files of their pictures. */
export const chosen = () => items().map(item => ({ model: item.model, blob: item.blob, ...given(item) }));

/** The same as the API takes them. */
export const encoded = nets => Promise.all(nets.map(async ({ blob, ...net }) => ({ ...net, image: await base64(blob) })));

/** Chooses these and no others. */
export function choose(nets) {
  items().forEach(drop);
  for (const { model, blob, ...values } of nets) append(model, blob, values);
}

/** Adds the net that is selected, with this picture. */
export function add(blob) {
  if (!blob?.type.startsWith("image/")) return warn("that file is not an image");
  $("error").hidden = true;
  const model = $("control").value;
  // A net's name tells what it was trained on.
  const preprocessor = preprocessors.find(name => model.toLowerCase().includes(name)) ?? "none";
  append(model, blob, { preprocessor }).scrollIntoView({ block: "nearest" });
  announce("Control picture added");
}

function drop(item) {
  item.remove();
  item.abort?.abort();
  URL.revokeObjectURL(item.address);
}

const number = (min, max, placeholder = "") => make("input", { type: "number", min, max, step: "any", placeholder });

function append(model, blob, values) {
  const fields = {
    preprocessor: make("select", {}, ...preprocessors.map(name => new Option(name))),
    scale: number(-10, 10, "1"), start: number(0, 1, "0"), end: number(0, 1, "1"), low: number(1, 255), high: number(1, 255),
    guess_mode: make("input", { type: "checkbox" }),
  };
  for (const [name, value] of Object.entries(values)) fields[name][value === true ? "checked" : "value"] = value;
  const labelled = Object.entries(fields).map(([name, field]) => {
    const [words, className] = [make("span", {}, LABELS[name] ?? name), field.type === "checkbox" ? "check" : ""];
    return make("label", { title: MEANINGS[name], className }, ...className ? [field, words] : [words, field]);
  });
  const address = URL.createObjectURL(blob);
  const picture = make("img", { src: address, alt: `Picture of ${model}` });
  const map = make("img", { alt: `What ${model} sees`, hidden: true });
  const told = make("p", { className: "faint", hidden: true });
  const item = make("li", { model, blob, fields, address, picture, map, told });
  const remove = button("×", () => { drop(item); $("add-control").focus(); }, { className: "quiet" });
  remove.setAttribute("aria-label", `Remove ${model}`);
  item.append(
    make("p", { className: "head" }, make("span", { title: model }, model), remove),
    make("div", { className: "looks" }, picture, map), told, make("div", { className: "fields" }, ...labelled),
  );
  fields.preprocessor.onchange = () => preprocessed(item);
  for (const field of [fields.low, fields.high]) {
    field.oninput = () => {
      clearTimeout(item.rest);
      item.rest = setTimeout(() => preprocessed(item), REST);
    };
  }
  $("chosen-controls").append(item);
  preprocessed(item);
  return item;
}

/** Shows the thresholds of the preprocessor, and what it makes of the picture. */
async function preprocessed(item) {
  const { fields: { preprocessor: { value: name }, low, high }, picture, map, told } = item;
  const defaults = THRESHOLDS[name] ?? [];
  for (const [place, field] of [low, high].entries()) {
    field.disabled = field.parentElement.hidden = place >= defaults.length;
    field.placeholder = defaults[place] ?? "";
    field.min = name === "canny" ? 1 : 0;
  }
  item.abort?.abort();
  const { signal } = item.abort = new AbortController();
  const show = (src, error = "") => {
    map.hidden = !src;
    map.src = src;
    told.textContent = error;
    told.hidden = !error;
  };
  if (name === "none") return show("");
  try {
    await picture.decode();
    // In its own size, as when it is used.
    const side = Math.min(picture.naturalWidth, picture.naturalHeight);
    show(await detected(await base64(item.blob), side, name, given(item), signal));
  } catch (error) {
    if (error.name !== "AbortError") show("", `No preview: ${error.message}`);
  }
}

$("add-control").onclick = () => $("control-file").click();
$("control-file").onchange = () => {
  const [file] = $("control-file").files;
  $("control-file").value = "";
  if (file) add(file);
};
