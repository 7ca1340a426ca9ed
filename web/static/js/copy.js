// Copy buttons: shown only where scripts run, and they say what they did.
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  const words = button.innerHTML;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    const text = source.textContent;
    let done = false;
    try {
      await navigator.clipboard.writeText(text);
      done = true;
    } catch {
      // Without a secure context there is no clipboard; the selection can still be copied by hand.
      const range = document.createRange();
      range.selectNodeContents(source);
      const selection = getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      done = document.execCommand && document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
    setTimeout(() => { button.innerHTML = words; }, 2000);
  });
}
