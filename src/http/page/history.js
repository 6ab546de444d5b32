// The pictures of this browser: a database, and the list of all of them.

import { $, button, make, warn } from "./elements.js";

/** Maximum number of pictures; the oldest is deleted first. */
const MAX = 300;

const database = new Promise((done, failed) => {
  const request = indexedDB.open("sd-server", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});
database.catch(() => warn("this browser stores no images for this page; they are lost when it is closed"));

async function store(mode, act) {
  const request = act((await database).transaction("pictures", mode).objectStore("pictures"));
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

/** Where the record of a picture is shown when it is chosen. */
let choose = () => {};

/** Lists the stored pictures. */
export async function open(onchoose) {
  choose = onchoose;
  for (const record of await store("readonly", pictures => pictures.getAll()).catch(() => [])) list(record);
}

/** The object URL of a record's file, created once. */
export function objectUrl(record) {
  record.url ??= URL.createObjectURL(record.blob);
  return record.url;
}

/** Stores and lists new records. */
export async function add(records) {
  for (const record of records) {
    try {
      record.id = await store("readwrite", pictures => pictures.add(record));
    } catch {
      record.id = `unsaved ${performance.now()}`;
    }
    list(record);
  }
  for (const item of [...$("history").children].slice(MAX)) await remove(item.record);
}

function list(record) {
  const image = make("img", { src: objectUrl(record), alt: record.prompt || "Image without a prompt", loading: "lazy" });
  const look = button("", () => choose(record));
  look.append(image);
  $("history").prepend(make("li", { record }, look));
}

const itemOf = record => [...$("history").children].find(item => item.record === record);

/** The record that is `by` places further down the list. */
export const beside = (record, by) => [...$("history").children].at([...$("history").children].indexOf(itemOf(record)) + by)?.record;

/** Marks the record that is shown. */
export function markShown(record) {
  for (const item of $("history").children) item.firstChild.setAttribute("aria-current", item.record === record);
}

/** Deletes a picture. Returns the one beside it. */
export async function remove(record) {
  const item = itemOf(record);
  const next = (item?.nextSibling ?? item?.previousSibling)?.record;
  item?.remove();
  URL.revokeObjectURL(record.url);
  await store("readwrite", pictures => pictures.delete(record.id)).catch(() => {});
  return next;
}
