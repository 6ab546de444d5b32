// The dialog in which a mask is painted on the input image.

import { $ } from "./elements.js";

const canvas = $("mask");

const copy = () => Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });

/** Lets an image be painted on: resolves to its strokes, and the mask that they make. */
export function edit({ width, height, strokes }, address) {
  const scale = Math.min(1, 1024 / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  $("under").src = address;
  $("easel").style.setProperty("--aspect", width / height);
  if (strokes) canvas.getContext("2d").drawImage(strokes, 0, 0);
  $("mask-dialog").showModal();
  return new Promise(done => { $("mask-dialog").onclose = () => done(painted()); });
}

/** The strokes as a mask, white on black; without strokes there is none. */
function painted() {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const any = pixels.data.some((value, i) => i % 4 === 3 && value > 127);
  const strokes = copy();
  strokes.getContext("2d").drawImage(canvas, 0, 0);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  const mask = any ? copy() : null;
  mask?.getContext("2d").putImageData(pixels, 0, 0);
  return { strokes, mask };
}

let last = null;

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * canvas.width, (event.clientY - box.top) / box.height * canvas.height];
}

function stroke(event) {
  const context = canvas.getContext("2d");
  const [x, y] = place(event);
  context.globalCompositeOperation = $("rub").getAttribute("aria-pressed") === "true" ? "destination-out" : "source-over";
  context.strokeStyle = "#e2483d";
  context.lineCap = "round";
  context.lineWidth = Number($("brush").value) / 100 * Math.max(canvas.width, canvas.height);
  context.beginPath();
  context.moveTo(...last);
  // A tap draws a dot; a line of length zero would draw nothing.
  context.lineTo(x, y + 0.01);
  context.stroke();
  last = [x, y];
}

canvas.onpointerdown = event => {
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  stroke(event);
};
canvas.onpointermove = event => last && stroke(event);
canvas.onpointerup = canvas.onpointercancel = () => { last = null; };
$("rub").onclick = () => $("rub").setAttribute("aria-pressed", $("rub").getAttribute("aria-pressed") !== "true");
$("wipe").onclick = () => canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
