// Elements of the page, and what it says aloud.

export const $ = id => document.getElementById(id);

/** A new element with these properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A new button that does not send a form. */
export const button = (text, onclick, properties = {}) => make("button", { type: "button", onclick, ...properties }, text);

/** Tells a screen reader what happened elsewhere on the page. */
export const announce = text => { $("live").textContent = text; };

/** With a capital letter. */
export const sentence = text => text[0].toUpperCase() + text.slice(1);

/** Shows what is wrong with something that is no generation. */
export function warn(text) {
  $("error").textContent = sentence(text);
  $("error").hidden = false;
}

/** Shows what was done, in place of what was wrong. */
export function notice(text) {
  $("error").hidden = true;
  $("notice").textContent = text;
  $("notice").hidden = !text;
}
