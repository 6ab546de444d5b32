// The parameters in an image file, by AUTOMATIC1111's names, as values of the form.

/** `<lora:NAME:SCALE>` and `<lora:NAME:TEXT ENCODER:SCALE>`; other tags stay in the prompt. */
const TAG = /\s*<(?:lora|lyco):([^:<>]+):(?:(-?[\d.]+):)?(-?[\d.]+)>/g;

/** Parameters that are fields under another name. */
const FIELDS = {
  "Negative prompt": "negative_prompt", Steps: "steps", "CFG scale": "guidance_scale", Seed: "seed",
  "Size-1": "width", "Size-2": "height", Model: "model", "Variation seed": "variation_seed",
  "Variation seed strength": "variation_strength", "CFG Rescale phi": "guidance_rescale", Eta: "eta",
  "Eta DDIM": "eta", "Sigma noise": "s_noise", "Hires upscaler": "hires_upscaler", "Mask blur": "mask_blur", ENSD: "eta_noise_seed_delta",
  "Masked area padding": "mask_padding", "Hires prompt": "hires_prompt", "Hires negative prompt": "hires_negative_prompt",
  "Hires CFG Scale": "hires_guidance_scale", "Prompt 2": "prompt_2", "Negative prompt 2": "negative_prompt_2",
  "Refiner switch at": "refiner_switch_at",
};

/** Parameters that are read below, or say nothing that the form could take. */
const READ = ["Prompt", "Sampler", "Schedule type", "Size", "Clip skip", "Denoising strength", "Hires upscale", "Hires resize-1", "Hires resize-2", "Hires steps", "Hires sampler", "Hires schedule type",
  "Mask mode", "Masked content", "Inpaint area", "Refiner", "Lora hashes", "Version", "Model hash", "VAE", "VAE hash", "Prompt syntax", "Tiling", "RNG"];

/** The sampler and schedule of a label such as `DPM++ 2M Karras`, by their names here. */
function samplerOf(label = "", type = "", { schedulers, schedules }) {
  const same = (a, b) => a.toLowerCase() === b.toLowerCase();
  const fits = ({ title }) => label.toLowerCase().startsWith(title.toLowerCase());
  const [sampler] = schedulers.filter(fits).sort((a, b) => b.title.length - a.title.length);
  const rest = type || label.slice(sampler?.title.length ?? 0).trim();
  const schedule = schedules.find(({ title, name }) => same(title, rest) || same(name, rest));
  return { scheduler: sampler?.name ?? label, schedule: schedule?.name ?? rest };
}

/** The options of a mask. */
function maskOf(parameters) {
  const starts = { fill: "fill", "latent noise": "noise", "latent nothing": "nothing" };
  return {
    mask_fill: starts[parameters["Masked content"]] ?? "", mask_invert: parameters["Mask mode"] === "Inpaint not masked",
    only_masked: parameters["Inpaint area"] === "Only masked",
  };
}

/** The scale of a hires pass, unless its size has other proportions. */
function scaleOf(parameters, { width, height }) {
  const [wide, high] = (parameters["Hires resize"] ?? "").split("x").map(Number);
  if (parameters["Hires upscale"] || !(wide > 0)) return Number(parameters["Hires upscale"]);
  return wide * height === high * width ? wide / width : NaN;
}

function hiresOf(parameters, values, info) {
  const scale = scaleOf(parameters, values);
  if (!(scale > 0)) return { hires: false, strength: parameters["Denoising strength"] };
  const strength = Number(parameters["Denoising strength"]) || 0.75;
  // There it is the steps that are taken, here those of which the strength is the share.
  const steps = Number(parameters["Hires steps"]);
  const { scheduler, schedule } = samplerOf(parameters["Hires sampler"], parameters["Hires schedule type"], info);
  return {
    hires: true, hires_scale: scale, hires_strength: strength, hires_steps: steps ? Math.ceil(steps / strength) : "",
    hires_scheduler: scheduler, hires_schedule: schedule,
  };
}

/** The values of the form, its LoRAs, and the names of the parameters that it does not have. */
export function valuesOf(parameters, info) {
  const values = {};
  for (const [name, field] of Object.entries(FIELDS)) {
    if (parameters[name] !== undefined) values[field] = parameters[name];
  }
  const prompt = parameters.Prompt ?? "";
  const loras = [...prompt.matchAll(TAG)].map(([, name, text, scale]) => (
    { name, scale: Number(scale), ...text && { text_encoder_scale: Number(text) } }
  ));
  values.prompt = prompt.replace(TAG, "").trim();
  values.negative_prompt ??= "";
  Object.assign(values, samplerOf(parameters.Sampler, parameters["Schedule type"], info), hiresOf(parameters, values, info), maskOf(parameters));
  // Its name may be followed by a hash.
  if (parameters.Refiner) values.refiner = parameters.Refiner.replace(/ \[[0-9a-f]+\]$/, "");
  if (parameters["Clip skip"]) values.clip_skip = Math.max(0, Number(parameters["Clip skip"]) - 1);
  values.prompt_syntax = parameters["Prompt syntax"] ?? "a1111";
  values.tiling = parameters.Tiling === "True";
  const isLeft = name => !(name in FIELDS) && !READ.includes(name) && !(name === "Hires resize" && values.hires);
  const left = Object.keys(parameters).filter(isLeft);
  return { values, loras, left };
}
