for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const isNumber = (row) => row.cells[column].dataset.value !== undefined;
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      // Cells without a value stay at the end.
      if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -1 : 1;
      const order = isNumber(a) ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true });
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
