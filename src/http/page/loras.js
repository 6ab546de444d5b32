// The LoRAs of the next generation: those that the server has, and the chosen ones with their weights.

import { $, button, make, warn } from "./elements.js";

let known = [];

/** Offers these LoRAs. */
export function offer(names) {
  known = names;
  $("lora-names").replaceChildren(...names.map(name => make("option", { value: name })));
  show();
}

/** The chosen ones, as the API takes them. */
export function chosen() {
  return [...$("chosen-loras").children].map(item => ({ ...item.lora, scale: Number(item.weight.value || 1) }));
}

/** Chooses these and no others. */
export function choose(loras) {
  $("chosen-loras").replaceChildren(...loras.map(row));
  show();
}

function show() {
  $("loras").hidden = !known.length && !$("chosen-loras").children.length;
}

function row(lora) {
  const { name, scale = 1 } = lora;
  const item = make("li", { lora });
  item.weight = make("input", { type: "number", step: "any", min: -100, max: 100, value: scale });
  item.weight.setAttribute("aria-label", `Weight of ${name}`);
  const remove = button("×", () => { item.remove(); show(); $("lora").focus(); }, { className: "quiet" });
  remove.setAttribute("aria-label", `Remove ${name}`);
  item.append(make("span", { title: name }, name), item.weight, remove);
  return item;
}

function add() {
  const name = $("lora").value.trim();
  if (!name) return;
  if (!known.includes(name)) return warn(`there is no LoRA ${name}`);
  $("error").hidden = true;
  $("lora").value = "";
  if (chosen().some(lora => lora.name === name)) return;
  $("chosen-loras").append(row({ name }));
}

$("add-lora").onclick = add;
// A name that was chosen from the list is added at once.
$("lora").oninput = event => { if (!(event instanceof InputEvent) || event.inputType === "insertReplacementText") add(); };
$("lora").onkeydown = event => {
  if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  add();
};
