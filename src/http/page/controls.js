// The ControlNets of the next generation, each with the picture by which it steers.

import { $, button, make, warn } from "./elements.js";
import { base64 } from "./server.js";

let preprocessors = [];

/** Preprocessors that have thresholds: how many. */
const THRESHOLDS = { canny: 2, threshold: 1 };

/** Offers these nets and preprocessors. */
export function offer(nets, names) {
  preprocessors = names;
  $("control").replaceChildren(...nets.map(name => new Option(name)));
  $("controls").hidden = !nets.length;
}

const items = () => [...$("chosen-controls").children];

function given({ fields }) {
  const filled = Object.entries(fields).filter(([, { value, disabled }]) => value !== "" && !disabled);
  return Object.fromEntries(filled.map(([name, { type, value }]) => [name, type === "number" ? Number(value) : value]));
}

/** The chosen ones, as the API takes them. */
export const encoded = () => Promise.all(items().map(async item => (
  { model: item.model, image: await base64(item.blob), ...given(item) }
)));

const number = (min, max, placeholder) => make("input", { type: "number", min, max, step: "any", placeholder });

function add(blob) {
  const model = $("control").value;
  const fields = {
    preprocessor: make("select", {}, ...preprocessors.map(name => new Option(name))),
    scale: number(-10, 10, "1"), start: number(0, 1, "0"), end: number(0, 1, "1"), low: number(0, 2040), high: number(0, 2040),
  };
  fields.preprocessor.value = "none";
  const item = make("li", { model, blob, fields });
  const labelled = Object.entries(fields).map(([name, field]) => make("label", {}, make("span", {}, name), field));
  const showThresholds = () => {
    const { preprocessor: { value }, low, high } = fields;
    [low, high].forEach((field, place) => { field.disabled = field.parentElement.hidden = place >= (THRESHOLDS[value] ?? 0); });
    low.placeholder = value === "canny" ? "100" : "127";
    high.placeholder = "200";
  };
  fields.preprocessor.onchange = showThresholds;
  showThresholds();
  const address = URL.createObjectURL(blob);
  const drop = () => { item.remove(); URL.revokeObjectURL(address); $("add-control").focus(); };
  const remove = button("×", drop, { className: "quiet" });
  remove.setAttribute("aria-label", `Remove ${model}`);
  item.append(
    make("img", { src: address, alt: `Picture of ${model}` }),
    make("div", {}, make("p", {}, make("span", { title: model }, model), remove), make("div", {}, ...labelled)),
  );
  $("chosen-controls").append(item);
}

$("add-control").onclick = () => $("control-file").click();
$("control-file").onchange = () => {
  const [file] = $("control-file").files;
  $("control-file").value = "";
  if (!file?.type.startsWith("image/")) return warn("that file is not an image");
  $("error").hidden = true;
  add(file);
};
