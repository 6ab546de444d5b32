// The input image of image-to-image, and its mask.

import { $, announce, warn } from "./elements.js";
import { form, put, size } from "./form.js";
import { base64 } from "./server.js";
import { edit } from "./mask.js";

/** The input image: { blob, width, height, mask, strokes }; the mask is a canvas, white in the area
 * to inpaint, the strokes are what was painted. */
let input = null;
/** The most pixels that the server generates. */
let most = 1 << 20;

export const allow = pixels => { most = pixels; };

export async function setInput(blob) {
  if (!blob?.type.startsWith("image/")) return warn("that file is not an image");
  const image = await createImageBitmap(blob).catch(() => null);
  if (!image) return warn("this browser cannot read that image");
  $("error").hidden = true;
  input = { blob, mask: null, width: image.width, height: image.height };
  // The area of the current size in the image's aspect ratio, in multiples of 8.
  const [width, height] = size();
  const area = Math.min(width * height, most);
  const scale = Math.sqrt(area / (image.width * image.height));
  const side = length => Math.max(8, Math.floor(length * scale / 8) * 8);
  // Where the model's size is not known, the server uses the image's own.
  if (area) put({ width: side(image.width), height: side(image.height) });
  URL.revokeObjectURL($("start-picture").src);
  $("start-picture").src = URL.createObjectURL(blob);
  show();
  $("start").scrollIntoView({ block: "nearest" });
  announce("Input image set");
}

function show() {
  $("drop").hidden = Boolean(input);
  $("chosen").hidden = !input;
  $("mask-fields").hidden = !input?.mask;
  $("paint").textContent = input?.mask ? "Edit mask" : "Inpaint";
}

/** The input image and its mask in base64. */
export async function encoded() {
  if (!input) return {};
  const image = await base64(input.blob);
  if (!input.mask) return { image };
  return { image, mask: await base64(await new Promise(done => input.mask.toBlob(done))) };
}

$("choose").onclick = () => $("file").click();
$("file").onchange = () => { setInput($("file").files[0]); $("file").value = ""; };
$("remove").onclick = () => { input = null; show(); $("choose").focus(); form.dispatchEvent(new Event("input")); };
$("paint").onclick = async () => {
  Object.assign(input, await edit(input, $("start-picture").src));
  show();
};
