// A config.json from a file, into the box where it can be read and changed.
const box = document.querySelector("[data-file]");
const input = box.querySelector("input");
box.hidden = false;
input.addEventListener("change", async () => {
  const file = input.files[0];
  if (file && file.size < 500_000) document.getElementById("config").value = await file.text();
});
