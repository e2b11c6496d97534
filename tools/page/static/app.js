// The page of tools/app.py and of the export format "web": passes an image to the predictor, and shows the answer.
// predictor.js is one of two modules, which export the same: tools/page/static/predictor.js asks the server, and
// tools/page/web/predictor.js computes in the browser.

import * as predictor from "./predictor.js";

// matplotlib's colour map "inferno" at equal steps: perceptually uniform, so readable in greyscale too.
const INFERNO = ["#000004", "#0b0724", "#210c4a", "#3d0965", "#57106e", "#71196e", "#8a226a", "#a32c61", "#bc3754",
  "#d24644", "#e45a31", "#f1731d", "#f98e09", "#fcac11", "#f9cb35", "#f2ea69", "#fcffa4"];
const COLOURS = INFERNO.map((colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16)));
const DRAWN_WIDTH = 1120; // minimum width of the heat map in pixels: twice its width on a desktop
const SHARPEST = 64; // images with fewer pixels in a row are shown pixel by pixel

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)} %`;

// What is shown. `head` is "mean" or a number from 0; `row` and `column` are the chosen window's.
const state = {
  about: null, answer: null, request: null, view: "attention", block: null, head: "mean", row: 0, column: 0,
  isKept: false, strength: { attention: 70, prediction: 60 },
};

// ---------------------------------------------------------------------------------------------------------------------
// Taking an image
// ---------------------------------------------------------------------------------------------------------------------

async function send(file) {
  state.request?.abort();
  const request = state.request = new AbortController();
  if (file.size > state.about.max_bytes) {
    return refuse(`${file.name ?? "The file"} is larger than ${Math.floor(state.about.max_bytes / 2 ** 20)} MB. Make it smaller.`);
  }
  setBusy(true);
  try {
    const answer = await predictor.predict(file, request.signal);
    if (!request.signal.aborted) show(answer); // otherwise, another image was sent
  } catch (error) {
    if (!request.signal.aborted) fail(error, file.name);
  }
  if (!request.signal.aborted) setBusy(false);
}

function refuse(message) {
  setBusy(false);
  $("error").textContent = message;
  $("error").hidden = false;
}

// Shows an error: a refusal's own words, preceded by the file's name if there is one, or that something failed.
function fail(error, name) {
  if (error instanceof predictor.Refusal) return refuse(name ? `${name}: ${error.message}` : error.message);
  refuse(predictor.FAILURE);
  console.error(error);
}

function setBusy(isBusy) {
  if (isBusy) $("error").hidden = true;
  $("busy").hidden = !isBusy;
  document.body.classList.toggle("busy-now", isBusy);
}

function listenForImages() {
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    $("file").value = ""; // so that the same file can be chosen again
    if (file) send(file);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    sendFirst(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => sendFirst(event.clipboardData.files));
}

function sendFirst(files) {
  if (files.length) send(files[0]);
  else refuse("That is not a file. Save the image first, then drop its file.");
}

// ---------------------------------------------------------------------------------------------------------------------
// Showing the answer
// ---------------------------------------------------------------------------------------------------------------------

function show(answer) {
  const { picture, overlay } = answer;
  state.answer = { ...answer, width: picture.width, height: picture.height };
  paint($("picture"), picture);
  $("picture").style.imageRendering = picture.width < SHARPEST ? "pixelated" : "auto";
  if (overlay) paint($("overlay"), overlay);
  $("overlay").style.imageRendering = state.about.kind === "segmentor" ? "pixelated" : "auto"; // labels do not mix
  $("empty").hidden = true;
  document.querySelector("main").classList.remove("blank");
  for (const id of ["shown", "results"]) $(id).hidden = false;
  listRows(answer.rows, answer.summary);
  listTimes(answer.times);
  chooseViews();
  chooseBlocks();
  $("live").textContent = `Prediction: ${answer.summary}`;
}

function paint(canvas, picture) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").drawImage(picture, 0, 0);
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function listRows(rows, summary) {
  $("rows").replaceChildren(...rows.map((row) => {
    const bar = element("span", "bar");
    bar.style.width = `${100 * row.share}%`;
    const name = element("span", "name", row.name);
    if (row.colour) {
      const colour = element("span", "colour");
      colour.style.background = row.colour;
      name.prepend(colour);
    }
    return element("li", "", bar, name, element("span", "share", percent(row.share)));
  }));
  if (!rows.length) $("rows").append(element("li", "", element("span", "name", summary)));
}

function listTimes(times) {
  $("times").replaceChildren(...Object.entries(times).flatMap(([step, milliseconds]) =>
    [element("dt", "", step), element("dd", "", `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`)]));
}

// ---------------------------------------------------------------------------------------------------------------------
// Choosing what to see
// ---------------------------------------------------------------------------------------------------------------------

// Fills a group with radio buttons. `choices` are [value, text, description].
function fill(id, choices, chosen, choose) {
  const group = $(id);
  group.querySelectorAll("label").forEach((label) => label.remove());
  for (const [value, text, description] of choices) {
    const button = Object.assign(document.createElement("input"), { type: "radio", name: id, value, checked: value === chosen });
    button.setAttribute("aria-label", description ?? text);
    button.addEventListener("change", () => choose(value));
    const label = element("label", "", button, element("span", "pill", text));
    if (description) label.title = description;
    group.append(label);
  }
}

function chooseViews() {
  const { answer } = state;
  const views = [];
  if (answer.overlay) views.push(["prediction", "Prediction"]);
  if (answer.blocks.length) views.push(["attention", "Attention"]);
  if (!views.some(([view]) => view === state.view)) state.view = views[0]?.[0] ?? "";
  $("attention-title").textContent = answer.overlay ? "On the picture" : "Attention among windows";
  $("note").textContent = answer.note;
  $("note").hidden = !answer.note;
  $("views").hidden = views.length < 2;
  fill("views", views, state.view, (view) => { state.view = view; applyView(); });
}

function applyView() {
  const { answer, view } = state;
  const isAttention = view === "attention";
  for (const id of ["heat", "window", "scale", "blocks", "hint"]) $(id).hidden = !isAttention;
  $("overlay").hidden = view !== "prediction";
  $("stage").tabIndex = isAttention ? 0 : -1;
  document.querySelector(".slider").hidden = !view;
  $("strength").value = state.strength[view] ?? 0;
  if (isAttention) chooseHeads();
  else {
    $("heads").hidden = true;
    $("reading").textContent = state.about.kind === "detector" ? answer.summary : "";
  }
  setStrength();
}

function chooseBlocks() {
  const { blocks } = state.answer;
  const labels = blocks.map((block) => block.label);
  if (!labels.includes(state.block)) state.block = labels[0] ?? null;
  fill("blocks", blocks.map((block) => [block.label, block.label === "rollout" ? "All" : block.label, describe(block)]),
    state.block, chooseBlock);
  const block = currentBlock();
  if (block) [state.row, state.column] = state.isKept ? inside(block, state.row, state.column) : [block.rows >> 1, block.columns >> 1];
  applyView();
}

function describe(block) {
  const windows = `${block.rows} × ${block.columns} windows`;
  if (block.label === "rollout") return `All blocks together (attention rollout), ${windows}`;
  const [stage, index] = block.label.split(".");
  return `Stage ${stage}, block ${index}, ${windows}`;
}

function chooseHeads() {
  const block = currentBlock();
  const numbers = block.is_mean ? [] : [...Array(block.heads).keys()];
  if (!numbers.includes(state.head)) state.head = "mean";
  $("heads").hidden = numbers.length < 2;
  fill("heads", [["mean", "Mean", "Mean over the heads"], ...numbers.map((head) => [head, `${head}`, `Head ${head}`])],
    state.head, (head) => { state.head = head; drawHeat(); });
  drawHeat();
}

const currentBlock = () => state.answer?.blocks.find((block) => block.label === state.block);

// The pixel in the middle of the chosen window stays chosen when the grid changes.
function chooseBlock(label) {
  const before = currentBlock();
  const centre = [(state.column + 0.5) * before.width, (state.row + 0.5) * before.height];
  state.block = label;
  [state.row, state.column] = windowAt(...centre);
  chooseHeads();
}

function setStrength() {
  $("stage").classList.toggle("grey", state.view === "attention" && state.strength.attention > 0);
  $("heat").style.opacity = state.strength.attention / 100;
  $("overlay").style.opacity = state.strength.prediction / 100;
}

// ---------------------------------------------------------------------------------------------------------------------
// Heat map
// ---------------------------------------------------------------------------------------------------------------------

// Weight that one window (row of the matrix) gives another (column), for the chosen head or the mean over heads.
function weight(block, from, to) {
  const n = block.rows * block.columns;
  if (state.head !== "mean") return block.weights[(state.head * n + from) * n + to];
  let sum = 0;
  for (let head = 0; head < block.heads; head++) sum += block.weights[(head * n + from) * n + to];
  return sum / block.heads;
}

// One scale for all windows of a block and head, to compare windows. It reaches at least twice the uniform weight:
// otherwise, uniform attention would look strong.
function highest(block) {
  block.highest ??= new Map();
  if (!block.highest.has(state.head)) {
    const n = block.rows * block.columns;
    let found = 2 / n;
    for (let from = 0; from < n; from++) for (let to = 0; to < n; to++) found = Math.max(found, weight(block, from, to));
    block.highest.set(state.head, found);
  }
  return block.highest.get(state.head);
}

function colour(value) {
  const position = Math.min(Math.max(value, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(position), COLOURS.length - 2);
  const [a, b] = [COLOURS[low], COLOURS[low + 1]];
  return `rgb(${a.map((part, index) => Math.round(part + (position - low) * (b[index] - part))).join()})`;
}

function drawHeat() {
  const block = currentBlock();
  const { answer, row, column } = state;
  if (!block) return;
  const canvas = $("heat");
  const factor = Math.max(1, Math.ceil(DRAWN_WIDTH / answer.width));
  canvas.width = factor * answer.width;
  canvas.height = factor * answer.height;
  const context = canvas.getContext("2d");
  const max = highest(block);
  const edge = (index, side) => Math.round(index * side * factor);
  for (let r = 0; r < block.rows; r++) {
    for (let c = 0; c < block.columns; c++) {
      const [left, top] = [edge(c, block.width), edge(r, block.height)];
      context.fillStyle = colour(weight(block, row * block.columns + column, r * block.columns + c) / max);
      context.fillRect(left, top, edge(c + 1, block.width) - left, edge(r + 1, block.height) - top);
    }
  }
  drawWindow(block);
  $("highest").textContent = percent(max);
  $("even").style.left = `${100 / (block.rows * block.columns * max)}%`;
  $("reading").textContent = reading(block);
}

function drawWindow(block) {
  const { answer, row, column } = state;
  const { style } = $("window");
  const [left, top] = [column * block.width, row * block.height];
  style.left = `${100 * left / answer.width}%`;
  style.top = `${100 * top / answer.height}%`;
  style.width = `${100 * Math.min(block.width, answer.width - left) / answer.width}%`;
  style.height = `${100 * Math.min(block.height, answer.height - top) / answer.height}%`;
  $("window").classList.toggle("kept", state.isKept);
}

function reading(block) {
  const { row, column } = state;
  const [own, n] = [row * block.columns + column, block.rows * block.columns];
  let strongest = 0;
  for (let to = 1; to < n; to++) if (weight(block, own, to) > weight(block, own, strongest)) strongest = to;
  const target = strongest === own ? "itself" : `row ${Math.floor(strongest / block.columns)}, column ${strongest % block.columns}`;
  const rest = strongest === own ? "" : `, to itself ${percent(weight(block, own, own))}`;
  return `The window in row ${row}, column ${column} of ${block.rows} × ${block.columns} attends most to ${target}: ` +
    `${percent(weight(block, own, strongest))}${rest}. With uniform attention, each would get ${percent(1 / n)}.${state.isKept ? " Kept." : ""}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// Choosing a window
// ---------------------------------------------------------------------------------------------------------------------

function windowAt(x, y) {
  const block = currentBlock();
  return inside(block, Math.floor(y / block.height), Math.floor(x / block.width));
}

function inside(block, row, column) {
  return [Math.min(Math.max(row, 0), block.rows - 1), Math.min(Math.max(column, 0), block.columns - 1)];
}

function choose(row, column) {
  [state.row, state.column] = inside(currentBlock(), row, column);
  drawHeat();
}

function setKept(isKept) {
  state.isKept = isKept;
  drawHeat();
}

function chooseAtPointer(event) {
  const box = $("stage").getBoundingClientRect();
  const { width, height } = state.answer;
  choose(...windowAt((event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height));
}

let announcing; // timer: only the window where the keys stop is announced

function pressKey(event) {
  if (state.view !== "attention" || event.altKey || event.ctrlKey || event.metaKey) return;
  const block = currentBlock();
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -block.columns], End: [0, block.columns] };
  if (event.key in moves) choose(state.row + moves[event.key][0], state.column + moves[event.key][1]);
  else if (event.key === "Enter" || event.key === " ") setKept(!state.isKept);
  else return;
  event.preventDefault();
  clearTimeout(announcing);
  announcing = setTimeout(() => { $("live").textContent = $("reading").textContent; }, 400);
}

function listenForWindows() {
  const stage = $("stage");
  const isFree = () => state.view === "attention" && !state.isKept;
  stage.addEventListener("pointermove", (event) => { if (isFree()) chooseAtPointer(event); });
  stage.addEventListener("click", (event) => {
    if (state.view !== "attention") return;
    const isTouch = event.pointerType === "touch"; // a finger does not hover, so a tap only chooses
    if (isTouch || !state.isKept) chooseAtPointer(event);
    if (!isTouch) setKept(!state.isKept);
  });
  stage.addEventListener("keydown", pressKey);
  $("strength").addEventListener("input", () => {
    state.strength[state.view] = Number($("strength").value);
    setStrength();
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Starting
// ---------------------------------------------------------------------------------------------------------------------

function listSamples(samples) {
  $("samples").replaceChildren(...samples.map(({ name, label }) => {
    const image = Object.assign(document.createElement("img"), { src: `samples/${name}`, alt: label, loading: "lazy" });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < SHARPEST));
    const button = element("button", "", image);
    button.type = "button";
    button.title = label;
    button.addEventListener("click", async () => {
      try {
        send(await (await fetch(`samples/${name}`)).blob());
      } catch (error) {
        fail(error);
      }
    });
    return button;
  }));
}

async function start() {
  const about = state.about = await predictor.describe();
  const { model, classes, input, resume } = about.facts; // `resume` is the checkpoint's name, if known
  document.querySelector("h1").textContent = model;
  document.title = `${model} · SepViT`;
  const facts = [`${classes} classes`, `input ${input}`, resume].filter(Boolean).join(" · ");
  $("facts").textContent = `${facts} · loading…`;
  if (about.kind !== "classifier") state.view = "prediction";
  if (about.kind === "detector") state.strength.prediction = 100;
  $("prediction-title").textContent = { segmentor: "Classes, by area", detector: "Objects, by score" }[about.kind] ?? "Prediction";
  $("colours").style.background = `linear-gradient(to right, ${INFERNO.join()})`;
  listSamples(about.samples);
  listenForImages();
  listenForWindows();
  const device = await predictor.load().finally(() => { $("facts").textContent = facts; });
  $("facts").textContent += ` · on ${device}`;
}

start().catch((error) => fail(error));
