// The moving part of a run's page: told by server-sent events, drawn by the server.
const box = document.getElementById("live");
const said = document.getElementById("live-said");
const run = box.dataset.run;
let waiting = false;
let again = false;
let lastWords = "";

async function refresh() {
  if (waiting) { again = true; return; }
  waiting = true;
  try {
    const reply = await fetch(`/runs/${run}/live`, { headers: { accept: "text/html" } });
    if (reply.status === 205) { location.reload(); return; }
    if (reply.ok) {
      box.innerHTML = await reply.text();
      const state = box.querySelector(".live-state").dataset;
      document.querySelector(".meta .badge").textContent = state.words;
      if (state.stopping) for (const b of document.querySelectorAll(".run-actions form button")) { b.disabled = true; b.textContent = "Stopping…"; }
      const words = box.querySelector(".live-words strong")?.textContent ?? "";
      if (words !== lastWords) { said.textContent = words; lastWords = words; }
    }
  } catch {
    // The connection is away; the stream comes back by itself and asks again.
  } finally {
    // Twice a second is as often as anybody reads.
    setTimeout(() => { waiting = false; if (again) { again = false; refresh(); } }, 400);
  }
}

function watch() {
  const stream = new EventSource(`/api/v1/runs/${run}/events`);
  for (const kind of ["status", "progress", "incumbents"]) stream.addEventListener(kind, refresh);
  stream.addEventListener("end", () => { stream.close(); location.reload(); });
  stream.onerror = () => {
    if (stream.readyState === EventSource.CLOSED) setTimeout(async () => { await refresh(); watch(); }, 2000);
  };
  addEventListener("pagehide", () => stream.close());
}
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
watch();
