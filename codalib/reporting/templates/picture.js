// A picture whose cells can be pointed at, or on which a box can be dragged; see codalib/reporting/widgets.py.
// The keyboard does the same: arrows move the cell or the box, with Shift they change the box's size.
const STEP = 1 / 16; // of the side, for the keyboard

function render({ model, el }) {
  const frame = document.createElement("div");
  const image = document.createElement("img");
  const mark = document.createElement("div");
  frame.className = "codalib-picture";
  frame.append(image, mark);
  el.append(frame);
  Object.assign(frame.style, { position: "relative", display: "inline-block", lineHeight: 0, touchAction: "none" });
  Object.assign(image.style, { imageRendering: "pixelated", userSelect: "none" });
  Object.assign(mark.style, {
    position: "absolute", boxSizing: "border-box", pointerEvents: "none",
    border: "2px solid #D55E00", outline: "1px solid white",
  });
  image.draggable = false;
  let pinned = false;
  let start = null;

  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const set = (name, value) => {
    if (JSON.stringify(model.get(name)) !== JSON.stringify(value)) {
      model.set(name, value);
      model.save_changes();
    }
  };
  const place = (event) => {
    const area = image.getBoundingClientRect();
    return [
      clamp((event.clientY - area.top) / area.height, 0, 1),
      clamp((event.clientX - area.left) / area.width, 0, 1),
    ];
  };
  const cellAt = (event) => {
    const grid = model.get("grid");
    return place(event).map((share) => Math.min(grid - 1, Math.floor(share * grid)));
  };

  function draw() {
    const mode = model.get("mode");
    image.src = model.get("source");
    image.alt = model.get("alt");
    image.width = image.height = model.get("side");
    frame.tabIndex = mode === "view" ? -1 : 0;
    frame.setAttribute("role", mode === "view" ? "img" : "application");
    frame.setAttribute("aria-label", model.get("alt"));
    frame.style.cursor = mode === "view" ? "default" : "crosshair";
    mark.hidden = mode === "view";
    let [top, left, bottom, right] = model.get("box");
    if (mode === "cell") {
      const grid = model.get("grid");
      const [row, column] = model.get("cell");
      [top, left, bottom, right] = [row / grid, column / grid, (row + 1) / grid, (column + 1) / grid];
    }
    Object.assign(mark.style, {
      top: `${100 * top}%`, left: `${100 * left}%`,
      height: `${100 * (bottom - top)}%`, width: `${100 * (right - left)}%`,
      display: mode === "view" ? "none" : "block",
      borderStyle: mode === "cell" && !pinned ? "dashed" : "solid",
    });
  }

  frame.addEventListener("pointermove", (event) => {
    const mode = model.get("mode");
    if (mode === "cell" && !pinned) set("cell", cellAt(event));
    if (mode === "box" && start) {
      const [y, x] = place(event);
      const box = [Math.min(start[0], y), Math.min(start[1], x), Math.max(start[0], y), Math.max(start[1], x)];
      if (box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) set("box", box);
    }
  });
  frame.addEventListener("pointerdown", (event) => {
    const mode = model.get("mode");
    if (mode === "cell") {
      pinned = !pinned;
      set("cell", cellAt(event));
      draw();
    }
    if (mode === "box") {
      start = place(event);
      frame.setPointerCapture(event.pointerId);
    }
  });
  frame.addEventListener("pointerup", () => { start = null; });
  frame.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    const mode = model.get("mode");
    if (!move || mode === "view") return;
    event.preventDefault();
    event.stopPropagation(); // the notebook's own shortcuts
    if (mode === "cell") {
      const last = model.get("grid") - 1;
      pinned = true;
      set("cell", model.get("cell").map((value, axis) => clamp(value + move[axis], 0, last)));
    } else {
      const [top, left, bottom, right] = model.get("box");
      const [down, across] = move.map((value) => value * STEP);
      set("box", event.shiftKey
        ? [top, left, clamp(bottom + down, top + STEP, 1), clamp(right + across, left + STEP, 1)]
        : [top, left, bottom, right].map((value, axis) => {
            const [low, high, by] = axis % 2 ? [left, right, across] : [top, bottom, down];
            return value + clamp(by, -low, 1 - high);
          }));
    }
  });
  for (const name of ["source", "alt", "side", "mode", "grid", "cell", "box"]) model.on(`change:${name}`, draw);
  draw();
}

export default { render };
