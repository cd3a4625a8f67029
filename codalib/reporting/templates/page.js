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
