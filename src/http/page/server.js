// The server: requests with the API key, streams of events, and the lists that the form offers.

export const key = () => localStorage.getItem("key");

export function setKey(value) {
  if (value) localStorage.setItem("key", value); else localStorage.removeItem("key");
}

/** An error reply: its sentence, status, field, and the seconds after which to try again. */
export class Refused extends Error {
  constructor(message, { status, param, retryAfter } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (options.body) headers["content-type"] = "application/json";
  const response = await fetch(path, { ...options, headers }).catch(error => {
    throw error.name === "AbortError" ? error : new Refused("the server cannot be reached");
  });
  if (response.ok) return response;
  const { error, detail } = await response.json().catch(() => ({}));
  // The A1111 API has its own form of errors.
  const message = error?.message ?? detail ?? `the server responded with ${response.status}`;
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  throw new Refused(message, { status: response.status, param: error?.param, retryAfter });
}

export const read = async path => (await call(path)).json();

export const post = async (path, body) => (await call(path, { method: "POST", body: JSON.stringify(body) })).json();

/** Yields [name, data] of each server-sent event of a generation. */
export async function* events(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Refused("the connection to the server was lost");
    });
    if (done) return;
    const isEnd = value.includes("\n\n") || (text.endsWith("\n") && value.startsWith("\n"));
    text += value;
    // A large result comes in many pieces, and is searched once.
    if (!isEnd) continue;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const field = name => part.split("\n").find(line => line.startsWith(`${name}:`))?.slice(name.length + 1).trim();
      if (field("data")) yield [field("event"), JSON.parse(field("data"))];
    }
  }
}

/** The path at which a model generates: `first` is the one that the server was started with. */
export function pathOf(model, first) {
  if (!model || model === first) return "v1/invocations";
  return `models/${model.split("/").map(encodeURIComponent).join("/")}`;
}

/** The base64 of a blob. */
export async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

/** The parameters in an image file in base64, by their names in AUTOMATIC1111. */
export const parametersIn = async image => (await post("sdapi/v1/png-info", { image })).parameters;

const named = list => list.map(({ name }) => name);

/** What a preprocessor makes of an image whose shorter side has this length, as a data URL. */
export async function detected(image, side, preprocessor, { low, high }, signal) {
  const body = JSON.stringify({
    controlnet_module: preprocessor, controlnet_input_images: [image], controlnet_processor_res: Math.min(2048, Math.max(64, side)),
    controlnet_threshold_a: low, controlnet_threshold_b: high,
  });
  const { images: [map] } = await (await call("controlnet/detect", { method: "POST", body, signal })).json();
  return `data:image/png;base64,${map}`;
}

/** Yields the result of upscaling an image as the one event of a generation. */
export async function* upscaled(image, upscaler, scale, signal) {
  const body = JSON.stringify({ image, upscaler_1: upscaler, upscaling_resize: scale });
  const { image: data, warnings } = await (await call("sdapi/v1/extra-single-image", { method: "POST", body, signal })).json();
  yield ["result", { images: [{ data }], content_type: "image/png", warnings }];
}

/** What the form offers beside /info. A list that the server has not is empty. */
export async function lists() {
  const optional = path => read(path).catch(error => {
    if (error.status !== 404) throw error;
    return [];
  });
  const [models, loras, latent, upscalers, nets] = await Promise.all([
    read("v1/models"), optional("sdapi/v1/loras"),
    optional("sdapi/v1/latent-upscale-modes"), optional("sdapi/v1/upscalers"), optional("controlnet/model_list"),
  ]);
  const ofPictures = named(upscalers).filter(name => name !== "None");
  // Their names are followed by hashes.
  const ofNets = (nets.model_list ?? []).map(name => name.replace(/ \[[0-9a-f]+\]$/, ""));
  return { models: models.data.map(({ id }) => id), loras: named(loras), latent: named(latent), upscalers: ofPictures, nets: ofNets };
}
