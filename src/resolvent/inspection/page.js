"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COUNT = data.tokens.length;

// One token and one layer are looked at, by every picture.
const view = { token: 1 + data.nats.indexOf(Math.max(...data.nats)), layer: 0 };
const onToken = [], onLayer = [];
function selectToken(index) {
  view.token = Math.max(0, Math.min(COUNT - 1, index));
  onToken.forEach((show) => show());
}
function selectLayer(index) {
  view.layer = index;
  document.querySelectorAll(".layer").forEach((place) => (place.textContent = `layer ${index + 1} of ${data.layers.length}`));
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
  tip.style.top = `${y + 14 + height > innerHeight ? y - height - 10 : y + 14}px`;
}
const hideTip = () => (tip.hidden = true);

// Cividis: as good with any colour vision, and in black and white.
const CIVIDIS = ["#00204d", "#00336f", "#39486b", "#575c6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46"]
  .map((colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)));
function cividis(part) {
  const place = Math.max(0, Math.min(1, part)) * (CIVIDIS.length - 1), low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  return CIVIDIS[low].map((from, i) => Math.round(from + (place - low) * (CIVIDIS[low + 1][i] - from)));
}

function scale(values, log) {
  const finite = values.filter((x) => !log || x > 0);
  let low = Math.min(...finite), high = Math.max(...finite);
  if (!finite.length) [low, high] = [log ? 0.1 : 0, 1];
  if (!log) low = Math.min(low, 0);
  if (low === high) high = log ? low * 10 : low + 1;
  const ticks = log ? logTicks(low, high) : linearTicks(low, high);
  if (log) [low, high] = [Math.min(low, ticks[0]), Math.max(high, ticks.at(-1))];
  else high = Math.max(high, ticks.at(-1));
  const on = log ? Math.log10 : (x) => x;
  const part = (x) => (log && x <= 0 ? 0 : (on(x) - on(low)) / (on(high) - on(low)));
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
    const { x, lines, marks = [] } = chart();
    const last = options.byToken ? COUNT - 1 : x.at(-1) || 1, across = scale([last], false);
    across.part = (v) => v / last;
    across.ticks = across.ticks.filter((tick) => tick <= last);
    const along = scale(lines.flatMap((line) => line.y), options.log);
    const { px, py, top, bottom } = axes(canvas, width, height, across, along, options.names);
    for (const mark of marks) svg("line", { class: "mark", x1: px(mark), x2: px(mark), y1: top, y2: bottom }, canvas);
    for (const { y, style, className, x: own = x } of lines) {
      const d = y.map((value, i) => `${i ? "L" : "M"}${px(own[i]).toFixed(1)} ${py(value).toFixed(1)}`).join("");
      svg("path", { class: `curve ${className ?? ""}`, d, ...style }, canvas);
      if (own !== x) own.forEach((v, i) => svg("circle", { cx: px(v), cy: py(y[i]), r: 4, fill: style.stroke }, canvas));
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
  $("name").textContent = data.name;
  document.title = `Inside ${data.name}`;
  $("version").textContent = data.version;
  for (const [name, value] of Object.entries(data.facts)) {
    const fact = html("div", "", $("facts"));
    html("dt", "", fact, name);
    html("dd", "", fact, value);
  }
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

// A text in shades, `shade(i)` from 0 to 1; pointer and arrow keys move the token.
function drawText(id, shade, tipOf) {
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
  const tipAt = (i) => {
    const area = spans[i].getClientRects()[0];
    if (area) showTip(tipOf(i), area.left, area.bottom - 8);
  };
  box.addEventListener("pointerover", (event) => {
    const index = event.target.dataset.index;
    if (index === undefined) return hideTip();
    selectToken(+index);
    tipAt(+index);
  });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("blur", hideTip);
  box.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    selectToken(view.token + steps[event.key]);
    const span = spans[view.token];
    box.scrollTop += Math.min(0, span.offsetTop - box.offsetTop - box.scrollTop) || Math.max(0, span.offsetTop + 40 - box.offsetTop - box.scrollTop - box.clientHeight);
    tipAt(view.token);
  });
  let here = null;
  onToken.push(() => {
    here?.classList.remove("here");
    (here = spans[view.token]).classList.add("here");
  });
  return spans;
}

function drawSurprise() {
  const most = Math.max(...data.nats), mean = sum(data.nats) / data.nats.length;
  drawText("surprise-text", (i) => (i ? data.nats[i - 1] / most : 0), surpriseOf);
  ramp($("surprise"), "expected", `a surprise of ${number(most)} nats`, ["transparent", "var(--surprise)"]);
  $("mean-loss").textContent = `On average it is ${number(mean)} nats here, as if the model had to choose among ${number(Math.exp(mean))} equally likely tokens each time.`;
}
function surpriseOf(i) {
  if (i === 0) return "The text begins.";
  const loss = data.nats[i - 1], guesses = data.expected[i - 1].map(([text, p]) => `“${shownText(text)}” ${percent(p)}`);
  return `“${shown(i)}”: loss ${number(loss)}, probability ${percent(Math.exp(-loss))}\nexpected: ${guesses.join(", ")}`;
}

function drawInfluence() {
  const norms = data.influence, positive = norms.filter((x) => x > 0), high = Math.max(...positive), low = Math.max(Math.min(...positive), high / 1e4);
  const about = (i) => (i < norms.length ? `“${shown(i)}”, ${COUNT - 1 - i} before the last: ${number(norms[i])}` : `“${shown(i)}” is what is predicted`);
  curves("influence-curve", "Influence of every token on the last prediction; arrow keys move", () =>
    ({ x: range(norms.length), lines: [{ y: norms, style: STYLES[0] }] }),
    { names: ["token", "gradient"], log: true, byToken: true, head: about });
  const shade = (i) => (i < norms.length && norms[i] > 0 ? Math.max(0, Math.log(norms[i] / low) / Math.log(high / low || 2)) : 0);
  drawText("influence-text", shade, about)[COUNT - 1].classList.add("target");
  $("influence-text").scrollTop = $("influence-text").scrollHeight;
  ramp($("influence"), number(low), number(high), ["transparent", "var(--influence)"]);
}

function drawLearning() {
  const all = data.curves;
  const lines = [{ name: "training", y: all.bits_per_byte, style: STYLES[0], className: "thin" }];
  if (all.validation_step.length) lines.push({ name: "unseen text", y: all.validation_bits_per_byte, x: all.validation_step, style: STYLES[1] });
  const head = (step) => `step ${Math.round(step)}`;
  curves("learning-curve", "Bits per byte over training steps; arrow keys move", () => ({ x: all.step, lines }),
    { names: ["step", "bits per byte"], head });
  legend("learning-curve", lines);
  curves("gradient-curve", "Gradient norm over training steps; arrow keys move", () =>
    ({ x: all.step, lines: [{ name: "gradient", y: all.grad_norm, style: STYLES[2], className: "thin" }] }),
    { names: ["step", "gradient norm"], log: true, head });
}

function drawDecay() {
  const rows = data.layers.flatMap((layer, l) => layer.gamma.map((gamma, h) => ({ gamma, l, h })));
  const all = rows.flatMap((row) => row.gamma), [low, high] = [Math.min(...all), Math.max(...all)].map(Math.log);
  const cell = 14, tall = Math.max(4, Math.min(14, Math.floor(320 / rows.length)));
  const strip = html("div", "strip", $("decay-map")), labels = html("div", "rows", strip);
  rows.forEach(({ l, h }) => {
    const label = html("div", "", labels, tall >= 10 ? `layer ${l + 1} head ${h + 1}` : h === 0 ? `layer ${l + 1}` : "");
    Object.assign(label.style, { height: `${tall}px`, lineHeight: `${Math.max(tall, 11)}px`, marginTop: h || !l ? "0" : "3px" });
  });
  const inner = html("div", "inner", html("div", "scroll", strip));
  Object.assign(inner.parentElement, { tabIndex: 0, ariaLabel: "Decay rates by head and token; arrow keys move" });
  inner.parentElement.setAttribute("role", "group");
  data.layers.forEach((layer, l) => {
    const canvas = html("canvas", "", inner), n = layer.gamma.length;
    Object.assign(canvas, { width: COUNT, height: n });
    Object.assign(canvas.style, { width: `${COUNT * cell}px`, height: `${n * tall}px`, marginTop: l ? "3px" : "0" });
    const context = canvas.getContext("2d"), image = context.createImageData(COUNT, n);
    layer.gamma.forEach((row, h) => row.forEach((gamma, i) => image.data.set([...cividis((Math.log(gamma) - low) / (high - low || 1)), 255], 4 * (h * COUNT + i))));
    context.putImageData(image, 0, 0);
  });
  const words = html("div", "words", inner);
  range(COUNT).forEach((i) => (html("span", "", words, shown(i)).style.width = `${cell}px`));
  const column = html("div", "column", inner);
  Object.assign(column.style, { width: `${cell}px`, height: "100%" });
  const half = (gamma) => `Γ = ${number(gamma)}, half is forgotten in ${tokens(Math.LN2 / (gamma * data.dt))} tokens`;
  const rowAt = (y) => {
    let row = 0;
    for (const [i, { l }] of rows.entries()) if (y >= i * tall + 3 * l) row = i;
    return rows[row];
  };
  inner.addEventListener("pointermove", (event) => {
    const box = inner.getBoundingClientRect(), i = clamp(Math.floor((event.clientX - box.left) / cell), COUNT), row = rowAt(event.clientY - box.top);
    selectToken(i);
    showTip(`“${shown(i)}”, layer ${row.l + 1}, head ${row.h + 1}\n${half(row.gamma[i])}`, event.clientX, event.clientY);
  });
  inner.addEventListener("pointerleave", hideTip);
  inner.parentElement.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    selectToken(view.token + steps[event.key]);
  });
  onToken.push(() => {
    const left = view.token * cell, window = inner.parentElement;
    column.style.left = `${left}px`;
    if (left < window.scrollLeft || left + cell > window.scrollLeft + window.clientWidth) window.scrollLeft = left - window.clientWidth / 2;
  });
  ramp($("decay-map"), `keeps: half is gone in ${tokens(Math.LN2 / (Math.exp(low) * data.dt))} tokens`, `forgets: half is gone in ${tokens(Math.LN2 / (Math.exp(high) * data.dt))} tokens`);
}

// A part of the layer that is looked at; where it has none, its section is hidden, and another layer's is drawn.
const part = (name) => data.layers[view.layer][name] ?? data.layers.find((layer) => layer[name])[name];

function drawLooks() {
  const chart = () => ({ x: range(COUNT), lines: part("distance").map((y, h) => ({ name: `head ${h + 1}`, y, style: STYLES[h % 16] })) });
  onLayer.push(curves("looks-curve", "Distance to which the heads attend; arrow keys move", chart,
    { names: ["token", "tokens back"], byToken: true, head: (i) => `at “${shown(i)}”` }));
  legend("looks-curve", heads(part("distance")).map((name, h) => ({ name, style: STYLES[h % 16] })));
}

function drawEnergy() {
  const every = data.consolidation_interval;
  if (every) $("energy").querySelector(".consolidation").textContent = ` Every ${every} tokens, at the dotted lines, the memory is tidied up by what the next two pictures show.`;
  const chart = () => {
    const { energy, bound } = part("memory");
    return {
      x: data.places,
      lines: energy.flatMap((y, h) => [
        { name: `head ${h + 1}`, y, style: STYLES[h % 16] },
        { name: `bound ${h + 1}`, y: bound[h], style: { ...STYLES[h % 16], "stroke-dasharray": "4 4" }, className: "thin" },
      ]),
      marks: every ? range(Math.floor(COUNT / every)).map((i) => (i + 1) * every - 1) : [],
    };
  };
  onLayer.push(curves("energy-curve", "Energy of the memories and their bounds; arrow keys move", chart,
    { names: ["token", "energy"], log: true, byToken: true, head: (i) => `after “${shown(i)}”` }));
  legend("energy-curve", [...heads(part("memory").energy).map((name, h) => ({ name, style: STYLES[h % 16] })),
    { name: "bound", style: { stroke: "var(--soft)", "stroke-dasharray": "4 4" } }]);
}

function drawSnr() {
  const edges = data.snr_edges, height = 240, bins = edges.length - 1, threshold = data.snr_threshold;
  const shares = () => range(bins).map((b) => { const rows = part("memory").snr; return sum(rows.map((row) => row[b])) / rows.length; });
  onLayer.push(() => {
    const { signal, strength } = part("memory");
    $("signal").textContent = `Here ${percent(sum(signal) / signal.length)} of the components are signal.`;
    $("strength").textContent = `Strength here, by head: ${strength.map(number).join(", ")}.`;
  });
  onLayer.push(picture($("snr-bars"), "Histogram of signal-to-noise ratios; arrow keys move", height, (canvas, width) => {
    const bars = shares(), x = scale(edges, true), y = scale(bars.map((b) => 100 * b), false);
    const { px, py, top, bottom } = axes(canvas, width, height, x, y, ["size, in units of the average (rms), logarithmic", "% of components"]);
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
  const place = html("div", "panels", $("resolvent-path")), height = 190, shades = 8;
  $("resolvent").querySelector(".bound").textContent = data.layers[0].gamma ? "|g| ≤ 1/(κΓ+ζ)" : "|g| ≤ 1/ζ";
  range(data.layers[0].real.length).forEach((h) => {
    const panel = html("div", "", place);
    const redraw = picture(panel, `The resolvent of head ${h + 1} in the complex plane; arrow keys move along the text`, height, (canvas, width) => {
      const { real, imaginary, resolvent_bound: bounds } = data.layers[view.layer], re = real[h], im = imaginary[h], bound = bounds[h];
      const unit = Math.min((width - 24) / 2, height - 44) / Math.max(...bound), px = (v) => width / 2 + v * unit, py = (v) => height - 24 - v * unit;
      svg("text", { x: 8, y: 16 }, canvas, `head ${h + 1}`);
      svg("line", { class: "axis", x1: 8, x2: width - 8, y1: py(0), y2: py(0) }, canvas);
      svg("line", { class: "axis", x1: px(0), x2: px(0), y1: 8, y2: py(0) }, canvas);
      for (const tick of linearTicks(0, Math.max(...bound)).slice(1)) for (const side of [-1, 1])
        if (Math.abs(px(side * tick) - width / 2) < width / 2 - 8) svg("text", { x: px(side * tick), y: height - 8, "text-anchor": "middle" }, canvas, number(side * tick));
      svg("path", { class: "path", d: re.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(im[i]).toFixed(1)}`).join("") }, canvas);
      for (const s of range(shades)) {
        const d = range(COUNT).filter((i) => Math.floor((i * shades) / COUNT) === s).map((i) => `M${px(re[i]).toFixed(1)} ${py(im[i]).toFixed(1)}h0`).join("");
        svg("path", { class: "dots", d, style: `stroke: color-mix(in srgb, var(--late) ${Math.round((100 * s) / (shades - 1))}%, var(--early))` }, canvas);
      }
      const limit = svg("path", { class: "limit" }, canvas), here = svg("circle", { class: "here", r: 5 }, canvas);
      canvas.follow = () => {
        const i = view.token, r = bound[i] * unit;
        set(limit, { d: `M${px(0) - r} ${py(0)}A${r} ${r} 0 0 1 ${px(0) + r} ${py(0)}` });
        set(here, { cx: px(re[i]), cy: py(im[i]) });
      };
      canvas.follow();
      const distance = (i, x, y) => (px(re[i]) - x) ** 2 + (py(im[i]) - y) ** 2;
      return {
        nearest: (x, y) => range(COUNT).reduce((best, i) => (distance(i, x, y) < distance(best, x, y) ? i : best), 0),
        move: (key) => (key in steps ? clamp(view.token + steps[key], COUNT) : undefined),
        select: selectToken,
        at: (i) => [px(re[i]), py(im[i])],
        tip: (i) => `“${shown(i)}”\ng = ${number(re[i])} + ${number(im[i])}i\n|g| = ${number(Math.hypot(re[i], im[i]))}, at most ${number(bound[i])}`,
      };
    });
    onLayer.push(redraw);
    onToken.push(() => panel.querySelector("svg").follow?.());
  });
  ramp($("resolvent-path"), "first token", "last token", ["var(--early)", "var(--late)"]);
}

function drawBar() {
  const select = $("layer"), slider = $("token");
  data.layers.forEach((_, l) => html("option", "", select, `${l + 1}`).setAttribute("value", l));
  select.addEventListener("change", () => selectLayer(+select.value));
  slider.max = COUNT - 1;
  slider.addEventListener("input", () => selectToken(+slider.value));
  onToken.push(() => {
    const i = view.token, layer = data.layers[view.layer], parts = [];
    slider.value = i;
    slider.setAttribute("aria-valuetext", `${i + 1} of ${COUNT}: ${shown(i)}`);
    if (i) parts.push(`loss ${number(data.nats[i - 1])} (${percent(Math.exp(-data.nats[i - 1]))})`, `expected “${shownText(data.expected[i - 1][0][0])}”`);
    if (layer.gamma) parts.push(`Γ by head ${layer.gamma.map((row) => number(row[i])).slice(0, 4).join(", ")}${layer.gamma.length > 4 ? ", …" : ""}`);
    if (i < data.influence.length) parts.push(`influence ${number(data.influence[i])}`);
    const word = html("span", "token", null, shown(i));
    $("reading").replaceChildren(`${i + 1} of ${COUNT} `, word, ` ${parts.join(" · ")}`);
  });
}

// What a model does not have is not shown.
const memories = data.layers.some((layer) => layer.memory);
const sections = {
  surprise: [true, drawSurprise],
  influence: [true, drawInfluence],
  learning: [data.curves?.step.length, drawLearning],
  decay: [data.layers.every((layer) => layer.gamma), drawDecay],
  looks: [data.layers.some((layer) => layer.distance), drawLooks],
  energy: [memories, drawEnergy],
  snr: [memories && data.snr_threshold !== null, drawSnr],
  resonance: [memories && data.resonance_threshold !== null, drawResonance],
  resolvent: [true, drawResolvent],
};
$("missing").hidden = sections.decay[0];
drawHeader();
drawBar();
for (const [id, [exists, draw]] of Object.entries(sections)) exists ? draw() : $(id).remove();
onLayer.push(() => {
  for (const [name, ids] of [["distance", ["looks"]], ["memory", ["energy", "snr", "resonance"]]])
    for (const id of ids) if ($(id)) $(id).hidden = !data.layers[view.layer][name];
});
selectLayer(0);
