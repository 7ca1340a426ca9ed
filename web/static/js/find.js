// Rows of a long table by words, as they are typed.
for (const box of document.querySelectorAll("[data-find]")) {
  const rows = [...document.getElementById(box.dataset.find).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const input = box.querySelector("input");
  const found = box.querySelector("[role=status]");
  box.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      const fits = words.every((word) => texts[index].includes(word));
      row.hidden = !fits;
      count += fits;
    });
    found.textContent = words.length ? `${count} of ${rows.length}` : "";
  });
}
