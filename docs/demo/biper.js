// A packed binary network in WebAssembly, for browsers and for Node.
//
//     import { load } from "./biper.mjs";
//     const network = await load();        // what lies beside this file, with SIMD where there is SIMD
//     const logits = network.run(pixels);  // a Uint8Array of red, green and blue, pixel by pixel, row by row
//     network.likeliest(logits);           // [{name, probability}, ...]

// A WebAssembly file of one function, which counts bits with SIMD.
const COUNTS_BITS = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 11, 1, 9, 0, 65, 0, 253, 15, 253, 98, 26, 11,
];

/** Whether WebAssembly has SIMD here. */
export function hasSimd() {
  return WebAssembly.validate(new Uint8Array(COUNTS_BITS));
}

/** The network in a folder that biper wrote, given by its URL, in Node also by its path; or that of a whole module's
 * bytes, which are those of one of the folder's .wasm files with those of network.bin behind them. Rejects all else. */
export async function load(source = new URL(".", import.meta.url), { simd = hasSimd() } = {}) {
  const bytes = source instanceof ArrayBuffer || ArrayBuffer.isView(source) ? source : await readBoth(source, simd);
  let module;
  try {
    module = await WebAssembly.compile(bytes);
  } catch (error) {
    throw new Error(`this is no network, or not for this browser: ${error.message}`);
  }
  const [facts] = WebAssembly.Module.customSections(module, "biper");
  if (!facts) throw new Error("this is WebAssembly, but no network of biper");
  const { exports } = await WebAssembly.instantiate(module, {});
  return network(exports, JSON.parse(new TextDecoder().decode(facts)), bytes.byteLength);
}

async function readBoth(folder, simd) {
  if (typeof folder !== "string" && !(folder instanceof URL)) {
    throw new TypeError("load takes the URL of a folder, or bytes");
  }
  const place = `${folder}`.replace(/\/*$/, "/");
  const parts = await Promise.all([simd ? "simd.wasm" : "plain.wasm", "network.bin"].map((name) => read(place + name)));
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function read(file) {
  const remote = /^(https?|blob|data):/.test(file);
  if (!remote && typeof process !== "undefined" && process.versions && process.versions.node) {
    const { readFile } = await import("node:fs/promises");
    return readFile(file.startsWith("file:") ? new URL(file) : file);
  }
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file} cannot be loaded: the server answers ${answer.status}`);
  return answer.arrayBuffer();
}

function network(exports, facts, bytes) {
  const buffer = exports.memory.buffer;
  const { height, width, classes } = facts;
  const pixels = new Uint8Array(buffer, exports.pixels(), 3 * height * width);
  const logits = new Float32Array(buffer, exports.logits(), classes.length);

  return Object.freeze({
    ...facts, // name, classes, height, width, shorter, layers
    simd: exports.simd() === 1,
    bytes, // of the WebAssembly module: weights and code

    /** The logits (Float32Array) of an image of height * width * 3 bytes. */
    run(image) {
      const fits = (image instanceof Uint8Array || image instanceof Uint8ClampedArray) && image.length === pixels.length;
      if (!fits) throw new RangeError(`an image is a Uint8Array of ${width} x ${height} x 3 = ${pixels.length} bytes`);
      pixels.set(image);
      exports.run();
      return logits.slice();
    },

    /** The likeliest classes, with their probabilities. */
    likeliest(values, count = 5) {
      const largest = Math.max(...values);
      const powers = Array.from(values, (value) => Math.exp(value - largest));
      const sum = powers.reduce((a, b) => a + b, 0);
      const order = powers.map((_, i) => i).sort((a, b) => values[b] - values[a] || a - b);
      return order.slice(0, count).map((i) => ({ name: classes[i], probability: powers[i] / sum }));
    },

    /** What the binary layer `number`, of `layers`, sees of the last image, and its weights; 1 stands for +1, 0 for -1.
     *
     * maps: {channels, height, width, bits}, bits (channels, height, width); filters: {outputs, channels, height, width,
     * bits}, bits (outputs, channels, height, width). */
    look(number) {
      const found = Number.isInteger(number) ? exports.look(number) : 0;
      if (!found) throw new RangeError(`this network has binary layers 0 to ${facts.layers.length - 1}, not ${number}`);
      const [layer, weights, signs] = new Uint32Array(buffer, found, 3);
      return { name: facts.layers[number], maps: mapsOf(buffer, layer, signs), filters: filtersOf(buffer, layer, weights) };
    },
  });
}

// The fields of a biper_layer that come first, by name (see kernels.h).
const FIELDS = ["height", "width", "channels", "outHeight", "outWidth", "outputs", "kernelHeight", "kernelWidth"];
const GROUPS = 14; // the place of another one
const LANES = 16; // output channels whose weights lie side by side

function shapeOf(buffer, address) {
  const numbers = new Int32Array(buffer, address, GROUPS + 1);
  return { ...Object.fromEntries(FIELDS.map((name, i) => [name, numbers[i]])), groups: numbers[GROUPS] };
}

// A pixel's channels lie in words of 32 bits.
function mapsOf(buffer, layer, address) {
  const { channels, height, width } = shapeOf(buffer, layer);
  const words = Math.ceil(channels / 32);
  const seen = new Uint32Array(buffer, address, height * width * words);
  const bits = new Uint8Array(channels * height * width);
  for (let channel = 0, at = 0; channel < channels; channel++) {
    for (let pixel = 0; pixel < height * width; pixel++) {
      bits[at++] = (seen[pixel * words + (channel >> 5)] >>> (channel & 31)) & 1;
    }
  }
  return { channels, height, width, bits };
}

// Blocks of up to sixteen output channels of a group; in a block tap by tap, word by word, output by output.
function filtersOf(buffer, layer, address) {
  const shape = shapeOf(buffer, layer);
  const { outputs, groups, kernelHeight: height, kernelWidth: width } = shape;
  const channels = shape.channels / groups;
  const each = outputs / groups; // of a group
  const words = Math.ceil(channels / 32);
  const taps = height * width;
  const weights = new Uint32Array(buffer, address, outputs * taps * words);
  const bits = new Uint8Array(outputs * channels * taps);
  for (let output = 0, at = 0; output < outputs; output++) {
    const inGroup = output % each;
    const lane = inGroup % LANES;
    const lanes = Math.min(LANES, each - (inGroup - lane));
    const block = (output - lane) * taps * words;
    for (let channel = 0; channel < channels; channel++) {
      for (let tap = 0; tap < taps; tap++) {
        const word = weights[block + (tap * words + (channel >> 5)) * lanes + lane];
        bits[at++] = (word >>> (channel & 31)) & 1;
      }
    }
  }
  return { outputs, channels, height, width, bits };
}
