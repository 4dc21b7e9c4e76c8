// Tables fit on the page: one that is too wide gets the room of the contents on the right, then its long names break
// behind _ . / and =, then its cells are stacked.
const tables = [...document.querySelectorAll(".md-content table:not([class])")];

function breakNames(cell) {
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) found.push(texts.currentNode);
  for (const text of found) {
    const parts = text.data.split(/(?<=[_./=])(?=\w)/);
    if (/[a-z]/i.test(text.data) && parts.length > 1) text.replaceWith(...parts.flatMap(part => [document.createElement("wbr"), part]).slice(1));
  }
}

function fit() {
  document.body.classList.remove("wide");
  for (const table of tables) delete table.dataset.fit;  // no class: the theme formats tables that have none
  const tooWide = () => tables.filter(table => {
    const frame = table.closest(".md-typeset__scrollwrap") ?? table.parentElement;
    return frame.scrollWidth > frame.clientWidth;
  });
  if (tooWide().length) document.body.classList.add("wide");
  for (const way of ["tight", "stacked"]) for (const table of tooWide()) table.dataset.fit = way;
}

for (const table of tables) {
  const labels = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
  for (const row of table.rows) [...row.cells].forEach((cell, column) => { cell.dataset.label = labels[column]; breakNames(cell); });
}
for (const event of ["load", "resize"]) addEventListener(event, fit);  // the theme has put frames around them by then
