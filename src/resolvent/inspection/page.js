"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// A page of two runs shows one of them at a time, which the address names.
const RUN = Math.min(page.runs.length, +(new URLSearchParams(location.search).get("run") ?? 1)) - 1;
const data = page.runs[RUN];
const COUNT = data.tokens.length;
const BYTES = data.tokens.every((text, i) => i === 0 || [...text].length <= 1);

// One token and one layer are looked at, by every picture.
const view = { token: 1 + data.nats.indexOf(Math.max(...data.nats)), layer: 0 };
const onToken = [], onLayer = [];
function selectToken(index) {
  view.token = Math.max(0, Math.min(COUNT - 1, index));
  onToken.forEach((show) => show());
}
function selectLayer(index) {
  view.layer = index;
  for (const place of document.querySelectorAll(".layer"))
    place.textContent = `layer ${layerWith(place.closest("section").dataset.part) + 1} of ${data.layers.length}`;
  onLayer.forEach((show) => show());
  onToken.forEach((show) => show());
}

// ---- Words and numbers

function number(x) {
  const size = Math.abs(x);
  if (x === 0 || (size < 1e4 && size >= 1e-3)) return String(+x.toPrecision(3));
  const [digits, power] = x.toExponential(1).split("e"), raised = String(+power).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  return digits === "1.0" ? `10${raised}` : `${digits} × 10${raised}`;
}
const percent = (x) => (x < 0.001 ? "under 0.1\u00a0%" : `${(100 * x).toPrecision(x >= 0.1 ? 3 : 2)}\u00a0%`);
const tokens = (x) => (x < 10 ? x.toFixed(1) : String(Math.round(x)));
const sum = (list) => list.reduce((total, x) => total + x, 0);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const heads = (rows) => rows.map((_, h) => `head ${h + 1}`);

// What stands for a token: line ends and the like are shown, and what opens a text has a name.
function shown(index) {
  if (index === 0) return "⟨start⟩";
  return shownText(data.tokens[index]);
}
const word = (i) => data.tokens.filter((_, j) => j > 0 && data.words[j] === data.words[i]).join("");
const named = (i) => (BYTES && i > 0 ? `“${shown(i)}” in “${shownText(word(i).trim())}”` : `“${shown(i)}”`);
// Values of the tokens, added up over words where tokens are bytes.
function byWord(values) {
  if (!BYTES) return values;
  const totals = {};
  values.forEach((value, i) => (totals[data.words[i]] = (totals[data.words[i]] ?? 0) + value));
  return values.map((_, i) => totals[data.words[i]]);
}
const shownText = (text) => (text === "" ? "…" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣"));

// ---- Drawing

function set(element, attributes) {
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  return element;
}
const NS = "http://www.w3.org/2000/svg";
function svg(name, attributes = {}, parent = null, text = null) {
  const element = set(document.createElementNS(NS, name), attributes);
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}
function html(name, className = "", parent = null, text = null) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

const tip = $("tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(innerWidth - width - 4, x + 14))}px`;
  tip.style.top = `${y - height - 12 < 48 ? y + 18 : y - height - 12}px`;  // below the navigation
}
const hideTip = () => (tip.hidden = true);

// Cividis: as good with any colour vision, and in black and white.
const CIVIDIS = ["#00204d", "#00336f", "#39486b", "#575c6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46"]
  .map((colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)));
function cividis(part) {
  const place = Math.max(0, Math.min(1, part)) * (CIVIDIS.length - 1), low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  return CIVIDIS[low].map((from, i) => Math.round(from + (place - low) * (CIVIDIS[low + 1][i] - from)));
}

function scale(values, log, zoomed) {
  const finite = values.filter((x) => !log || x > 0);
  let low = Math.min(...finite), high = Math.max(...finite);
  if (!finite.length) [low, high] = [log ? 0.1 : 0, 1];
  if (!log && !zoomed) low = Math.min(low, 0);
  if (low === high) high = log ? low * 10 : low + 1;
  const ticks = log ? logTicks(low, high) : linearTicks(low, high);
  if (log || zoomed) [low, high] = [Math.min(low, ticks[0]), Math.max(high, ticks.at(-1))];
  else high = Math.max(high, ticks.at(-1));
  const on = log ? Math.log10 : (x) => x;
  const part = (x) => (log && x <= 0 ? 0 : (on(x) - on(low)) / (on(high) - on(low) || 1));
  return { low, high, ticks, part };
}
function linearTicks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((s) => s * power >= rough);
  return range(Math.floor((high - low) / step + 1e-9) + 1).map((i) => +((Math.ceil(low / step - 1e-9) + i) * step).toPrecision(12));
}
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low) + 1e-9), last = Math.ceil(Math.log10(high) - 1e-9);
  if (last - first <= 2) {
    const fine = range(last - first + 1).flatMap((i) => [1, 2, 5].map((m) => +(m * 10 ** (first + i)).toPrecision(2)));
    const from = fine.findLastIndex((x) => x <= low * 1.001), to = fine.findIndex((x) => x >= high * 0.999);
    return fine.slice(Math.max(0, from), to < 0 ? fine.length : to + 1);
  }
  const step = Math.ceil((last - first) / 6);
  return range(Math.ceil((last - first) / step) + 1).map((i) => 10 ** (first + i * step));
}

const STYLES = range(16).map((i) => ({ stroke: `var(--c${i % 8})`, "stroke-dasharray": i < 8 ? "none" : "7 2" }));

/* An SVG as wide as its figure, drawn anew when that changes, with a place that pointer and arrow keys move.
   `draw(canvas, width)` returns `{ nearest(x, y), move(key), tip(place), at(place) }`. */
function picture(figure, label, height, draw) {
  const canvas = svg("svg", { class: "chart", role: "img", tabindex: 0, "aria-label": label, height }, figure);
  let drawing = null, place = null, width = 0;
  function redraw() {
    width = canvas.getBoundingClientRect().width;
    if (!width) return;
    canvas.replaceChildren();
    canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing = draw(canvas, width);
  }
  function point(to) {
    place = to;
    drawing.select?.(place);
    const box = canvas.getBoundingClientRect(), [x, y] = drawing.at(place);
    showTip(drawing.tip(place), box.left + x, box.top + y);
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    point(drawing.nearest(event.clientX - box.left, event.clientY - box.top));
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("blur", hideTip);
  canvas.addEventListener("keydown", (event) => {
    const to = drawing.move(event.key, place);
    if (to === undefined) return;
    event.preventDefault();
    point(to);
  });
  new ResizeObserver(() => canvas.getBoundingClientRect().width !== width && redraw()).observe(canvas);
  redraw();
  return redraw;
}
const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
const clamp = (index, count) => Math.max(0, Math.min(count - 1, index));

// Axes of a chart; returns where its coordinates lie.
function axes(canvas, width, height, x, y, names) {
  const left = 54, right = width - 12, top = 10, bottom = height - 40;
  const px = (v) => left + x.part(v) * (right - left), py = (v) => bottom - y.part(v) * (bottom - top);
  for (const tick of y.ticks) {
    svg("line", { class: "grid", x1: left, x2: right, y1: py(tick), y2: py(tick) }, canvas);
    svg("text", { x: left - 6, y: py(tick) + 4, "text-anchor": "end" }, canvas, number(tick));
  }
  for (const tick of x.ticks) {
    svg("line", { class: "axis", x1: px(tick), x2: px(tick), y1: bottom, y2: bottom + 4 }, canvas);
    svg("text", { x: px(tick), y: bottom + 17, "text-anchor": "middle" }, canvas, number(tick));
  }
  svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, canvas);
  svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, canvas, names[0]);
  const middle = (top + bottom) / 2;
  svg("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, canvas, names[1]);
  return { px, py, top, bottom };
}

/* Curves over shared places. `chart()` returns `{ x, lines: [{ name, y, style, className, x }], marks }`, `options` are
   `names` of the axes, `log` for the vertical one, `byToken` where places are tokens. */
function curves(id, label, chart, options) {
  const height = 260;
  const redraw = picture($(id), label, height, (canvas, width) => {
    const { x, lines, marks = [], range: limits } = chart();
    const last = options.byToken ? COUNT - 1 : x.at(-1) || 1, across = scale([last], false);
    across.part = (v) => v / last;
    across.ticks = across.ticks.filter((tick) => tick <= last);
    const along = limits ? scale(limits, false, limits[0] !== 0) : scale(lines.flatMap((line) => line.y), options.log);
    const { px, py, top, bottom } = axes(canvas, width, height, across, along, options.names);
    for (const mark of marks) svg("line", { class: "mark", x1: px(mark), x2: px(mark), y1: top, y2: bottom }, canvas);
    const plot = limits ? svg("svg", { x: px(across.low), y: top - 4, width: width, height: bottom - top + 8, viewBox: `${px(across.low)} ${top - 4} ${width} ${bottom - top + 8}` }, canvas) : canvas;
    for (const { y, style, className, x: own = x, dots = true } of lines) {
      const d = y.map((value, i) => `${i ? "L" : "M"}${px(own[i]).toFixed(1)} ${py(value).toFixed(1)}`).join("");
      svg("path", { class: `curve ${className ?? ""}`, d, ...style }, plot);
      if (own !== x && dots) own.forEach((v, i) => svg("circle", { cx: px(v), cy: py(y[i]), r: 4, fill: style.stroke }, plot));
    }
    const cursor = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" }, canvas);
    const put = (value) => set(cursor, { x1: px(value), x2: px(value), visibility: "visible" });
    const closest = (value, list = x) => list.reduce((best, v, i) => (Math.abs(v - value) < Math.abs(list[best] - value) ? i : best), 0);
    if (options.byToken) {
      canvas.follow = () => put(view.token);
      canvas.follow();
    }
    return {
      nearest: (at) => closest(x.reduce((best, v) => (Math.abs(px(v) - at) < Math.abs(px(best) - at) ? v : best), x[0])),
      move: (key, place) => (key in steps ? clamp((place ?? closest(options.byToken ? view.token : x[0])) + steps[key], x.length) : undefined),
      select: (place) => (options.byToken ? selectToken(x[place]) : put(x[place])),
      at: (place) => [px(x[place]), top + 20],
      tip: (place) => [options.head(x[place]), ...lines.filter((line) => line.name).map(({ name, y, x: own = x }) =>
        `${name}: ${number(y[own === x ? place : closest(x[place], own)])}`)].join("\n"),
    };
  });
  if (options.byToken) onToken.push(() => $(id).querySelector("svg").follow?.());
  return redraw;
}
function legend(id, entries) {
  const place = $(id).querySelector(".legend") ?? html("div", "legend", $(id));
  place.replaceChildren(...entries.map(({ name, style }) => {
    const entry = html("span");
    svg("path", { d: "M0 5H28", class: "curve", ...style, fill: "none", "stroke-width": 2 }, svg("svg", { viewBox: "0 0 28 10", "aria-hidden": true }, entry));
    entry.append(name);
    return entry;
  }));
}
function ramp(parent, low, high, colours = range(10).map((i) => `rgb(${cividis(i / 9)})`)) {
  const place = html("div", "legend", parent);
  html("span", "", place, low);
  html("span", "ramp", place).style.background = `linear-gradient(90deg,${colours})`;
  html("span", "", place, high);
}

// ---- The pictures

function drawHeader() {
  $("name").textContent = page.runs.map((run) => run.name).join(" and ");
  document.title = `Inside ${$("name").textContent}`;
  $("version").textContent = data.version;
  for (const { text, section } of data.findings) html("a", "", html("li", "", $("findings")), text).href = `#${section}`;
  for (const [name, value] of Object.entries(data.facts)) {
    const fact = html("div", "", $("facts"));
    html("dt", "", fact, name);
    html("dd", "", fact, value);
  }
  for (const section of document.querySelectorAll("section")) html("a", "", $("sections"), section.dataset.name).href = `#${section.id}`;
  $("run-choice").hidden = $("shown-run").hidden = page.runs.length === 1;
  $("shown-run").textContent = `Shown: ${data.name}`;
  page.runs.forEach(({ name }, r) => html("option", "", $("run"), name).setAttribute("value", r));
  $("run").value = RUN;
  $("run").addEventListener("change", () => {
    location.search = `?run=${+$("run").value + 1}`;
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

function table(parent, rows, head) {
  const place = html("table", "", html("div", "wide", parent));
  if (head) head.forEach((cell) => html("th", "", place.tHead?.rows[0] ?? place.createTHead().insertRow(), cell));
  for (const row of rows) {
    const line = place.insertRow();
    row.forEach((cell) => (html("td", "", line, cell)));
  }
}

function drawComparison() {
  const { words, nats, bits_per_byte: bits } = page.comparison, [first, second] = page.runs;
  const better = bits[0] <= bits[1] ? 0 : 1, gain = nats[0].map((loss, i) => loss - nats[1][i]), most = Math.max(...gain.map(Math.abs)) || 1;
  $("comparison-summary").textContent = `${page.runs[better].name} predicts these ${words.length} words better: ${number(bits[better])} bits per byte against ${number(bits[1 - better])}.`;
  const findings = [...new Set(page.runs.flatMap((run) => run.findings.map((finding) => finding.section)))];
  const finding = (run, section) => run.findings.find((one) => one.section === section)?.text ?? "–";
  const facts = Object.keys({ ...first.facts, ...second.facts });
  table($("comparison-table"), [
    ["Bits per byte, same words", ...bits.map(number)],
    ...facts.map((name) => [name, ...page.runs.map((run) => run.facts[name] ?? "–")]),
    ...findings.map((section) => [$(section)?.dataset.name ?? section, ...page.runs.map((run) => finding(run, section))]),
  ], ["", first.name, second.name]);
  const box = $("comparison-text");
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "The words, coloured by the difference of their losses");
  const say = (i) => ($("comparison-word").textContent = `“${shownText(words[i].trim())}”: ${nats.map((row, r) => `${page.runs[r].name} ${number(row[i])}`).join(", ")} nats`);
  words.forEach((text, i) => {
    const span = html("span", gain[i] > 0 ? "second" : "first", box, text);
    span.style.setProperty("--a", (Math.abs(gain[i]) / most).toFixed(3));
    span.addEventListener("pointerover", () => say(i));
  });
  say(gain.reduce((best, x, i) => (Math.abs(x) > Math.abs(gain[best]) ? i : best), 0));
  ramp($("comparison-text").parentElement, `${first.name} better`, `${second.name} better`, ["var(--influence)", "transparent", "var(--surprise)"]);
  const runs = page.runs.filter((run) => run.curves?.step.length);
  if (!runs.length) return $("comparison-curve").remove();
  const all = runs.flatMap((run) => run.curves.step);
  const lines = runs.flatMap((run, r) => [
    { name: `${run.name}, training`, x: run.curves.step, y: run.curves.bits_per_byte, style: STYLES[r], className: "thin", dots: false },
    { name: `${run.name}, held out`, x: run.curves.validation_step, y: run.curves.validation_bits_per_byte, style: STYLES[r] },
  ]).filter((line) => line.y.length);
  curves("comparison-curve", "Learning curves of both runs; arrow keys move", () => ({ x: [...new Set(all)].sort((a, b) => a - b), lines, range: zoom(runs.map((run) => run.curves)) }),
    { names: ["step", "bits per byte"], head: (step) => `step ${Math.round(step)}` });
  legend("comparison-curve", lines.map(ending));
}

// A text in shades, `shade(i)` from 0 to 1; pointer and arrow keys move the token.
function drawText(id, shade) {
  const box = $(id);
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "The text; the arrow keys move from token to token");
  const spans = range(COUNT).map((i) => {
    const special = i === 0 || data.tokens[i] === "";
    const span = html("span", special ? "special" : "", box, special ? shown(i) : data.tokens[i].replaceAll("\n", "⏎\n"));
    span.style.setProperty("--a", shade(i).toFixed(3));
    span.dataset.index = i;
    return span;
  });
  box.addEventListener("pointerover", (event) => {
    const index = event.target.dataset.index;
    if (index !== undefined) selectToken(+index);
  });
  box.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    selectToken(view.token + steps[event.key]);
    const span = spans[view.token];
    box.scrollTop += Math.min(0, span.offsetTop - box.offsetTop - box.scrollTop) || Math.max(0, span.offsetTop + 40 - box.offsetTop - box.scrollTop - box.clientHeight);
  });
  let here = null;
  onToken.push(() => {
    here?.classList.remove("here");
    (here = spans[view.token]).classList.add("here");
  });
  return spans;
}

function drawSurprise() {
  const losses = byWord([0, ...data.nats]), most = Math.max(...losses), mean = sum(data.nats) / data.nats.length;
  drawText("surprise-text", (i) => losses[i] / most);
  ramp($("surprise-text").parentElement, "expected", `a loss of ${number(most)} nats`, ["transparent", "var(--surprise)"]);
  $("mean-loss").textContent = `Here it is ${number(mean)} nats per token on average, as if the model chose among ${number(Math.exp(mean))} equally likely tokens.`;
  if (BYTES) $("mean-loss").textContent += " The tokens are bytes: colours show the sum over a word.";
  onToken.push(drawGuesses);
}
function drawGuesses() {
  const i = view.token, place = $("guesses");
  place.replaceChildren();
  if (i === 0) return html("p", "", place, "The text begins here. Choose another token to see what the model expected.");
  const loss = data.nats[i - 1], before = data.tokens.slice(Math.max(1, i - (BYTES ? 30 : 8)), i).join("");
  const line = html("p", "", place, "Expected after ");
  html("span", "token", line, `…${shownText(before)}`);
  // As many rows at every token, so that nothing below moves.
  const rows = [...data.expected[i - 1], [data.tokens[i], Math.exp(-loss)]];
  rows.forEach(([text, p], r) => {
    const last = r === rows.length - 1, row = html("div", last ? "guess right" : "guess", place);
    html("span", "token", row, shownText(text));
    html("span", "share", html("span", "track", row)).style.width = `${100 * p}%`;
    html("span", "value", row, `${percent(p)}${last ? " ← the text" : ""}`);
  });
}

function drawInfluence() {
  const norms = data.influence, shades = byWord(norms), positive = shades.filter((x) => x > 0), high = Math.max(...positive), low = Math.max(Math.min(...positive), high / 1e4), floor = Math.max(...norms) / 1e6;
  const about = (i) => (i < norms.length ? `${named(i)}, ${COUNT - 1 - i} before the last: ${number(norms[i])}` : `${named(i)} is the prediction`);
  curves("influence-curve", "Influence of every token on the last prediction; arrow keys move", () =>
    ({ x: range(norms.length), lines: [{ y: norms.map((norm) => Math.max(norm, floor)), style: STYLES[0] }] }),
    { names: ["token", "gradient"], log: true, byToken: true, head: about });
  const shade = (i) => (i < norms.length && shades[i] > 0 ? Math.max(0, Math.log(shades[i] / low) / Math.log(high / low || 2)) : 0);
  drawText("influence-text", shade)[COUNT - 1].classList.add("target");
  $("influence-text").scrollTop = $("influence-text").scrollHeight;
  ramp($("influence"), number(low), number(high), ["transparent", "var(--influence)"]);
}

// Vertical limits of learning curves: those of the last nine tenths of the steps.
function zoom(runs) {
  const late = runs.flatMap(({ step, bits_per_byte: bits, validation_bits_per_byte: held }) => [...bits.filter((_, i) => step[i] > step.at(-1) / 10), ...held.slice(-Math.ceil(held.length * 0.9))]);
  return [Math.min(...late), Math.max(...late)];
}
const ending = ({ name, style, y }) => ({ name: `${name}: ${number(y.at(-1))} at the end`, style });
function drawLearning() {
  const all = data.curves, whole = $("whole-curve");
  const lines = [{ name: "training", y: all.bits_per_byte, style: STYLES[0], className: "thin" }];
  if (all.validation_step.length) lines.push({ name: "held-out text", y: all.validation_bits_per_byte, x: all.validation_step, style: STYLES[1] });
  const head = (step) => `step ${Math.round(step)}`;
  const redraw = curves("learning-curve", "Bits per byte over training steps; arrow keys move", () =>
    ({ x: all.step, lines, range: whole.checked ? [0, Math.max(...lines.flatMap((line) => line.y))] : zoom([all]) }),
    { names: ["step", "bits per byte"], head });
  whole.addEventListener("change", redraw);
  legend("learning-curve", lines.map(ending));
  curves("gradient-curve", "Gradient norm over training steps; arrow keys move", () =>
    ({ x: all.step, lines: [{ name: "gradient", y: all.grad_norm, style: STYLES[2], className: "thin" }] }),
    { names: ["step", "gradient norm"], log: true, head });
}

const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];
const halfLife = (rate) => Math.LN2 / (rate * data.dt);
// The heads of all memories, the slowest first.
function decayRows() {
  const rows = data.layers.flatMap((layer, l) => !layer.memory ? [] : layer.gamma.map((gamma, h) => ({ gamma, l, h, half: halfLife(median(gamma)) })));
  return rows.sort((a, b) => b.half - a.half);
}
// One pixel for every head and token, coloured by the logarithm of the rate between two limits.
function paintRates(canvas, rows, low, high) {
  Object.assign(canvas, { width: COUNT, height: rows.length });
  const context = canvas.getContext("2d"), image = context.createImageData(COUNT, rows.length);
  rows.forEach(({ gamma }, r) => gamma.forEach((rate, i) => image.data.set([...cividis((Math.log(rate) - low) / (high - low || 1)), 255], 4 * (r * COUNT + i))));
  context.putImageData(image, 0, 0);
}
// The tokens below their columns; where they are bytes, the words that they make.
function labelColumns(parent, cell) {
  const words = html("div", BYTES ? "words level" : "words", parent);
  for (let i = 0; i < COUNT; ) {
    let end = i + 1;
    while (BYTES && i > 0 && end < COUNT && data.words[end] === data.words[i]) end++;
    html("span", "", words, BYTES && i > 0 ? shownText(word(i).trim()) : shown(i)).style.width = `${(end - i) * cell}px`;
    i = end;
  }
}
function drawDecay() {
  const rows = decayRows(), all = rows.flatMap((row) => row.gamma);
  const low = Math.log(all.reduce((a, b) => Math.min(a, b))), high = Math.log(all.reduce((a, b) => Math.max(a, b)));
  const cell = BYTES ? 9 : 16, tall = Math.max(3, Math.min(15, Math.floor(320 / rows.length))), every = Math.ceil(13 / tall);
  const overview = html("div", "overview", $("decay-map")), small = html("canvas", "", overview), frame = html("div", "frame", overview);
  paintRates(small, rows, low, high);
  small.style.height = `${Math.max(24, Math.min(72, 3 * rows.length))}px`;
  const strip = html("div", "strip", $("decay-map")), labels = html("div", "rows", strip);
  rows.forEach(({ l, h, half }, r) => (html("div", "", labels, r % every ? "" : `L${l + 1} H${h + 1} · ${tokens(half)}`).style.height = `${tall}px`));
  labels.style.lineHeight = `${Math.max(tall, 12)}px`;
  const inner = html("div", "inner", html("div", "scroll", strip)), window = inner.parentElement;
  Object.assign(window, { tabIndex: 0, ariaLabel: "Decay rates by head and token; arrow keys move" });
  window.setAttribute("role", "group");
  const canvas = html("canvas", "", inner);
  paintRates(canvas, rows, low, high);
  Object.assign(canvas.style, { width: `${COUNT * cell}px`, height: `${rows.length * tall}px` });
  labelColumns(inner, cell);
  const column = html("div", "column", inner);
  Object.assign(column.style, { width: `${cell}px`, height: "100%" });
  const slide = () => Object.assign(frame.style, { left: `${(100 * window.scrollLeft) / inner.clientWidth}%`, width: `${Math.min(100, (100 * window.clientWidth) / inner.clientWidth)}%` });
  window.addEventListener("scroll", slide);
  new ResizeObserver(slide).observe(window);
  for (const kind of ["pointerdown", "pointermove"]) overview.addEventListener(kind, (event) => {
    const box = overview.getBoundingClientRect();
    if (event.buttons) selectToken(Math.floor(((event.clientX - box.left) / box.width) * COUNT));
  });
  inner.addEventListener("pointermove", (event) => {
    const box = inner.getBoundingClientRect(), i = clamp(Math.floor((event.clientX - box.left) / cell), COUNT), row = rows[clamp(Math.floor((event.clientY - box.top) / tall), rows.length)];
    selectToken(i);
    const { top } = inner.getBoundingClientRect();
    showTip(`${named(i)}, layer ${row.l + 1}, head ${row.h + 1}\nΓ = ${number(row.gamma[i])}, half is forgotten in ${tokens(halfLife(row.gamma[i]))} tokens`, event.clientX, top);
  });
  inner.addEventListener("pointerleave", hideTip);
  window.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    selectToken(view.token + steps[event.key]);
  });
  onToken.push(() => {
    const left = view.token * cell;
    column.style.left = `${left}px`;
    if (left < window.scrollLeft || left + cell > window.scrollLeft + window.clientWidth) window.scrollLeft = left - window.clientWidth / 2;
    slide();
  });
  ramp($("decay-map"), `keeps: half is gone in ${tokens(halfLife(Math.exp(low)))} tokens`, `forgets: half is gone in ${tokens(halfLife(Math.exp(high)))} tokens`);
}

// The layer that is looked at, or the first one that has a part which this one lacks.
const layerWith = (name) => (!name || data.layers[view.layer][name] ? view.layer : data.layers.findIndex((layer) => layer[name]));
const part = (name) => data.layers[layerWith(name)][name];

function drawLooks() {
  const chart = () => ({ x: range(COUNT), lines: part("attention").distance.map((y, h) => ({ name: `head ${h + 1}`, y, style: STYLES[h % 16] })) });
  onLayer.push(curves("looks-curve", "Distance to which the heads attend; arrow keys move", chart,
    { names: ["token", "tokens back"], byToken: true, head: (i) => `at ${named(i)}` }));
  onLayer.push(() => legend("looks-curve", heads(part("attention").distance).map((name, h) => ({ name, style: STYLES[h % 16] }))));
  const spans = drawText("looks-text", () => 0);
  let marked = [];
  onToken.push(() => {
    const { places, weights } = part("attention"), i = view.token, share = {};
    marked.forEach((j) => spans[j].style.setProperty("--a", 0));
    places.forEach((row, h) => row[i].forEach((j, t) => (share[j] = (share[j] ?? 0) + weights[h][i][t] / places.length)));
    marked = Object.keys(share).map(Number);
    const most = Math.max(...Object.values(share));
    marked.forEach((j) => spans[j].style.setProperty("--a", (share[j] / most).toFixed(3)));
    $("looks-heads").replaceChildren();
    table($("looks-heads"), places.map((row, h) => [`head ${h + 1}`, ...row[i].map((j, t) => (weights[h][i][t] > 0 ? `${percent(weights[h][i][t])} ${named(j)}${j < i ? `, ${i - j} back` : ""}` : ""))]));
  });
}

function drawEnergy() {
  const every = data.consolidation_interval;
  if (every) $("energy").querySelector(".consolidation").textContent = ` Every ${every} tokens, at the dotted lines, SNR filter and resonance act on the memory (next two pictures).`;
  const chart = () => {
    const { energy, bound } = part("memory");
    return {
      x: data.places,
      lines: energy.flatMap((y, h) => [
        { name: `head ${h + 1}`, y, style: STYLES[h % 16] },
        { name: `bound ${h + 1}`, y: bound[h], style: { ...STYLES[h % 16], "stroke-dasharray": "4 4" }, className: "thin" },
      ].slice(0, $("bounds").checked ? 2 : 1)),
      marks: every ? range(Math.floor(COUNT / every)).map((i) => (i + 1) * every - 1) : [],
    };
  };
  const redraw = curves("energy-curve", "Energy of the memories; arrow keys move", chart,
    { names: ["token", "energy"], log: true, byToken: true, head: (i) => `after ${named(i)}` });
  const label = () => legend("energy-curve", [...heads(part("memory").energy).map((name, h) => ({ name, style: STYLES[h % 16] })),
    ...($("bounds").checked ? [{ name: "bound", style: { stroke: "var(--soft)", "stroke-dasharray": "4 4" } }] : [])]);
  $("bounds").addEventListener("change", () => (redraw(), label()));
  onLayer.push(redraw, label);
}

function drawSnr() {
  const edges = data.snr_edges, height = 240, bins = edges.length - 1, threshold = data.snr_threshold;
  const shares = () => range(bins).map((b) => { const rows = part("memory").snr; return sum(rows.map((row) => row[b])) / rows.length; });
  onLayer.push(() => {
    const { signal, strength } = part("memory");
    $("signal").textContent = `In this layer, ${percent(sum(signal) / signal.length)} of the components are above the threshold.`;
    $("strength").textContent = `Strength in this layer, by head: ${strength.map(number).join(", ")}.`;
  });
  onLayer.push(picture($("snr-bars"), "Histogram of signal-to-noise ratios; arrow keys move", height, (canvas, width) => {
    const bars = shares(), x = scale(edges, true), y = scale(bars.map((b) => 100 * b), false);
    const { px, py, top, bottom } = axes(canvas, width, height, x, y, ["size over the root mean square", "% of components"]);
    bars.forEach((bar, b) => svg("rect", { class: Math.sqrt(edges[b] * edges[b + 1]) > threshold ? "bar above" : "bar", x: px(edges[b]) + 0.5, y: py(100 * bar), width: px(edges[b + 1]) - px(edges[b]) - 1, height: bottom - py(100 * bar) }, canvas));
    svg("line", { class: "threshold", x1: px(threshold), x2: px(threshold), y1: top, y2: bottom }, canvas);
    svg("text", { class: "threshold-label", x: px(threshold) + 6, y: top + 12 }, canvas, `threshold ${number(threshold)}: signal →`);
    const hover = svg("rect", { class: "hover", y: top, height: bottom - top, visibility: "hidden" }, canvas);
    return {
      nearest: (at) => clamp(edges.findLastIndex((edge) => px(edge) <= at), bins),
      move: (key, place) => (key in steps ? clamp((place ?? -1) + steps[key], bins) : undefined),
      select: (b) => set(hover, { x: px(edges[b]), width: px(edges[b + 1]) - px(edges[b]), visibility: "visible" }),
      at: (b) => [px(edges[b + 1]), py(100 * bars[b])],
      tip: (b) => `${b ? `${number(edges[b])} to` : "up to"} ${number(edges[b + 1])}${b === bins - 1 ? " and more" : ""}: ${percent(bars[b])}`,
    };
  }));
}

function drawResonance() {
  const first = part("memory").modes.energy, count = first.length, modes = first[0].length, tall = Math.max(14, Math.min(26, 260 / count));
  const height = count * tall + 40, threshold = data.resonance_threshold, low = Math.log((threshold || 0.1) / 3), high = Math.log(Math.max(...data.layers.flatMap((layer) => layer.memory?.modes.energy.flat() ?? [])));
  onLayer.push(picture($("resonance-map"), "Energy by head and mode; arrow keys move", height, (canvas, width) => {
    const { energy, gate } = part("memory").modes, left = 58, cell = (width - left - 56) / modes;
    const ringing = (h) => energy[h].filter((e) => e > threshold).length;
    energy.forEach((row, h) => {
      svg("text", { x: left - 6, y: h * tall + tall / 2 + 4, "text-anchor": "end" }, canvas, `head ${h + 1}`);
      svg("text", { x: width - 50, y: h * tall + tall / 2 + 4 }, canvas, `${ringing(h)} of ${modes}`);
      row.forEach((e, m) => {
        const x = left + m * cell, y = h * tall;
        svg("rect", { x, y, width: cell - 0.5, height: tall - 1, fill: `rgb(${cividis((Math.log(e + 1e-9) - low) / (high - low))})` }, canvas);
        if (e <= threshold) svg("path", { class: "cross", d: `M${x + 2} ${y + 2}L${x + cell - 3} ${y + tall - 4}` }, canvas);
      });
    });
    svg("text", { x: left + (modes * cell) / 2, y: height - 8, "text-anchor": "middle" }, canvas, "mode, slow to fast");
    const hover = svg("rect", { class: "hover", width: cell, height: tall, visibility: "hidden" }, canvas);
    return {
      nearest: (x, y) => [clamp(Math.floor(y / tall), count), clamp(Math.floor((x - left) / cell), modes)],
      move: (key, place) => {
        const [h, m] = place ?? [0, -1], up = { ArrowUp: -1, ArrowDown: 1 }[key];
        return up ? [clamp(h + up, count), Math.max(0, m)] : key in steps ? [h, clamp(m + steps[key], modes)] : undefined;
      },
      select: ([h, m]) => set(hover, { x: left + m * cell, y: h * tall, visibility: "visible" }),
      at: ([h, m]) => [left + (m + 1) * cell, (h + 1) * tall],
      tip: ([h, m]) => `head ${h + 1}, mode ${m + 1}: ${number(energy[h][m])} times the mean energy\n${energy[h][m] > threshold ? "resonates" : "does not resonate"}; each consolidation keeps ${percent(gate[h][m])} of it`,
    };
  }));
  ramp($("resonance-map"), `${number(Math.exp(low))} of the mean energy`, `${number(Math.exp(high))} times the mean`);
}

function drawResolvent() {
  const layer = () => data.layers[view.layer];
  const ratio = (h) => layer().real[h].map((x, i) => Math.hypot(x, layer().imaginary[h][i]) / layer().resolvent_bound[h][i]);
  $("resolvent").querySelector(".bound").textContent = data.layers[0].gamma ? "1/(κΓ + ζ)" : "1/ζ";
  onLayer.push(curves("resolvent-share", "Size of the resolvent over its bound; arrow keys move", () =>
    ({ x: range(COUNT), lines: layer().real.map((_, h) => ({ name: `head ${h + 1}`, y: ratio(h), style: STYLES[h % 16] })), range: [0, 1] }),
    { names: ["token", "|g| / bound"], byToken: true, head: (i) => `at ${named(i)}` }));
  legend("resolvent-share", heads(data.layers[0].real).map((name, h) => ({ name, style: STYLES[h % 16] })));
  const place = html("div", "panels", $("resolvent-path")), height = 170, shades = 8;
  range(data.layers[0].real.length).forEach((h) => {
    const panel = html("div", "", place);
    const redraw = picture(panel, `The resolvent of head ${h + 1} over its bound, in the complex plane; arrow keys move along the text`, height, (canvas, width) => {
      const { real, imaginary, resolvent_bound: bounds } = layer(), re = real[h].map((x, i) => x / bounds[h][i]), im = imaginary[h].map((x, i) => x / bounds[h][i]);
      const unit = Math.min((width - 24) / 2, height - 44), px = (v) => width / 2 + v * unit, py = (v) => height - 24 - v * unit;
      svg("text", { x: 8, y: 16 }, canvas, `head ${h + 1}`);
      svg("line", { class: "axis", x1: 8, x2: width - 8, y1: py(0), y2: py(0) }, canvas);
      svg("line", { class: "axis", x1: px(0), x2: px(0), y1: 8, y2: py(0) }, canvas);
      for (const side of [-1, 0, 1]) svg("text", { x: px(side), y: height - 8, "text-anchor": "middle" }, canvas, number(side));
      svg("path", { class: "limit", d: `M${px(-1)} ${py(0)}A${unit} ${unit} 0 0 1 ${px(1)} ${py(0)}` }, canvas);
      for (const s of range(shades)) {
        const d = range(COUNT).filter((i) => Math.floor((i * shades) / COUNT) === s).map((i) => `M${px(re[i]).toFixed(1)} ${py(im[i]).toFixed(1)}h0`).join("");
        svg("path", { class: "dots", d, style: `stroke: color-mix(in srgb, var(--late) ${Math.round((100 * s) / (shades - 1))}%, var(--early))` }, canvas);
      }
      const here = svg("circle", { class: "here", r: 5 }, canvas);
      canvas.follow = () => set(here, { cx: px(re[view.token]), cy: py(im[view.token]) });
      canvas.follow();
      const distance = (i, x, y) => (px(re[i]) - x) ** 2 + (py(im[i]) - y) ** 2;
      return {
        nearest: (x, y) => range(COUNT).reduce((best, i) => (distance(i, x, y) < distance(best, x, y) ? i : best), 0),
        move: (key) => (key in steps ? clamp(view.token + steps[key], COUNT) : undefined),
        select: selectToken,
        at: (i) => [px(re[i]), py(im[i])],
        tip: (i) => `${named(i)}\ng = ${number(real[h][i])} + ${number(imaginary[h][i])}i\n|g| = ${number(Math.hypot(re[i], im[i]))} of its bound, ${number(bounds[h][i])}`,
      };
    });
    onLayer.push(redraw);
    onToken.push(() => panel.querySelector("svg").follow?.());
  });
  ramp($("resolvent-path"), "first token", "last token", ["var(--early)", "var(--late)"]);
}

function drawBar() {
  const select = $("layer"), slider = $("token"), losses = byWord([0, ...data.nats]);
  data.layers.forEach((_, l) => html("option", "", select, `${l + 1}`).setAttribute("value", l));
  select.addEventListener("change", () => selectLayer(+select.value));
  slider.max = COUNT - 1;
  slider.addEventListener("input", () => selectToken(+slider.value));
  onToken.push(() => {
    const i = view.token, parts = [];
    slider.value = i;
    slider.setAttribute("aria-valuetext", `${i + 1} of ${COUNT}: ${shown(i)}`);
    if (i) parts.push(`loss ${number(data.nats[i - 1])}, probability ${percent(Math.exp(-data.nats[i - 1]))}`, `expected “${shownText(data.expected[i - 1][0][0])}”`);
    if (BYTES && i) parts.push(`loss of “${shownText(word(i).trim())}” ${number(losses[i])}`);
    const token = html("span", "token", null, shown(i));
    $("reading").replaceChildren(`${i + 1} of ${COUNT} `, token, ` ${parts.join(" · ")}`);
  });
}

// What a model does not have is not shown.
const memories = data.layers.some((layer) => layer.memory);
const sections = {
  comparison: [page.comparison, drawComparison],
  surprise: [true, drawSurprise],
  influence: [true, drawInfluence],
  learning: [data.curves?.step.length, drawLearning],
  decay: [memories, drawDecay],
  looks: [data.layers.some((layer) => layer.attention), drawLooks],
  energy: [memories, drawEnergy],
  snr: [memories && data.snr_threshold !== null, drawSnr],
  resonance: [memories && data.resonance_threshold !== null, drawResonance],
  resolvent: [true, drawResolvent],
};
$("missing").hidden = data.facts.Phase !== "1";
for (const [id, [exists]] of Object.entries(sections)) if (!exists) $(id).remove();
drawHeader();
drawBar();
for (const [exists, draw] of Object.values(sections)) if (exists) draw();
selectLayer(0);
