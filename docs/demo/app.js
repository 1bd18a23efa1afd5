// The page: from an image, a drawing or the camera to the network's answer and the pictures of what it sees.

import { hasSimd, load } from "./biper.js";
import { fit } from "./image.js";
import { drawFilters, drawMaps, drawPixels } from "./pictures.js";
import { makePaper } from "./paper.js";

const NAMED = 20; // classes; of more only some are listed
const LARGEST = 2 ** 24; // pixels of an image; of a larger one the browser makes a smaller one first
const STILL = 30; // milliseconds for which the time of a run is measured
const MOVING = 4; // the same of a camera's image

const element = (id) => document.getElementById(id);
const scratch = document.createElement("canvas");
let network;
let camera = null; // the stream of a camera that is on

/** Show what is wrong; an empty text takes it away. */
function tell(text) {
  element("problem").textContent = text;
  element("problem").hidden = !text;
}

/** The pixels of what a canvas can draw, on white where it is transparent. */
function pixelsOf(source, width, height) {
  const scale = Math.min(1, Math.sqrt(LARGEST / (width * height)));
  scratch.width = Math.max(1, Math.round(width * scale));
  scratch.height = Math.max(1, Math.round(height * scale));
  const context = scratch.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, scratch.width, scratch.height);
  context.drawImage(source, 0, 0, scratch.width, scratch.height);
  return context.getImageData(0, 0, scratch.width, scratch.height);
}

/** Milliseconds of a run, the mean of as many as fit into a time, and the logits. */
function timed(pixels, budget) {
  const begin = performance.now();
  let runs = 0;
  let logits;
  do {
    logits = network.run(pixels);
    runs++;
  } while (performance.now() - begin < budget);
  return { logits, runs, milliseconds: (performance.now() - begin) / runs };
}

/** Answer an image; what it is, in words. */
function answer(image, what, budget = STILL) {
  const pixels = fit(image, network);
  const { logits, runs, milliseconds } = timed(pixels, budget);
  const guesses = network.likeliest(logits);
  drawPixels(element("shown"), pixels, network.width, network.height);
  element("shown").setAttribute("aria-label", what);
  element("shown-text").textContent = `What the network is shown: ${network.width} x ${network.height} pixels of ${what}.`;
  element("answer").replaceChildren(...guesses.map(line));
  element("none").hidden = true;
  element("time").textContent = `${milliseconds.toFixed(2)} ms an image (mean of ${runs} runs)`;
  if (budget === STILL) element("spoken").textContent = `${guesses[0].name}, ${percent(guesses[0])}`;
  lookInside();
}

const percent = ({ probability }) => `${(100 * probability).toFixed(2)} %`;

function line(guess) {
  const item = document.createElement("li");
  const [name, share] = [guess.name, percent(guess)].map((text) => {
    const part = document.createElement("span");
    part.textContent = text;
    return part;
  });
  item.append(name, " ", share);
  item.style.setProperty("--share", `${100 * guess.probability}%`);
  return item;
}

/** Draw what the chosen layer sees. */
function lookInside() {
  const layer = element("layer");
  element("inside").hidden = !network.layers.length;
  if (!network.layers.length) return;
  const { maps, filters } = network.look(layer.selectedIndex);
  const shown = drawMaps(element("maps"), maps);
  const [rows, columns] = drawFilters(element("filters"), filters);
  const ones = maps.bits.reduce((a, b) => a + b, 0) / maps.bits.length;
  const some = shown < maps.channels ? `the first ${shown} of ${maps.channels}` : `${shown}`;
  element("maps-text").textContent =
    `What it sees: ${some} maps of ${maps.height} x ${maps.width} signs. ${Math.round(100 * ones)} % of all are +1.`;
  const all = rows === filters.outputs && columns === filters.channels;
  element("filters-text").textContent =
    `Its filters of ${filters.height} x ${filters.width} signs, ${all ? "" : "the first "}${rows} outputs in rows and ` +
    `${columns} inputs in columns${all ? "" : `, of ${filters.outputs} and ${filters.channels}`}.`;
}

/** Answer an image file; says what is wrong with one that cannot be read whole. */
async function answerFile(file) {
  stopCamera();
  tell("");
  try {
    const image = await createImageBitmap(file);
    answer(pixelsOf(image, image.width, image.height), file.name);
    image.close();
  } catch (error) {
    const why = file.size === 0 ? "it is empty" : "it is damaged, or no image that this browser knows";
    tell(`${file.name} cannot be read: ${why}.`);
  }
}

function answerDropped(files) {
  if (files.length === 0) tell("What was dropped is no file: save the image first, and drop its file.");
  else if (files.length > 1) tell(`Drop one image: these are ${files.length} files.`);
  else answerFile(files[0]);
}

async function startCamera() {
  tell("");
  try {
    if (!navigator.mediaDevices) throw new Error("a page gets it by https alone, or from this machine");
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    tell(`There is no camera to be had: ${error.message}.`);
    return;
  }
  const video = element("video");
  video.srcObject = camera;
  element("camera").setAttribute("aria-pressed", "true");
  await video.play();
  watch(video);
}

function watch(video) {
  if (!camera) return;
  if (video.videoWidth) answer(pixelsOf(video, video.videoWidth, video.videoHeight), "the camera", MOVING);
  requestAnimationFrame(() => watch(video));
}

function stopCamera() {
  if (!camera) return;
  for (const track of camera.getTracks()) track.stop();
  camera = null;
  element("camera").setAttribute("aria-pressed", "false");
  element("spoken").textContent = element("answer").firstElementChild ? element("answer").firstElementChild.textContent : "";
}

function openDrawing() {
  const drawing = element("drawing");
  drawing.hidden = !drawing.hidden;
  element("draw").setAttribute("aria-expanded", String(!drawing.hidden));
  if (!drawing.hidden) element("paper").focus();
}

function listen() {
  element("file").addEventListener("change", ({ target }) => {
    if (target.files.length) answerFile(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  const drop = document.documentElement;
  const mark = (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", event.type === "dragover");
    if (event.type === "drop") answerDropped(event.dataTransfer.files);
  };
  for (const kind of ["dragover", "dragleave", "drop"]) drop.addEventListener(kind, mark);
  element("camera").addEventListener("click", () => (camera ? stopCamera() : startCamera()));
  element("draw").addEventListener("click", openDrawing);
  element("layer").addEventListener("change", lookInside);
  const paper = makePaper(["paper", "tip", "pen", "width", "ground"].map(element), () => {
    stopCamera();
    tell("");
    answer(pixelsOf(element("paper"), element("paper").width, element("paper").height), "your drawing");
  });
  element("clear").addEventListener("click", paper.clear);
}

function describe(plain) {
  const { classes } = network;
  const listed = classes.length > NAMED ? `${classes.slice(0, 5).join(", ")} and so on` : classes.join(", ");
  element("name").textContent = network.name;
  element("classes").textContent = `${classes.length} classes (${listed})`;
  element("bytes").textContent = `${network.bytes.toLocaleString("en")} bytes, weights and code`;
  element("version").textContent = network.simd ? "with SIMD" : "without SIMD";
  if (hasSimd()) {
    element("other").textContent = plain ? "use SIMD" : "compare with the plain one";
    element("other").href = plain ? "?" : "?plain";
  }
  element("layer").replaceChildren(...network.layers.map((name) => new Option(name)));
  network.run(new Uint8Array(3 * network.width * network.height)); // so that the first image finds its code compiled
}

async function start() {
  const plain = new URLSearchParams(location.search).has("plain");
  try {
    network = await load(new URL(".", import.meta.url), { simd: hasSimd() && !plain });
  } catch (error) {
    tell(`The network cannot be used: ${error.message}.`);
    return;
  } finally {
    element("loading").hidden = true;
  }
  describe(plain);
  listen();
  element("about").hidden = false;
  element("page").hidden = false;
  if ("serviceWorker" in navigator) navigator.serviceWorker.register("./offline.js").catch(() => {}); // then without
}

start();
