// From an image of any size to the pixels that a network is shown, as `biper predict` makes them with Pillow: resized by
// averages under a triangle, columns first and then rows, in whole numbers, and its centre cut out. They are Pillow's to
// the bit, but for high images from its release 13 on, which resizes rows first there: then they differ by 1 of 255.

const ONE = 2 ** 22; // what a weight of 1 is in whole numbers

/** The pixels of an image {data, width, height} of red, green, blue and alpha, for a network; alpha is not used. */
export function fit({ data, width, height }, { shorter, height: rows, width: columns }) {
  const [wide, high] = shorter ? resizedTo(width, height, shorter) : [columns, rows];
  const left = shorter ? halfToEven((wide - columns) / 2) : 0;
  const top = shorter ? halfToEven((high - rows) / 2) : 0;
  const across = weights(width, wide, left, columns);
  const down = weights(height, high, top, rows);
  const narrow = new Uint8Array(3 * columns * height);
  for (let y = 0; y < height; y++) resize(data, 4 * width * y, 4, across, narrow, 3 * columns * y, 3);
  const pixels = new Uint8Array(3 * columns * rows);
  for (let x = 0; x < columns; x++) resize(narrow, 3 * x, 3 * columns, down, pixels, 3 * x, 3 * columns);
  return pixels;
}

function resizedTo(width, height, shorter) {
  const longer = Math.trunc((shorter * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [shorter, longer] : [longer, shorter];
}

function halfToEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

// For `count` of `to` places from `first` on: where in a line of `from` its neighbours begin, and their weights.
function weights(from, to, first, count) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: count }, (_, i) => {
    if (from === to) return { begin: first + i, shares: [ONE] };
    const centre = (first + i + 0.5) * scale;
    const begin = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(from, Math.trunc(centre + reach + 0.5));
    const heights = Array.from({ length: end - begin }, (_, k) => {
      return Math.max(0, 1 - Math.abs((begin + k - centre + 0.5) * (1 / reach)));
    });
    const sum = heights.reduce((a, b) => a + b, 0);
    return { begin, shares: heights.map((height) => Math.trunc(0.5 + (height / sum) * ONE)) };
  });
}

// One line of pixels, which lie `step` apart, to another one.
function resize(from, start, step, places, to, target, stride) {
  places.forEach(({ begin, shares }, i) => {
    let red = ONE / 2;
    let green = ONE / 2;
    let blue = ONE / 2;
    let at = start + begin * step;
    for (let k = 0; k < shares.length; k++, at += step) {
      red += shares[k] * from[at];
      green += shares[k] * from[at + 1];
      blue += shares[k] * from[at + 2];
    }
    const out = target + i * stride;
    to[out] = Math.min(255, Math.floor(red / ONE));
    to[out + 1] = Math.min(255, Math.floor(green / ONE));
    to[out + 2] = Math.min(255, Math.floor(blue / ONE));
  });
}
