// Contents fold on narrow screens; a click on a column's head sorts its table.
const narrow = window.matchMedia("(max-width: 68rem)");
const contents = document.querySelector(".contents");
if (contents && narrow.matches) contents.open = false;

function value(cell) {
  const text = cell ? cell.textContent.trim() : "";
  const number = parseFloat(text.replace(/[\s,%]/g, ""));
  return Number.isNaN(number) ? text : number;
}

for (const table of document.querySelectorAll(".scroll table")) {
  const heads = table.tHead ? table.tHead.rows[table.tHead.rows.length - 1].cells : [];
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
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
