document.querySelectorAll("table.sortable thead th").forEach(head => {
  const column = head.cellIndex;
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") === "descending";
    const value = row => row.cells[column].querySelector("[title]")?.title ?? row.cells[column].textContent;
    const compare = (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
    const number = row => parseFloat(value(row));
    const rows = [...body.rows].sort((a, b) => {
      const gap = number(a) - number(b);
      return (Number.isNaN(gap) ? compare(a, b) : gap) * (up ? 1 : -1);
    });
    head.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
