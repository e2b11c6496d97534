// Predicts images in the browser with ONNX Runtime Web: on WebGPU if there is one, otherwise on WebAssembly. Images stay
// in the browser. The files are written by tools/exporting/web.py.

export const FAILURE = "The network could not be loaded or run. Reload the page; the browser's console has details.";
const STRIP = 2 ** 22; // pixels that are decoded to a canvas at a time: mobile browsers limit a canvas's size
const MAX_THREADS = 4;

// An error whose message is meant for the user.
export class Refusal extends Error {}

// ---------------------------------------------------------------------------------------------------------------------
// Loading
// ---------------------------------------------------------------------------------------------------------------------

// Installs worker.js, which keeps the files for use without a network connection, and reloads the page under it: only
// then does the browser allow threads. If it still does not, the page works without.
async function isolate() {
  const { serviceWorker } = navigator; // missing without https, except on this machine
  if (!serviceWorker || serviceWorker.controller) return;
  await serviceWorker.register("worker.js");
  await serviceWorker.ready;
  if (crossOriginIsolated || sessionStorage.getItem("reloaded")) return;
  sessionStorage.setItem("reloaded", "yes");
  location.reload();
  await new Promise(() => {}); // the page ends here
}

const description = isolate().catch(console.warn).then(() => fetch("about.json")).then((reply) => reply.json());
export const describe = () => description;

// Loads runtime and network. `?device=wasm` in the page's address rules WebGPU out; `?device=webgpu` also takes a GPU
// that the browser simulates.
async function open() {
  const forced = new URLSearchParams(location.search).get("device");
  const adapter = forced !== "wasm" && await navigator.gpu?.requestAdapter();
  if (adapter && (forced || !adapter.info?.isFallbackAdapter)) {
    try {
      return await openOn("webgpu");
    } catch (error) {
      console.warn("WebGPU failed; WebAssembly is used instead:", error);
    }
  }
  return openOn("wasm");
}

async function openOn(device) {
  const runtime = await import(`./ort.${device}.bundle.min.mjs`);
  const { wasm } = runtime.env;
  wasm.numThreads = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  const session = (file, provider) =>
    runtime.InferenceSession.create(file, { executionProviders: [provider], logSeverityLevel: 3 }); // errors only
  const preprocessing = await session("preprocessing.onnx", "wasm"); // where 8-bit pixels are resized as by Pillow
  const network = await session("network.onnx", device);
  const { size } = (await description).preprocessing;
  const images = new runtime.Tensor("float32", new Float32Array(3 * size[0] * size[1]), [1, 3, ...size]);
  await network.run({ images }); // warm up
  const threads = wasm.numThreads === 1 ? "1 thread" : `${wasm.numThreads} threads`;
  return { runtime, preprocessing, network, device: device === "webgpu" ? "WebGPU" : `WebAssembly, ${threads}` };
}

const loading = description.then(open);
export const load = async () => (await loading).device;

// ---------------------------------------------------------------------------------------------------------------------
// Prediction
// ---------------------------------------------------------------------------------------------------------------------

let last = Promise.resolve(); // a session computes one image at a time

// See tools/page/static/predictor.js.
export function predict(file, signal) {
  last = last.catch(() => {}).then(() => compute(file, signal));
  return last;
}

async function compute(file, signal) {
  const [about, { runtime, preprocessing, network }] = await Promise.all([description, loading]);
  signal.throwIfAborted();
  const times = {};
  const timed = async (step, run) => {
    const start = performance.now();
    const result = await run();
    times[step] = performance.now() - start;
    return result;
  };
  const { data, dims } = await timed("decoding", () => pixelsOf(file, about));
  const pixels = new runtime.Tensor("uint8", data, dims);
  const { prepared, cropped } = await timed("preprocessing", () => preprocessing.run({ pixels }));
  const { logits, ...weights } = await timed(about.blocks.length ? "network with attention" : "network", () => network.run({ images: prepared }));
  signal.throwIfAborted();
  const shares = probabilities(logits.data, about.multi_label);
  const rows = about.classes.map((name, index) => ({ name, share: shares[index] })).sort((a, b) => b.share - a.share).slice(0, about.top);
  const labels = rows.filter(({ share }) => share >= about.threshold).map(({ name }) => name).join(", ") || "no label";
  const summary = about.multi_label ? labels : `${rows[0].name}, ${(100 * rows[0].share).toFixed(1)} %`;
  const blocks = about.blocks.map((block) => ({ ...block, weights: weights[block.label].data }));
  return { picture: await pictureOf(cropped), rows, summary, overlay: null, blocks, note: about.note, times };
}

function probabilities(logits, isMultiLabel) {
  if (isMultiLabel) return [...logits].map((logit) => 1 / (1 + Math.exp(-logit)));
  const max = Math.max(...logits);
  const values = [...logits].map((logit) => Math.exp(logit - max));
  const sum = values.reduce((total, value) => total + value);
  return values.map((value) => value / sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pixels
// ---------------------------------------------------------------------------------------------------------------------

// Decodes an image file as the training pipeline does: without colour management, transparent parts white. Returns
// H × W × 3 values from 0 to 255.
async function pixelsOf(file, about) {
  const stored = about.orientation === "stored" ? new Blob([withoutOrientation(new Uint8Array(await file.arrayBuffer()))]) : file;
  const bitmap = await createImageBitmap(stored, { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" })
    .catch(() => { throw new Refusal("This is not an image that the browser can read, or it is damaged."); });
  const { width, height } = bitmap;
  if (width * height > about.max_pixels) {
    throw new Refusal(`The image has ${Math.round(width * height / 1e6)} megapixels, more than ${about.max_pixels / 1e6}. Make it smaller.`);
  }
  const [left, top, columns, rows] = bounded(width, height, about);
  const data = new Uint8Array(3 * rows * columns);
  const step = Math.max(1, Math.floor(STRIP / columns));
  const canvas = new OffscreenCanvas(columns, Math.min(step, rows));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let written = 0;
  for (let row = 0; row < rows; row += step) {
    const count = Math.min(step, rows - row);
    context.fillStyle = "white";
    context.fillRect(0, 0, columns, count);
    context.drawImage(bitmap, -left, -top - row);
    const rgba = context.getImageData(0, 0, columns, count).data;
    for (let i = 0; i < rgba.length; i += 4) {
      data[written++] = rgba[i];
      data[written++] = rgba[i + 1];
      data[written++] = rgba[i + 2];
    }
  }
  bitmap.close();
  return { data, dims: [rows, columns, 3] };
}

// Left, top, width and height of the part that is resized: see Preprocessing.bounded in
// sepvit_lib/pipeline/preprocessing.py.
function bounded(width, height, about) {
  const { size, resize } = about.preprocessing;
  if (Math.max(width, height) <= about.max_aspect * Math.min(width, height)) return [0, 0, width, height];
  const longest = Math.ceil(about.max_aspect * size[0] * Math.min(width, height) / resize);
  const [columns, rows] = [Math.min(width, longest), Math.min(height, longest)];
  return [(width - columns) >> 1, (height - rows) >> 1, columns, rows];
}

// Overwrites a JPEG file's EXIF data: not all browsers can decode an image without turning it upright.
function withoutOrientation(bytes) {
  for (let at = 2; bytes[0] === 0xff && bytes[1] === 0xd8 && bytes[at] === 0xff && bytes[at + 1] !== 0xda; at += 2 + bytes[at + 2] * 256 + bytes[at + 3]) {
    if (bytes[at + 1] === 0xe1) bytes.fill(0, at + 4, at + 8); // the name "Exif"
  }
  return bytes;
}

// Makes a picture of 1 × 3 × H × W values from 0 to 255.
function pictureOf({ data, dims: [, , height, width] }) {
  const count = height * width;
  const rgba = new Uint8ClampedArray(4 * count).fill(255);
  for (let i = 0; i < count; i++) for (let channel = 0; channel < 3; channel++) rgba[4 * i + channel] = data[channel * count + i];
  return createImageBitmap(new ImageData(rgba, width, height));
}
