// The page: a picture in, its likeliest classes and where the network looked out, all in this browser.

import { env, InferenceSession, Tensor } from "onnxruntime-web/wasm";

import { heatmap } from "./heatmap.js";
import { plan, prepare, softmax } from "./preprocess.js";

const SHOWN = 5;
const element = (id) => document.getElementById(id);
const [drop, file, photo, heat, seen] = ["drop", "file", "photo", "heat", "seen"].map(element);
const [samples, message, bars, details, looked] = ["samples", "message", "bars", "details", "looked"].map(element);

let about; // model.json
let session;
let newest = 0; // number of the picture that was asked for last
let activations; // of the picture that is shown

class PictureError extends Error {}

async function load() {
  env.wasm.wasmPaths = new URL("./", document.baseURI).href;
  env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const answer = await fetch("model.json");
  if (!answer.ok) throw new Error(`model.json: ${answer.status} ${answer.statusText}`);
  about = await answer.json();
  session = await InferenceSession.create("model.onnx", { executionProviders: ["wasm"] });
  const [height, width] = about.preprocessing.img_size;
  await run(new Float32Array(3 * height * width)); // the first pass is slower
  for (const name of about.samples) samples.append(sampleButton(name));
  file.disabled = false;
  say(`Ready. It knows ${about.labels.length} kinds of things: ${about.labels.join(", ")}.`);
  const threads = env.wasm.numThreads === 1 ? "1 thread" : `${env.wasm.numThreads} threads`;
  element("about").textContent =
    `${about.name}: trained on ${about.trained_on}, ${about.top1} % of its test pictures right. ` +
    `onnxruntime-web, WebAssembly, ${threads}. Photos of other things get one of the ten names all the same.`;
}

async function run(input) {
  const [height, width] = about.preprocessing.img_size;
  return session.run({ pixel_values: new Tensor("float32", input, [1, 3, height, width]) });
}

function sampleButton(name) {
  const button = document.createElement("button");
  const image = new Image();
  image.src = `samples/${name}`;
  image.alt = name.replace(/\.\w+$/, "");
  button.type = "button";
  button.dataset.sample = name;
  button.append(image);
  button.addEventListener("click", async () => {
    try {
      const answer = await fetch(image.src);
      await show(await answer.blob(), name);
      if (!message.classList.contains("error")) button.setAttribute("aria-pressed", "true");
    } catch {
      fail(`${name} could not be loaded; is the server still running?`);
    }
  });
  return button;
}

/** Classify a file and show it; what is wrong with it becomes one sentence. */
async function show(blob, name) {
  const number = ++newest;
  for (const button of samples.children) button.removeAttribute("aria-pressed");
  say(`Looking at ${name} ...`);
  try {
    const bitmap = await decode(blob, name);
    const began = performance.now();
    const prepared = prepare(pixelsOf(bitmap, name), about.preprocessing);
    const middle = performance.now();
    const outputs = await run(prepared.input);
    const end = performance.now();
    if (number !== newest) return; // another picture was chosen meanwhile
    activations = outputs.activations;
    drawPhoto(bitmap);
    seen.width = seen.height = prepared.side;
    seen.getContext("2d").putImageData(new ImageData(prepared.seen, prepared.side), 0, 0);
    element("size").textContent =
      `Seen as ${prepared.side} x ${prepared.side} px, of ${bitmap.width} x ${bitmap.height}`;
    element("time").textContent =
      `${milliseconds(middle - began)} to prepare, ${milliseconds(end - middle)} to classify`;
    list(softmax(outputs.logits.data));
    details.hidden = false;
    say(name);
  } catch (error) {
    if (number !== newest) return;
    console.warn(error);
    fail(error instanceof PictureError ? error.message : `${name} could not be classified: ${error.message}`);
  }
}

/** The picture, upright; colour profiles are ignored, as Pillow does. */
async function decode(blob, name) {
  if (blob.size === 0) throw new PictureError(`${name} is empty.`);
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new PictureError(`${name} is broken, or not a picture that this browser can read. Try a JPEG, PNG or WebP.`);
  }
}

/** RGBA of the whole picture, transparent parts on white. */
function pixelsOf(bitmap, name) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  try {
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  } catch {
    throw new PictureError(`${name} has ${bitmap.width} x ${bitmap.height} px, too many for this browser.`);
  }
}

function drawPhoto(bitmap) {
  const { side, resizedWidth, resizedHeight, left, top } = plan(bitmap.width, bitmap.height, about.preprocessing);
  const [x, y] = [bitmap.width / resizedWidth, bitmap.height / resizedHeight]; // picture pixels of one that it sees
  const context = photo.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, photo.width, photo.height);
  context.drawImage(bitmap, left * x, top * y, side * x, side * y, 0, 0, photo.width, photo.height);
  drop.classList.add("filled");
}

function list(probabilities) {
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, SHOWN);
  bars.replaceChildren(
    ...best.map((index) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.title = `Show where it looked for ${about.labels[index]}`;
      button.dataset.index = index;
      button.dataset.probability = probabilities[index];
      const label = document.createElement("span");
      label.className = "label";
      label.textContent = about.labels[index];
      const percent = document.createElement("span");
      percent.className = "percent";
      percent.textContent = `${(100 * probabilities[index]).toFixed(1)} %`;
      const bar = document.createElement("progress");
      bar.value = probabilities[index];
      button.append(label, percent, bar);
      button.addEventListener("click", () => {
        looked.checked = true;
        look(index);
      });
      item.append(button);
      return item;
    }),
  );
  look(best[0]);
}

/** Lay the activation of one class over the picture. */
function look(index) {
  const [, , rows, columns] = activations.dims;
  const cells = activations.data.subarray(index * rows * columns, (index + 1) * rows * columns);
  heat.getContext("2d").putImageData(new ImageData(heatmap(cells, rows, columns, heat.width), heat.width), 0, 0);
  element("subject").textContent = about.labels[index];
  for (const button of bars.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
  }
  drop.classList.toggle("looking", looked.checked);
}

function say(text) {
  message.textContent = text;
  message.classList.remove("error");
}

function fail(text) {
  say(text);
  message.classList.add("error");
  bars.replaceChildren();
  details.hidden = true;
  drop.classList.remove("filled", "looking");
}

function milliseconds(time) {
  return `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;
}

function showFirst(files) {
  if (files.length > 0 && session !== undefined) show(files[0], files[0].name);
}

file.addEventListener("change", () => {
  showFirst([...file.files]);
  file.value = ""; // so that the same file can be chosen again
});
looked.addEventListener("change", () => drop.classList.toggle("looking", looked.checked));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  showFirst([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => showFirst([...event.clipboardData.files]));

load().catch((error) => {
  console.error(error);
  fail(`The model could not be loaded: ${error.message}`);
});
