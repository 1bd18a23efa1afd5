// Bits as pictures: tiles side by side, a pixel a bit.

const PLUS = [255, 209, 102, 255];
const MINUS = [38, 70, 83, 255];
const MAPS = 64; // more are not shown
const FILTERS = 32; // in each direction

/** Draw a layer's maps as tiles; gives how many are shown. */
export function drawMaps(canvas, { channels, height, width, bits }) {
  const shown = Math.min(channels, MAPS);
  const columns = 2 ** Math.ceil(Math.log2(Math.sqrt(shown)));
  const tiles = Array.from({ length: shown }, (_, i) => ({ row: Math.floor(i / columns), column: i % columns, tile: i }));
  draw(canvas, tiles, height, width, bits);
  return shown;
}

/** Draw a layer's filters, a row an output and a column an input; gives how many rows and columns are shown. */
export function drawFilters(canvas, { outputs, channels, height, width, bits }) {
  const rows = Math.min(outputs, FILTERS);
  const columns = Math.min(channels, FILTERS);
  const tiles = Array.from({ length: rows * columns }, (_, i) => {
    const row = Math.floor(i / columns);
    return { row, column: i % columns, tile: row * channels + (i % columns) };
  });
  draw(canvas, tiles, height, width, bits);
  return [rows, columns];
}

/** Draw an image of red, green and blue. */
export function drawPixels(canvas, pixels, width, height) {
  const image = sized(canvas, width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...pixels.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function sized(canvas, width, height) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  return new ImageData(width, height);
}

// Tiles with a pixel between them; tile: which of those in bits.
function draw(canvas, tiles, height, width, bits) {
  const last = tiles[tiles.length - 1];
  const columns = 1 + Math.max(...tiles.map(({ column }) => column));
  const image = sized(canvas, columns * (width + 1) - 1, (last.row + 1) * (height + 1) - 1);
  for (const { row, column, tile } of tiles) {
    for (let y = 0, at = tile * height * width; y < height; y++) {
      const line = (row * (height + 1) + y) * image.width + column * (width + 1);
      for (let x = 0; x < width; x++) image.data.set(bits[at++] ? PLUS : MINUS, 4 * (line + x));
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
