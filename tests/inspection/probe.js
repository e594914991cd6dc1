// Uses the page as a reader does, and tells the frame around it what became of that.
const tipText = () => (tip.hidden ? "" : tip.textContent);
const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
function rgb(colour) {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function contrast(one, other) {
  const luminance = (colour) => {
    const [r, g, b] = rgb(colour).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function colour(name) {
  const sample = html("span", "", document.body);
  sample.style.color = `var(--${name})`;
  const found = getComputedStyle(sample).color;
  sample.remove();
  return found;
}
function contrasts() {
  const text = {}, graphics = {};
  for (const ground of ["page", "panel", "surprise", "influence"]) text[`ink on ${ground}`] = contrast(colour("ink"), colour(ground));
  for (const ground of ["page", "panel"]) text[`soft on ${ground}`] = contrast(colour("soft"), colour(ground));
  for (const name of ["accent", ...range(8).map((i) => `c${i}`)]) graphics[name] = contrast(colour(name), colour("page"));
  graphics["dot at the end"] = contrast(colour("late"), colour("panel"));
  return { text, graphics };
}

function probe() {
  const found = { faults };
  found.sections = all("section").map((section) => section.id);
  found.missing_is_shown = !$("missing").hidden;
  found.drawn = all(".chart").map((chart) => chart.querySelectorAll("path, rect, line, text").length + chart.innerHTML.length);
  found.numbers_are_bad = all(".chart *").flatMap((part) => [...part.attributes].map((a) => a.value).concat(part.textContent)).filter((value) => /NaN|undefined|Infinity/.test(value));
  found.text = $("surprise-text").textContent;
  const canvases = all("canvas");
  found.canvases = canvases.map((canvas) => [canvas.width, canvas.height]);
  found.canvas_colours = new Set(canvases.flatMap((canvas) => {
    const { data: pixels } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return range(pixels.length / 4).map((i) => pixels.slice(4 * i, 4 * i + 4).join());
  })).size;

  const moved = (element, key, from) => {
    selectToken(from);
    press(element, key);
    return view.token;
  };
  const charts = Object.fromEntries(all("figure").map((figure) => [figure.id, figure.querySelector(".chart, .scroll")]).filter(([, chart]) => chart));
  if (found.sections.includes("decay")) {
    found.after_keys = { text: moved($("surprise-text"), "ArrowRight", 11) };
    found.reading = $("reading").textContent;
    found.after_keys.slider = +$("token").value;
    found.after_keys.curve = moved(charts["influence-curve"], "ArrowLeft", 6);
    found.after_keys.path = moved(charts["resolvent-path"], "ArrowRight", 5);
    found.after_keys.strip = moved(charts["decay-map"], "PageDown", 6);
    found.column_follows = document.querySelector(".column").offsetLeft === 16 * 9;
    found.after_keys.end = moved($("surprise-text"), "End", 5);
    found.after_keys.home = moved($("surprise-text"), "Home", 5);
  }
  selectToken(3);
  found.tips = {};
  for (const box of all(".text")) {
    hideTip();
    press(box, "ArrowRight");
    found.text_is_covered ||= tipText() !== "";
  }
  selectToken(3);
  found.heights = [...new Set(range(20).map((i) => {
    selectToken(i);
    return document.body.scrollHeight;
  }))].length;
  selectToken(3);
  found.guesses = all(".guess").map((row) => row.textContent);
  for (const element of Object.values(charts)) {
    hideTip();
    press(element, "ArrowRight");
    const name = element.closest("figure").id;
    if (element.className === "scroll") {
      const box = element.firstChild.getBoundingClientRect();
      element.firstChild.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 50, clientY: box.top + 30, bubbles: true }));
    }
    found.tips[name] = tipText();
  }
  charts["influence-curve"].dispatchEvent(new FocusEvent("blur"));
  found.tip_goes = tipText() === "";

  found.findings = all("#findings a").map((link) => [link.textContent, document.querySelector(link.getAttribute("href")) !== null]);
  found.links = all("#sections a").map((link) => link.getAttribute("href"));
  const lines = () => charts["energy-curve"]?.querySelectorAll(".curve").length;
  found.bounds = [lines()];
  $("bounds")?.click();
  found.bounds.push(lines());
  found.largest_share = charts["resolvent-share"].getBoundingClientRect() && Math.max(...data.layers.flatMap((layer) => layer.real.flatMap((row, h) => row.map((x, i) => Math.hypot(x, layer.imaginary[h][i]) / layer.resolvent_bound[h][i]))));
  found.rows = all("#decay-map .rows div").map((row) => row.textContent);
  found.words = all("#decay-map .words span").map((span) => span.textContent);
  found.attended = all("#looks-heads tr").map((row) => row.textContent);
  found.compared = all("#comparison-text span").map((span) => span.textContent);
  found.comparison_rows = all("#comparison-table tr").length;
  found.runs = all("#run option").map((option) => option.textContent);

  const followers = ["energy-curve", "snr-bars", "resonance-map", "resolvent-share", "resolvent-path"].filter((id) => charts[id]);
  const before = followers.map((id) => charts[id].innerHTML);
  $("layer").value = data.layers.length - 1;
  $("layer").dispatchEvent(new Event("change"));
  found.layer_changes = Object.fromEntries(followers.map((id, i) => [id, charts[id].innerHTML !== before[i]]));
  found.strength = $("strength")?.textContent;
  found.layer_named = document.querySelector(".layer").textContent;

  found.themes = [];
  found.contrasts = range(2).map(() => {
    $("theme").click();
    found.themes.push(document.documentElement.dataset.theme);
    return contrasts();
  });
  found.width = innerWidth;
  found.scroll_width = document.documentElement.scrollWidth;
  found.targets = all("button, select, input").filter((control) => control.checkVisibility()).flatMap((control) => { const box = control.getBoundingClientRect(); return [box.width, box.height]; });
  found.unnamed = all("[tabindex], button, input, select").filter((e) => !(e.getAttribute("aria-label") ?? e.closest("label")?.textContent)).map((e) => e.outerHTML.slice(0, 80));
  found.pictures = all(".text, .chart, .scroll").length;
  found.focusable = all(".text, .chart, .scroll").filter((e) => e.tabIndex === 0).length;
  parent.postMessage(JSON.stringify(found), "*");
}
addEventListener("load", () => setTimeout(probe, 200));
