// The interactive front: plotly.js from this server, our data, a table that is its twin.
const root = document.getElementById("explorer");
const plot = document.getElementById("plot");
const said = document.getElementById("said");
const axisX = document.getElementById("axis-x");
const axisY = document.getElementById("axis-y");
const withDominated = document.getElementById("with-dominated");
const withIntervals = document.getElementById("with-intervals");
const withLog = document.getElementById("with-log");
const withServing = document.getElementById("with-serving"); // only where plans serve in more than one way
const DOMINATED = 0, MISSES = 1, FRONT = 2, RECOMMENDED = 3, NEAREST = 4;
const WORDS = ["Dominated", "Misses a target", "On the front", "Recommended", "Nearest to the targets"];

// Of more plans than this, those beside the front are drawn on a canvas under the chart: thousands of SVG
// elements would take longer than a frame to lay out.
const MANY = 800;

let data = null;
let canvas = null; // the layer, where there are many
let drawn = ""; // what it shows
let faint = []; // its plans: {index, kind, x, y}, in pixels once drawn
let pointed = -1; // the one of them that is pointed at
let members = []; // plans of each trace, by trace
let selected = -1;
let rescored = -1;

const number = (value) => value === null || value === undefined ? "–"
  : Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });

// An amount with two decimals, as the tables have it.
const money = (value) => value >= 1 && value < 1000 ? value.toFixed(2) : number(value);

function shown(axis, value) {
  const unit = data.axes[axis].unit;
  if (value === null) return "–";
  if (unit.startsWith("USD")) return `${money(value)} ${unit}`;
  if (unit === "s") return value < 1 ? `${number(value * 1000)} ms` : `${number(value)} s`;
  return unit ? `${number(value)} ${unit}` : number(value);
}

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function title(axis) {
  const { words, unit, more } = data.axes[axis];
  return `${words}${unit ? ` (${unit})` : ""}, ${more ? "more" : "less"} is better`;
}

function text(index) {
  const parts = [data.labels[index]];
  for (const axis of new Set([axisX.value, axisY.value, "ttft", "tpot"])) {
    parts.push(`${data.axes[axis].words}: ${shown(axis, data.values[axis][index])}`);
  }
  parts.push(WORDS[data.kind[index]]);
  return parts.join("<br>");
}

// --- ways to serve: disaggregated plans are squares where the others are circles -----------------------------

const SQUARES = { circle: "square", "circle-open": "square-open" };

function isSquare(index) { return withServing !== null && data.servings[data.serving[index]] === "disaggregated"; }

// Of the chosen way to serve.
function chosen(index) { return !withServing?.value || data.servings[data.serving[index]] === withServing.value; }

// Drawn: the recommended plan stays, to see the others beside it.
function wanted(index) { return data.kind[index] >= RECOMMENDED || chosen(index); }

// Plans of some kinds that the axes have values of.
function plansOf(kinds) {
  const x = data.values[axisX.value], y = data.values[axisY.value];
  const fits = kinds.includes(FRONT) ? chosen : wanted;
  return data.kind.map((_, i) => i).filter((i) => kinds.includes(data.kind[i]) && fits(i) && x[i] !== null && y[i] !== null);
}

function traces(kinds, name, marker) {
  const plans = plansOf(kinds);
  const shapes = [[marker.symbol, plans.filter((i) => !isSquare(i))], [SQUARES[marker.symbol] ?? marker.symbol, plans.filter(isSquare)]];
  // One entry of the legend stands for both shapes.
  return shapes.filter(([, list]) => list.length).map(([symbol, list], n) => ({
    ...trace(list, name, { ...marker, symbol }, kinds.some((kind) => kind >= FRONT)), legendgroup: String(kinds), showlegend: n === 0,
  }));
}

// A line from left to right, to find the front by.
function joined(kinds, line) {
  const x = data.values[axisX.value], y = data.values[axisY.value];
  const list = plansOf(kinds).sort((a, b) => x[a] - x[b]);
  members.push([]);
  return {
    type: "scatter", mode: "lines", x: list.map((i) => x[i]), y: list.map((i) => y[i]), line, hoverinfo: "skip",
    legendgroup: String(kinds), showlegend: false,
  };
}

function trace(there, name, marker, known) {
  const x = data.values[axisX.value], y = data.values[axisY.value];
  members.push(there);
  const found = {
    type: "scatter", mode: "markers", name,
    x: there.map((i) => x[i]), y: there.map((i) => y[i]),
    hoverinfo: "text", text: there.map(text), marker,
  };
  if (withIntervals.checked && known) {
    for (const [key, axis, values] of [["error_x", axisX.value, x], ["error_y", axisY.value, y]]) {
      if (!data.low[axis]) continue;
      found[key] = {
        type: "data", symmetric: false, thickness: 1, width: 3, color: colour("--bar"),
        array: there.map((i) => Math.max(0, (data.high[axis][i] ?? values[i]) - values[i])),
        arrayminus: there.map((i) => Math.max(0, values[i] - (data.low[axis][i] ?? values[i]))),
      };
    }
  }
  return found;
}

// --- many plans: a canvas under the chart ------------------------------------------------------------------

function hollow(kind, name, marker) {
  // The legend's entry of what the canvas draws.
  members.push([]);
  return { type: "scatter", mode: "markers", name, x: [null], y: [null], marker, hoverinfo: "skip", meta: kind };
}

function layer() {
  if (!canvas) {
    canvas = document.createElement("canvas");
    canvas.className = "plot-layer";
    canvas.setAttribute("aria-hidden", "true");
    plot.prepend(canvas);
  }
  const { xaxis, yaxis } = plot._fullLayout;
  const state = JSON.stringify([
    axisX.value, axisY.value, xaxis.range, yaxis.range, xaxis._offset, xaxis._length, yaxis._offset, yaxis._length, xaxis.type,
    pointed, faint.length, plot._fullData.map((t) => t.visible), matchMedia("(prefers-color-scheme: dark)").matches,
  ]);
  if (state === drawn) return; // a target has moved, no plan
  drawn = state;
  const ratio = window.devicePixelRatio || 1;
  const wide = Math.round(xaxis._length), tall = Math.round(yaxis._length);
  canvas.style.left = `${xaxis._offset}px`;
  canvas.style.top = `${yaxis._offset}px`;
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${tall}px`;
  if (canvas.width !== wide * ratio || canvas.height !== tall * ratio) {
    canvas.width = wide * ratio;
    canvas.height = tall * ratio;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, wide, tall);
  const hidden = new Set(plot._fullData.filter((t) => t.visible !== true && t.meta !== undefined).map((t) => t.meta));
  const x = data.values[axisX.value], y = data.values[axisY.value];
  for (const [kind, name, alpha] of [[DOMINATED, "--mark-dominated", 0.55], [MISSES, "--mark-miss", 0.6]]) {
    pen.globalAlpha = alpha;
    pen.strokeStyle = colour(name);
    pen.lineWidth = kind === MISSES ? 1.2 : 1;
    pen.beginPath();
    for (const point of faint) {
      if (point.kind !== kind) continue;
      point.seen = !hidden.has(kind);
      if (!point.seen) continue;
      const a = point.x = xaxis.d2p(x[point.index]), b = point.y = yaxis.d2p(y[point.index]);
      if (!(a > -4 && b > -4 && a < wide + 4 && b < tall + 4)) { point.seen = false; continue; }
      if (kind === MISSES) {
        pen.moveTo(a - 3, b - 3); pen.lineTo(a + 3, b + 3); pen.moveTo(a - 3, b + 3); pen.lineTo(a + 3, b - 3);
      } else if (isSquare(point.index)) {
        pen.rect(a - 2.25, b - 2.25, 4.5, 4.5);
      } else {
        pen.moveTo(a + 2.5, b); pen.arc(a, b, 2.5, 0, 2 * Math.PI);
      }
    }
    pen.stroke();
  }
  const one = faint.find((point) => point.index === pointed && point.seen);
  if (one) {
    pen.globalAlpha = 1;
    pen.strokeStyle = colour("--ink");
    pen.lineWidth = 1.5;
    pen.beginPath();
    pen.arc(one.x, one.y, 6, 0, 2 * Math.PI);
    pen.stroke();
  }
}

function nearest(event) {
  if (!canvas || !faint.length) return -1;
  const box = canvas.getBoundingClientRect();
  const a = event.clientX - box.left, b = event.clientY - box.top;
  let found = -1, least = 12 * 12;
  for (const point of faint) {
    if (!point.seen) continue;
    const d = (point.x - a) ** 2 + (point.y - b) ** 2;
    if (d < least) { least = d; found = point.index; }
  }
  return found;
}

function point(index) {
  if (pointed === index) return;
  pointed = index;
  if (canvas) layer();
}

function target(axis) {
  const slider = document.querySelector(`[data-axis="${axis}"]`);
  if (slider && slider.dataset.moved) return limitOf(slider);
  return data.axes[axis].target;
}

function lines() {
  const shapes = [];
  const line = { color: colour("--mark-chosen"), width: 1.5, dash: "dash" };
  const label = (axis) => ({ text: `target ${shown(axis, target(axis))}`, font: { size: 12, color: colour("--mark-chosen") } });
  const tx = target(axisX.value), ty = target(axisY.value);
  if (tx) shapes.push({ type: "line", xref: "x", yref: "paper", x0: tx, x1: tx, y0: 0, y1: 1, line, label: { ...label(axisX.value), textposition: "end", textangle: 0, xanchor: "right", yanchor: "top" } });
  if (ty) shapes.push({ type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: ty, y1: ty, line, label: { ...label(axisY.value), textposition: "end", yanchor: "bottom" } });
  if (rescored >= 0 && data.values[axisX.value][rescored] !== null && data.values[axisY.value][rescored] !== null) {
    // A frame of constant size around the plan that is best under the moved targets.
    shapes.push({
      type: "rect", xsizemode: "pixel", ysizemode: "pixel", x0: -12, x1: 12, y0: -12, y1: 12,
      xanchor: data.values[axisX.value][rescored], yanchor: data.values[axisY.value][rescored],
      line: { color: colour("--mark-chosen"), width: 2.5 },
    });
  }
  return shapes;
}

function range(axis) {
  // Targets far from every plan would squeeze the plans into a corner.
  const shown = (i) => wanted(i) && (withDominated.checked || data.kind[i] >= FRONT);
  const values = data.values[axis].filter((v, i) => v !== null && shown(i));
  const low = Math.min(...values), high = Math.max(...values);
  const t = data.axes[axis].target;
  const top = t && t > high && t < 2 * high ? t : high;
  if (withLog.checked) {
    const pad = 0.05 * (Math.log10(top) - Math.log10(low) || 1);
    return [Math.log10(low) - pad, Math.log10(top) + pad];
  }
  const pad = 0.05 * (top - low || Math.abs(top) || 1);
  const bottom = low > 0 && low < 0.4 * top ? 0 : low - pad;
  return [bottom, top + pad];
}

function wide(axis) {
  const values = data.values[axis].filter((value) => value > 0);
  return Math.max(...values) > 20 * Math.min(...values);
}

function draw(whole = false) {
  members = [];
  faint = [];
  drawn = "";
  const soft = colour("--soft"), grid = colour("--grid");
  const all = [];
  if (withDominated.checked) {
    const beside = [
      [DOMINATED, { symbol: "circle-open", size: 5, color: colour("--mark-dominated"), opacity: 0.55, line: { width: 1 } }],
      [MISSES, { symbol: "x-thin", size: 6, color: colour("--mark-miss"), opacity: 0.6, line: { width: 1.2, color: colour("--mark-miss") } }],
    ];
    const many = !whole && data.kind.filter((kind) => kind <= MISSES).length > MANY;
    for (const [kind, marker] of beside) {
      if (many) all.push(hollow(kind, WORDS[kind], marker));
      else all.push(...traces([kind], WORDS[kind], marker));
    }
    if (many) {
      const x = data.values[axisX.value], y = data.values[axisY.value];
      const fits = (index) => x[index] !== null && y[index] !== null && (!withLog.checked || (x[index] > 0 && y[index] > 0));
      data.kind.forEach((kind, index) => { if (kind <= MISSES && wanted(index) && fits(index)) faint.push({ index, kind, x: 0, y: 0, seen: false }); });
    }
  }
  if (data.objectives.length === 2) all.push(joined([FRONT, RECOMMENDED], { color: colour("--mark-front"), width: 1 }));
  all.push(...traces([FRONT, RECOMMENDED], WORDS[FRONT], { symbol: "circle", size: 9, color: colour("--mark-front"), line: { width: 1, color: colour("--card") } }));
  all.push(...traces([RECOMMENDED, NEAREST], data.kind.includes(NEAREST) ? WORDS[NEAREST] : WORDS[RECOMMENDED], { symbol: "diamond", size: 15, color: colour("--mark-chosen"), line: { width: 1.5, color: colour("--card") } }));
  const axis = (name) => ({
    title: { text: title(name), font: { size: 13 }, standoff: 10 }, type: withLog.checked ? "log" : "linear",
    gridcolor: grid, linecolor: soft, zeroline: false, tickfont: { color: soft, size: 12 }, range: range(name), automargin: true,
    exponentformat: "none", minorloglabels: "none",
  });
  const narrow = plot.clientWidth < 560;
  const layout = {
    height: narrow ? 420 : 480, margin: { l: 64, r: 16, t: narrow ? 16 : 12, b: 56 }, hovermode: "closest", hoverdistance: 16,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 13 },
    xaxis: axis(axisX.value), yaxis: axis(axisY.value), shapes: lines(),
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 13 }, align: "left" },
    dragmode: "zoom", uirevision: `${axisX.value}|${axisY.value}|${withLog.checked}|${withServing?.value ?? ""}`,
  };
  return Plotly.react(plot, all, layout, { displayModeBar: false, displaylogo: false, showSendToCloud: false, responsive: true, doubleClick: "reset" });
}

// --- one plan at a time, in the chart and in the table ---------------------------------------------------

function find(index) {
  for (let t = members.length - 1; t >= 0; t--) {
    const p = members[t].indexOf(index);
    if (p >= 0) return { curveNumber: t, pointNumber: p };
  }
  return null;
}

function mark(index, fromChart) {
  selected = index;
  if (index < 0) point(-1);
  for (const row of document.querySelectorAll("tr.pointed")) row.classList.remove("pointed");
  if (index < 0) return;
  const row = document.querySelector(`tr[data-plan-id="${CSS.escape(data.ids[index])}"]`);
  row?.classList.add("pointed");
  if (!fromChart) {
    const found = find(index);
    if (found) Plotly.Fx.hover(plot, [found]);
    point(found ? -1 : index);
  }
  const link = document.createElement("a");
  link.href = root.dataset.plan + data.ids[index];
  link.textContent = data.labels[index];
  const rest = [...new Set([axisX.value, axisY.value, "ttft", "tpot", "cost"])]
    .map((axis) => `${data.axes[axis].words} ${shown(axis, data.values[axis][index])}`).join(" · ");
  said.replaceChildren(link, ` ${WORDS[data.kind[index]].toLowerCase()} · ${rest}`);
}

function walk(step) {
  const list = members.flatMap((m) => m).filter((i) => data.kind[i] >= FRONT);
  const x = data.values[axisX.value];
  const front = [...new Set(list)].sort((a, b) => x[a] - x[b]);
  if (!front.length) return;
  const at = front.indexOf(selected);
  const next = at < 0 ? (step > 0 ? 0 : front.length - 1) : Math.min(front.length - 1, Math.max(0, at + step));
  mark(front[next], false);
}

// --- targets that can be moved: the stored plans judged anew ------------------------------------------------

function limitOf(slider) {
  const low = Number(slider.dataset.low), high = Number(slider.dataset.high);
  return low * (high / low) ** (slider.value / 1000);
}

function judge() {
  const limits = [...document.querySelectorAll("[data-axis]")].map((s) => [s.dataset.axis, limitOf(s), s]);
  const fixed = Object.entries(data.axes).filter(([name, a]) => a.target && !limits.some(([l]) => l === name)).map(([name, a]) => [name, a.target]);
  const fits = [];
  const bounds = [...limits.map(([a, limit]) => [data.values[a], limit * (1 + 1e-9), false]), ...fixed.map(([a, limit]) => [data.values[a], limit, true])];
  for (let i = 0; i < data.ids.length; i++) {
    let ok = true;
    for (const [values, limit, unknown] of bounds) ok &&= values[i] === null ? unknown : values[i] <= limit;
    if (ok) fits.push(i);
  }
  const names = data.objectives.length ? data.objectives : ["latency", "cost"];
  const value = (a, i) => (data.axes[a].more ? -1 : 1) * (data.values[a][i] ?? 0);
  // Plain loops over plain numbers: this runs in every frame while a target moves.
  const costs = names.map((a) => Float64Array.from(fits, (i) => value(a, i)));
  const order = fits.map((_, k) => k).sort((j, k) => costs[0][j] - costs[0][k]);
  const beats = (j, k) => {
    let better = false;
    for (const cost of costs) {
      if (cost[j] > cost[k]) return false;
      if (cost[j] < cost[k]) better = true;
    }
    return better;
  };
  const front = [];
  for (const k of order) {
    let beaten = false;
    for (let n = 0; n < front.length && !beaten; n++) beaten = beats(front[n], k);
    if (!beaten) front.push(k);
  }
  // Of plans that are alike in the first objective a later one may beat an earlier one.
  const kept = front.filter((k) => !front.some((j) => beats(j, k)));
  return { fits, front: kept.map((k) => fits[k]), names, value };
}

function knee({ front, names, value }) {
  let best = -1, least = Infinity;
  const low = names.map((a) => Math.min(...front.map((i) => value(a, i))));
  const span = names.map((a, k) => Math.max(...front.map((i) => value(a, i))) - low[k]);
  for (const i of front) {
    const d = names.reduce((sum, a, k) => sum + (span[k] > 0 ? ((value(a, i) - low[k]) / span[k]) ** 2 : 0), 0);
    if (d < least) { least = d; best = i; }
  }
  return best;
}

function rescore() {
  for (const slider of document.querySelectorAll("[data-axis]")) {
    const words = shown(slider.dataset.axis, limitOf(slider));
    document.getElementById(`out-${slider.dataset.axis}`).textContent = words;
    slider.setAttribute("aria-valuetext", words);
  }
  const found = judge();
  const box = document.getElementById("what-if-said");
  const badge = document.createElement("span");
  badge.className = "badge";
  badge.textContent = "judged anew";
  badge.title = "The simulated plans, under other targets; nothing was simulated again.";
  if (!found.front.length) {
    rescored = -1;
    box.replaceChildren(badge, " No simulated plan meets these targets.");
  } else {
    rescored = knee(found);
    const link = document.createElement("a");
    link.href = root.dataset.plan + data.ids[rescored];
    link.textContent = data.labels[rescored];
    const same = data.kind[rescored] === RECOMMENDED ? " Still the recommended plan." : "";
    const words = ["cost", "ttft", "tpot", "devices"].map((a) => `${data.axes[a].words} ${shown(a, data.values[a][rescored])}`).join(" · ");
    const loose = data.bounded > 0 ? " Plans that were pruned under the first targets are not among them: looser targets may need a new search." : "";
    box.replaceChildren(badge, ` ${found.fits.length} plans fit, ${found.front.length} on the front. Best: `, link, `.${same} ${words}.${loose}`);
  }
}

let due = false;
function moved(slider) {
  slider.dataset.moved = "1";
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    rescore();
    // Shapes alone are redrawn, not five thousand points.
    Plotly.relayout(plot, { shapes: lines() });
  });
}

// --- start --------------------------------------------------------------------------------------------------

function script(src) {
  return new Promise((done, failed) => {
    const element = document.createElement("script");
    element.src = src;
    element.onload = done;
    element.onerror = failed;
    document.head.append(element);
  });
}

async function start() {
  const [reply] = await Promise.all([fetch(root.dataset.points), script(root.dataset.plotly)]);
  data = await reply.json();
  for (const select of [axisX, axisY]) {
    for (const [name, axis] of Object.entries(data.axes)) select.add(new Option(axis.words, name));
  }
  const asked = new URLSearchParams(location.search);
  axisX.value = asked.get("x") in data.axes ? asked.get("x") : data.start[0];
  axisY.value = asked.get("y") in data.axes ? asked.get("y") : data.start[1];
  // Overloaded plans may be a hundred times slower: on a linear scale they would squeeze the front together.
  withLog.checked = [axisX.value, axisY.value].some(wide);
  for (const slider of document.querySelectorAll("[data-axis]")) {
    const values = data.values[slider.dataset.axis].filter((v) => v > 0);
    const bound = Number(slider.dataset.bound || 0);
    const low = Math.min(...values, bound || Infinity) * 0.98, high = Math.max(...values, bound) * 1.02;
    Object.assign(slider.dataset, { low, high });
    slider.value = bound ? Math.round(1000 * Math.log(bound / low) / Math.log(high / low)) : 1000;
    slider.addEventListener("input", () => moved(slider));
    if (bound) document.getElementById(`out-${slider.dataset.axis}`).textContent = shown(slider.dataset.axis, bound);
    else document.getElementById(`out-${slider.dataset.axis}`).textContent = "any";
  }
  document.getElementById("chart-static").hidden = true;
  document.getElementById("chart-live").hidden = false;
  if (data.left_out) said.textContent += ` ${data.left_out.toLocaleString("en")} dominated plans are not drawn.`;
  await draw();
  plot.on("plotly_afterplot", () => {
    if (faint.length || canvas) layer();
  });
  if (faint.length) layer();
  // Plotly knows nothing of what is on the canvas; what is nearest there is pointed at here.
  let over = false;
  plot.on("plotly_unhover", () => { over = false; });
  plot.addEventListener("mousemove", (event) => {
    if (!faint.length || over || event.buttons) return;
    const index = nearest(event);
    if (index === pointed) return;
    point(index);
    if (index >= 0) mark(index, true);
  });
  plot.addEventListener("click", () => {
    if (pointed < 0) return;
    document.querySelector(`tr[data-plan-id="${CSS.escape(data.ids[pointed])}"]`)?.scrollIntoView({ block: "nearest" });
  });
  plot.on("plotly_hover", (event) => {
    over = true;
    point(-1);
    const { curveNumber, pointNumber } = event.points[0];
    mark(members[curveNumber][pointNumber], true);
  });
  plot.on("plotly_click", (event) => {
    const { curveNumber, pointNumber } = event.points[0];
    const index = members[curveNumber][pointNumber];
    mark(index, true);
    const row = document.querySelector(`tr[data-plan-id="${CSS.escape(data.ids[index])}"]`);
    row?.scrollIntoView({ block: "nearest" });
  });
  plot.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") walk(1);
    else if (event.key === "ArrowLeft") walk(-1);
    else if (event.key === "Enter" && selected >= 0) location.href = root.dataset.plan + data.ids[selected];
    else if (event.key === "Escape") { mark(-1, true); Plotly.Fx.unhover(plot); }
    else return;
    event.preventDefault();
  });
  const redraw = () => {
    const address = new URL(location.href);
    address.searchParams.set("x", axisX.value);
    address.searchParams.set("y", axisY.value);
    history.replaceState(null, "", address);
    draw();
  };
  for (const control of [axisX, axisY, withDominated, withIntervals, withLog, withServing]) control?.addEventListener("change", redraw);
  for (const row of document.querySelectorAll("tr[data-plan-id]")) {
    const index = data.ids.indexOf(row.dataset.planId);
    if (index < 0) continue;
    row.addEventListener("mouseenter", () => mark(index, false));
    row.addEventListener("focusin", () => mark(index, false));
  }
  for (const button of document.querySelectorAll("[data-image]")) {
    button.addEventListener("click", async () => {
      if (faint.length) await draw(true); // a file holds every plan
      await Plotly.downloadImage(plot, {
        format: button.dataset.image, filename: "planfront-front", width: 1100, height: 640, scale: button.dataset.image === "png" ? 2 : 1,
      });
      if (canvas) await draw();
    });
  }
  document.getElementById("reset").addEventListener("click", () => {
    Plotly.relayout(plot, { "xaxis.range": range(axisX.value), "yaxis.range": range(axisY.value) });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  root.dataset.ready = "1";
}

if (root?.dataset.plotly) {
  start().catch(() => {
    document.getElementById("chart-static").hidden = false;
    document.getElementById("chart-live").hidden = true;
  });
}
