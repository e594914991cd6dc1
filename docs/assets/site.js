// Formulas, and pictures in the colours of the page. Runs without a network.
function drawFormulas() {
  for (const element of document.querySelectorAll(".arithmatex:not(.drawn)")) {
    const [, tex] = /^\s*\\[([]([^]*)\\[)\]]\s*$/.exec(element.textContent);
    katex.render(tex, element, { displayMode: element.tagName === "DIV" });
    element.classList.add("drawn");
  }
}

// A picture follows the palette of the page, not that of the system.
function choosePictures() {
  const dark = document.body.getAttribute("data-md-color-scheme") === "slate";
  for (const source of document.querySelectorAll("picture source")) source.media = dark ? "all" : "not all";
}

new MutationObserver(choosePictures).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
drawFormulas();
choosePictures();
