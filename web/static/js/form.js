// The form and its YAML in step, the traffic drawn while it is typed, drafts kept in this browser only.
const form = document.getElementById("request");
const fields = document.getElementById("fields");
const yaml = document.getElementById("yaml");
const yamlErrors = document.getElementById("yaml-errors");
const check = document.getElementById("check");
const DRAFT = "planfront-draft";
const SENT = "planfront-sent";
let asked = 0;
let typing = 0;

document.documentElement.classList.add("scripted");

function body() {
  return new URLSearchParams([...new FormData(form)].filter(([, value]) => typeof value === "string"));
}

async function post(path) {
  const reply = await fetch(path, { method: "POST", body: body(), headers: { accept: "application/json" } });
  if (!reply.ok) throw new Error(reply.status);
  return reply.json();
}

function ready(space) {
  const stuck = space.startsWith("no plan");
  check.textContent = space ? space[0].toUpperCase() + space.slice(1) : "Ready";
  check.classList.toggle("error-text", stuck);
}

function showErrors(errors, general) {
  for (const box of fields.querySelectorAll("[data-field]")) {
    const name = box.dataset.field;
    const control = document.getElementById(name) ?? box.querySelector("input:not([type=checkbox]), select, textarea");
    for (const old of box.querySelectorAll(".error")) old.remove();
    control?.removeAttribute("aria-invalid");
    const list = errors[name] ?? [];
    if (control && control.getAttribute("aria-describedby")) {
      const kept = control.getAttribute("aria-describedby").split(" ").filter((id) => id.endsWith("-hint"));
      if (kept.length) control.setAttribute("aria-describedby", kept.join(" "));
      else control.removeAttribute("aria-describedby");
    }
    list.forEach((text, index) => {
      const line = document.createElement("p");
      line.className = "error";
      line.id = `${name}-error${index + 1}`;
      line.textContent = text;
      const hint = box.querySelector(":scope > .hint");
      if (hint) hint.before(line); else box.append(line);
      if (control && index === 0) {
        control.setAttribute("aria-invalid", "true");
        const more = control.getAttribute("aria-describedby");
        control.setAttribute("aria-describedby", more ? `${line.id} ${more}` : line.id);
      }
    });
  }
  const count = Object.values(errors).flat().length + general.length;
  check.textContent = count ? `${count === 1 ? "One thing" : `${count} things`} to correct${general.length ? `: ${general[0]}` : ""}` : "";
  check.classList.toggle("error-text", count > 0);
  // Planned from the YAML, a target that cannot be read would be no target at all.
  document.getElementById("yaml-lacks").hidden = !count;
  return count;
}

async function fieldsChanged() {
  const mine = ++asked;
  save();
  try {
    const answer = await post("/form/yaml");
    if (mine !== asked) return;
    yaml.value = answer.yaml;
    yaml.removeAttribute("aria-invalid");
    yamlErrors.replaceChildren();
    document.getElementById("preview").innerHTML = answer.preview;
    if (!showErrors(answer.errors, answer.general)) ready(answer.space);
    save();
  } catch {
    check.textContent = "";
  }
}

async function yamlChanged() {
  const mine = ++asked;
  save();
  try {
    const answer = await post("/form/fields");
    if (mine !== asked) return;
    if (answer.fields !== null) {
      const open = [...fields.querySelectorAll("details")].map((d) => d.open);
      fields.innerHTML = answer.fields;
      fields.querySelectorAll("details").forEach((d, i) => { if (open[i]) d.open = true; });
      dressed();
    }
    yamlErrors.replaceChildren(...answer.errors.map((text) => {
      const line = document.createElement("p");
      line.className = "error";
      line.textContent = text;
      return line;
    }));
    yaml.toggleAttribute("aria-invalid", answer.errors.length > 0);
    document.getElementById("yaml-lacks").hidden = true;
    if (answer.errors.length) yaml.setAttribute("aria-invalid", "true");
    if (answer.errors.length) {
      check.textContent = "The YAML has something to correct";
      check.classList.add("error-text");
    } else ready(answer.space);
    save();
  } catch {
    check.textContent = "";
  }
}

function later(work) {
  clearTimeout(typing);
  typing = setTimeout(work, 350);
}

form.addEventListener("input", (event) => {
  if (event.target === yaml) later(yamlChanged);
  else if (event.target.type !== "file") later(fieldsChanged);
});
// Which of the two was typed in last decides what Ctrl+Enter plans.
let last = "form";
form.addEventListener("focusin", (event) => { last = event.target === yaml ? "yaml" : "form"; });
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit(form.querySelector(`button[name=mode][value=${last}]:not(.sr)`));
  }
});

// --- pools, without leaving the page -----------------------------------------------------------------
form.addEventListener("click", async (event) => {
  const button = event.target.closest("button[name=mode]");
  if (!button || !/^(add-pool|drop-pool-\d+)$/.test(button.value)) return;
  event.preventDefault();
  const data = body();
  data.set("mode", button.value);
  const reply = await fetch("/plan", { method: "POST", body: data, headers: { accept: "text/html" } });
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  fields.innerHTML = page.getElementById("fields").innerHTML;
  yaml.value = page.getElementById("yaml").value;
  dressed();
  const devices = fields.querySelectorAll("input[name=device]");
  devices[devices.length - 1]?.focus();
  save();
});

// --- the model in words, a trace sent from here --------------------------------------------------------
function modelFacts() {
  const name = document.getElementById("model").value.trim().toLowerCase();
  const option = [...document.querySelectorAll("#models option")].find((o) => o.value === name || o.dataset.ids.split(" ").includes(name));
  document.getElementById("model-facts").textContent = option ? option.textContent : "";
}

function upload(box) {
  const input = document.createElement("input");
  input.type = "file";
  input.id = "trace-file";
  input.setAttribute("aria-label", "Trace file");
  const words = document.createElement("span");
  words.className = "note";
  words.setAttribute("role", "status");
  box.replaceChildren(input, words);
  input.addEventListener("change", async () => {
    const file = input.files[0];
    if (!file) return;
    words.textContent = "Sending and reading…";
    words.classList.remove("error-text");
    const reply = await fetch(`/api/v1/uploads?name=${encodeURIComponent(file.name)}`, {
      method: "POST", body: file, headers: { "content-type": "application/octet-stream" },
    });
    const answer = await reply.json();
    if (!reply.ok) {
      words.textContent = answer.errors?.[0]?.message ?? answer.detail;
      words.classList.add("error-text");
      return;
    }
    const select = document.getElementById("trace");
    select.add(new Option(`${answer.name} · ${answer.requests.toLocaleString("en")} requests`, answer.path), 1);
    select.value = answer.path;
    words.textContent = `${answer.requests.toLocaleString("en")} requests, read as ${answer.format}`;
    fieldsChanged();
  });
}

function dressed() {
  modelFacts();
  for (const box of fields.querySelectorAll("[data-upload]")) upload(box);
}
fields.addEventListener("input", (event) => { if (event.target.id === "model") modelFacts(); });

// --- drafts --------------------------------------------------------------------------------------------
const first = yaml.value;
function save() {
  try { localStorage.setItem(DRAFT, yaml.value); } catch { /* a private window keeps none */ }
}
function offer() {
  let kept = null;
  try { kept = localStorage.getItem(DRAFT); } catch { return; }
  // A refused form is a draft again; one that became a run is none: it can be cloned from there.
  let sent = null;
  try {
    if (document.querySelector(".errors")) { sessionStorage.removeItem(SENT); return; }
    sent = sessionStorage.getItem(SENT);
  } catch { /* nothing is known of it */ }
  if (!kept || kept === first || kept === sent || location.search) return;
  const box = document.getElementById("draft");
  box.hidden = false;
  document.getElementById("draft-take").addEventListener("click", () => {
    yaml.value = kept;
    box.hidden = true;
    yamlChanged();
    yaml.focus();
  });
  document.getElementById("draft-drop").addEventListener("click", () => {
    try { localStorage.removeItem(DRAFT); } catch { /* nothing was kept */ }
    box.hidden = true;
  });
}
async function begin() {
  // What stands in the form is fine as it is; only the number of plans is missing.
  if (document.querySelector(".errors")) return;
  const mine = ++asked;
  try {
    const answer = await post("/form/yaml");
    if (mine === asked && !showErrors(answer.errors, answer.general)) ready(answer.space);
  } catch { /* it is a hint */ }
}
form.addEventListener("submit", (event) => {
  save();
  if (!["form", "yaml"].includes(event.submitter?.value)) return;
  try { sessionStorage.setItem(SENT, yaml.value); } catch { /* a private window keeps none */ }
});
dressed();
offer();
begin();
document.querySelector('.errors ~ form [aria-invalid="true"]')?.focus();
