// Paper to draw on, with a finger, a mouse, a pen or the keyboard.

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 8; // pixels that an arrow moves the pen

/** Let a canvas be drawn on; drawn() is called after every change, at most once a frame.
 *
 * tip: what shows where the keyboard's pen is; the others are inputs of colours and of a width. */
export function makePaper([canvas, tip, pen, width, ground], drawn) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let place = null; // of the pen where it is down
  let pointer = [canvas.width / 2, canvas.height / 2]; // of the keyboard's
  let down = false; // the keyboard's pen
  let waiting = false;

  function changed() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawn();
    });
  }

  function clear() {
    context.fillStyle = ground.value;
    context.fillRect(0, 0, canvas.width, canvas.height);
    changed();
  }

  function draw(from, to) {
    context.strokeStyle = pen.value;
    context.lineWidth = width.value;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    changed();
  }

  function placeOf(event) {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
  }

  function showTip() {
    const [x, y] = pointer;
    tip.hidden = false;
    tip.className = down ? "down" : "";
    tip.style.left = `${(100 * x) / canvas.width}%`;
    tip.style.top = `${(100 * y) / canvas.height}%`;
  }

  canvas.addEventListener("blur", () => (tip.hidden = true));
  canvas.addEventListener("pointerdown", (event) => {
    tip.hidden = true;
    canvas.setPointerCapture(event.pointerId);
    place = placeOf(event);
    draw(place, place);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!place) return;
    const next = placeOf(event);
    draw(place, next);
    place = next;
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (place = null));

  canvas.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault(); // of scrolling
    const before = pointer;
    if (move) pointer = pointer.map((x, i) => Math.min(canvas.width, Math.max(0, x + STEP * move[i])));
    else down = !down;
    if (down) draw(before, pointer);
    showTip();
  });

  context.fillStyle = ground.value;
  context.fillRect(0, 0, canvas.width, canvas.height);
  return { clear };
}
