// The generations that were asked for: each has a card with its place, progress, preview and an end.

import { $, announce, button, make, sentence } from "./elements.js";
import { mark } from "./form.js";

/** Generations that the server has at once. The others wait here, since a browser opens no more than
 * six connections to a server, for all its tabs. */
const MAX_AT_ONCE = 2;

/** In the order of submission: those that wait, run, are to be asked for again, or have failed. */
let jobs = [];

/** What is told of the generations: `preview(job)`, `result(job, result)` and `failed(job)`, `look(job)`. */
let tell = {};
export const connect = handlers => { tell = handlers; };

const isLive = ({ state }) => ["waiting", "running", "busy"].includes(state);

/** Adds a generation: `begin(signal)` yields its events, `first` is told until there are some, and its
 * pictures are stored with the request. */
export function submit({ begin, first = "sent", request }) {
  const job = { begin, first, request, state: "waiting", previews: [], quarter: 0 };
  job.card = card(job);
  jobs.push(job);
  $("queue").append(job.card.item);
  startNext();
  return job;
}

/** Ends a generation. The server stops it at its next step. */
export function cancel(job) {
  const { state } = job;
  drop(job);
  if (state === "running") job.abort.abort();
  announce("Cancelled");
  tell.failed(job);
  startNext();
}

/** The generation that Cancel ends: the preferred one, else the oldest. */
export function oldest(preferred) {
  const live = jobs.filter(isLive);
  return live.includes(preferred) ? preferred : live[0];
}

function startNext() {
  const running = jobs.filter(({ state }) => state === "running").length;
  const waiting = jobs.filter(({ state }) => state === "waiting");
  for (const job of waiting.slice(0, Math.max(0, MAX_AT_ONCE - running))) run(job);
  const left = waiting.filter(({ state }) => state === "waiting");
  for (const [place, job] of left.entries()) showProgress(job, 0, ahead(running + place, "generation"));
  if (!jobs.some(isLive) && document.activeElement === $("cancel")) $("draw").focus();
  $("cancel").hidden = !jobs.some(isLive);
}

const ahead = (count, what) => count ? `waiting, ${count} ${what}${count === 1 ? "" : "s"} ahead` : "waiting";

async function run(job) {
  job.state = "running";
  job.abort = new AbortController();
  showProgress(job, 0, job.first);
  try {
    for await (const [name, data] of job.begin(job.abort.signal)) {
      if (name === "error") throw Object.assign(new Error(data.error.message), { param: data.error.param });
      if (name === "result") {
        await tell.result(job, data);
        drop(job);
      } else {
        progress(job, name, data);
      }
    }
    if (job.state === "running") throw new Error("the server ended the connection before the images were finished");
  } catch (error) {
    if (job.state === "running") await fail(job, error);
  }
  startNext();
}

function progress(job, name, data) {
  if (name === "queued") showProgress(job, 0, data.position > 1 ? ahead(data.position - 1, "image") : "starting", data.seconds_left);
  if (name === "step") {
    const share = data.step / data.steps;
    showProgress(job, share, `step ${data.step} of ${data.steps}`, data.seconds_left);
    const quarter = Math.floor(share * 4);
    if (quarter > job.quarter) announce(`${quarter * 25} percent`);
    job.quarter = quarter;
  }
  if (name === "preview") {
    job.previews[data.index] = `data:${data.content_type};base64,${data.data}`;
    job.card.image.src = job.previews.find(Boolean);
    job.card.image.hidden = false;
    tell.preview(job);
  }
}

/** A server that is busy is asked again when it says; what else is wrong is shown. */
async function fail(job, error) {
  if (error.status === 429 && error.retryAfter) {
    job.state = "busy";
    showProgress(job, 0, `the server is busy, next try in ${error.retryAfter} s`);
    await new Promise(done => setTimeout(done, error.retryAfter * 1000));
    if (job.state === "busy") job.state = "waiting";
    return;
  }
  job.state = "failed";
  job.card.failed(sentence(error.message));
  job.card.item.scrollIntoView({ block: "nearest" });
  if (error.param) mark(error.param);
  if (error.status === 401) $("key-dialog").showModal();
  tell.failed(job);
}

function drop(job) {
  const { item } = job.card;
  job.state = "done";
  jobs = jobs.filter(other => other !== job);
  const next = item.contains(document.activeElement) && (item.nextSibling?.querySelector(".row button") ?? $("draw"));
  item.remove();
  // The keyboard goes on where it was.
  if (next) next.focus();
}

function showProgress({ card: { bar, told } }, share, text, left) {
  bar.value = share;
  const rest = left < 1 ? "less than a second" : `about ${Math.round(left)} s`;
  told.textContent = left == null ? text : `${text}, ${rest} left`;
}

function again(job) {
  drop(job);
  submit(job);
}

function card(job) {
  const image = make("img", { alt: "", hidden: true });
  const look = button("", () => tell.look(job), { className: "look" });
  look.setAttribute("aria-label", `Show the preview of: ${job.request.prompt || "no prompt"}`);
  look.append(image);
  const bar = make("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", "Progress");
  const told = make("p", { className: "told" });
  const words = make("p", { className: "words" }, job.request.prompt || "no prompt");
  const actions = make("div", { className: "row" }, button("Cancel", () => cancel(job), { className: "quiet" }));
  const item = make("li", {}, look, make("div", { className: "text" }, words, told, bar), actions);
  const failed = text => {
    item.className = "failed";
    bar.remove();
    look.hidden = image.hidden;
    told.setAttribute("role", "alert");
    told.textContent = text;
    actions.replaceChildren(
      button("Try again", () => again(job)),
      button("Dismiss", () => drop(job), { className: "quiet" }),
    );
  };
  return { item, image, bar, told, failed };
}
