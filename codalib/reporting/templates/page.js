// Contents fold on narrow screens; a click on a column's head sorts its table; long tables have a filter.
const narrow = window.matchMedia("(max-width: 68rem)");
const contents = document.querySelector(".contents");
if (contents && narrow.matches) contents.open = false;

function value(cell) {
  const text = cell ? cell.textContent.trim() : "";
  const number = parseFloat(text.replace(/[\s,%]/g, ""));
  return Number.isNaN(number) ? text : number;
}

// Whether a row holds a word somewhere; COLUMN:WORD looks into the columns whose heading begins so, numbers as a whole.
function holds(row, word, heads) {
  const at = word.indexOf(":");
  const columns = at > 0 ? heads.flatMap((head, i) => (head.startsWith(word.slice(0, at)) ? [i] : [])) : [];
  if (!columns.length) return row.textContent.toLowerCase().includes(word);
  const text = word.slice(at + 1);
  return columns.some((i) => {
    const found = value(row.cells[i]);
    return typeof found === "number" && text !== "" ? found === Number(text) : String(found).toLowerCase().includes(text);
  });
}

function addFilter(table, heads, body) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  const count = document.createElement("span");
  label.className = "filter";
  field.type = "search";
  field.placeholder = `words, or ${heads[0]}:word`;
  count.setAttribute("role", "status");
  label.append("Filter rows ", field, count);
  table.closest(".scroll").before(label);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = Array.from(body.rows);
    for (const row of rows) row.hidden = !words.every((word) => holds(row, word, heads));
    count.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  });
}

for (const table of document.querySelectorAll(".scroll table")) {
  const heads = table.tHead ? table.tHead.rows[table.tHead.rows.length - 1].cells : [];
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  if (body.rows.length >= 6) addFilter(table, Array.from(heads, (head) => head.textContent.trim().toLowerCase()), body);
  Array.from(heads).forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = Array.from(body.rows).sort((a, b) => {
        const [x, y] = [value(a.cells[column]), value(b.cells[column])];
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}

// Figures with a level slider and a wipe (levels.html.j2): of all their pictures, one is left of the line, one right.
for (const figure of document.querySelectorAll(".levels")) {
  const [level, wipe, left, right] = ["level", "wipe", "left", "right"].map((name) => figure.querySelector(`[name=${name}]`));
  const stage = figure.querySelector(".stage");
  const images = Array.from(stage.querySelectorAll("img"));
  const chosen = (side) => {
    const own = images.filter((image) => image.dataset.series === side.value);
    return own[Math.min(Number(level.value), own.length) - 1];
  };
  const draw = () => {
    const [before, after] = [chosen(left), chosen(right)];
    for (const image of images) image.className = image === after ? "right" : image === before ? "left" : "";
    stage.style.setProperty("--wipe", `${wipe.value}%`);
    level.setAttribute("aria-valuetext", `${level.value} of ${level.max} levels`);
    wipe.setAttribute("aria-valuetext", `${wipe.value} %`);
    figure.querySelector("output").textContent = `Left of the line: ${before.alt}. Right of it: ${after.alt}.`;
  };
  const drag = (event) => {
    if (!event.buttons) return;
    const box = stage.getBoundingClientRect();
    const columns = Number(getComputedStyle(figure).getPropertyValue("--columns"));
    wipe.value = 100 * (((event.clientX - box.left) / box.width * columns) % 1);
    draw();
  };
  figure.addEventListener("input", draw);
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  figure.hidden = false;
  draw();
}

// Cells that can be pointed at (codes.html.j2): all boards mark one cell, the lens enlarges the last board's.
for (const figure of document.querySelectorAll(".codes")) {
  const [views, scales] = [figure.dataset.views, figure.dataset.scales].map(JSON.parse);
  const [level, image] = ["level", "image"].map((name) => figure.querySelector(`[name=${name}]`));
  const [boards, lens] = [Array.from(figure.querySelectorAll(".board")), figure.querySelector(".lens")];
  let at = [0, 0]; // the place pointed at, from the top and the left, as fractions
  const draw = () => {
    const view = views.find((one) => one.level === Number(level.value) && one.image === Number(image ? image.value : 0));
    const { codes, columns, rows, uses, total } = view;
    let [row, column] = [rows, columns].map((count, axis) => Math.max(0, Math.min(count - 1, Math.floor(at[axis] * count))));
    const cell = Math.min(codes.length - 1, row * columns + column);
    [row, column] = [Math.floor(cell / columns), cell % columns];
    at = [(row + 0.5) / rows, (column + 0.5) / columns];
    boards.forEach((board, i) => {
      const [picture, mark] = board.children;
      if (picture.src !== view.pictures[i]) picture.src = view.pictures[i];
      board.style.aspectRatio = boards.length > 1 ? "1" : `${columns} / ${rows}`;
      Object.assign(mark.style, {
        top: `${100 * row / rows}%`, left: `${100 * column / columns}%`, height: `${100 / rows}%`, width: `${100 / columns}%`,
      });
    });
    Object.assign(lens.style, {
      backgroundImage: `url(${view.pictures.at(-1)})`, backgroundSize: `${100 * columns}% ${100 * rows}%`,
      backgroundPosition: `${100 * column / Math.max(1, columns - 1)}% ${100 * row / Math.max(1, rows - 1)}%`,
    });
    const p = scales[level.value - 1];
    const where = boards.length > 1 ? `row ${row + 1}, column ${column + 1}` : `rank ${cell + 1} of ${codes.length}`;
    const use = !uses ? "" : uses[cell] === 0 ? ", not used at this level"
      : `, ${uses[cell].toLocaleString("en")} of the level's ${total.toLocaleString("en")} tokens (${(100 * uses[cell] / total).toPrecision(2)} %)`;
    level.setAttribute("aria-valuetext", `${level.value} of ${level.max}`);
    figure.querySelector("output").textContent =
      `Level ${level.value} of ${level.max} (${p} x ${p} tokens an image), ${where}: code ${codes[cell]}${use}.${view.note ? ` Drawn with ${view.note}.` : ""}`;
    return [rows, columns];
  };
  for (const board of boards) {
    const point = (event) => {
      const box = board.getBoundingClientRect();
      at = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
      draw();
    };
    board.addEventListener("pointermove", point);
    board.addEventListener("pointerdown", point);
    board.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      at = draw().map((count, axis) => at[axis] + move[axis] / count);
      draw();
    });
  }
  figure.addEventListener("input", draw);
  figure.hidden = false;
  draw();
}
