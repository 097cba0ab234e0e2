for (const table of document.querySelectorAll("table.ranked")) {
  const heads = [...table.tHead.rows[0].cells];
  const said = document.getElementById(table.dataset.said);
  const value = (row, column) => {
    const { name, sort } = row.cells[column].dataset;
    return name ?? (sort === "" ? null : Number(sort));
  };
  const sortBy = (head, column) => {
    const now = head.getAttribute("aria-sort");
    const direction = now === "none" ? head.dataset.first : now === "ascending" ? "descending" : "ascending";
    heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    });
    table.tBodies[0].append(...rows);
    said.textContent = `Sorted by ${head.querySelector("button").textContent.trim()}, ${direction}.`;
  };
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sortBy(head, column)));
}
const picks = [...document.querySelectorAll(".picks button")];
const show = () => {
  const picked = new Set(picks.filter((pick) => pick.ariaPressed === "true").map((pick) => pick.dataset.series));
  document.body.classList.toggle("some", picked.size > 0);
  for (const drawn of document.querySelectorAll("svg .series")) drawn.classList.toggle("picked", picked.has(drawn.dataset.series));
};
picks.forEach((pick) => pick.addEventListener("click", () => {
  pick.ariaPressed = pick.ariaPressed === "true" ? "false" : "true";
  show();
}));
