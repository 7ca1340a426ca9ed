// A plan over time: fetched when it comes into view, because it is simulated anew.
const box = document.getElementById("timeline");
const seen = new IntersectionObserver(async (entries) => {
  if (!entries.some((entry) => entry.isIntersecting)) return;
  seen.disconnect();
  const kept = box.innerHTML;
  box.innerHTML = '<p class="note">Simulating…</p>';
  try {
    const reply = await fetch(box.dataset.part, { headers: { accept: "text/html" } });
    box.innerHTML = reply.ok ? await reply.text() : kept;
  } catch {
    box.innerHTML = kept;
  }
}, { rootMargin: "300px" });
seen.observe(box);
