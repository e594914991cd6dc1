"""Draw the pictures of the README: the loss by position, from the records of the quality experiments, and the block.

    python -m scripts.draw_readme docs/images

The same records give the same files, whose colours follow the colour scheme of the reader.
"""

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.quality.results import read, setting

RECORDS = Path(__file__).parents[1] / "experiments" / "quality" / "results" / "mixed.jsonl"
LINES = {"transformer": "Transformer", "phase2/hybrid/window-512": "hybrid", "phase2": "pure"}
"""Models of the chart, with the names that the README has for them."""

STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 13px; fill: #59636e } .middle { text-anchor: middle } .end { text-anchor: end }
.grid { stroke: #d0d7de } .axis { stroke: #59636e }
.line { fill: none; stroke-width: 3; stroke-linejoin: round } .dot { stroke: none }
.c0 { stroke: #59636e; fill: #59636e } .c1 { stroke: #c04f00; fill: #c04f00 } .c2 { stroke: #0072b2; fill: #0072b2 }
.box { fill: #eef2ff; stroke: #4051b5; stroke-width: 1.2 } .wire { stroke: #59636e; stroke-width: 1.5; fill: none }
.head { fill: #59636e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #30363d } .axis { stroke: #9198a1 }
  .c0 { stroke: #9198a1; fill: #9198a1 } .c1 { stroke: #ff8f3d; fill: #ff8f3d } .c2 { stroke: #56b4e9; fill: #56b4e9 }
  .box { fill: #1b2447; stroke: #8c9eff } .wire { stroke: #9198a1 } .head { fill: #9198a1 }
}
.line { fill: none }
"""


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "results.svg").write_text(chart(mean_records()), "utf-8")
    (folder / "block.svg").write_text(block(), "utf-8")


def mean_records() -> dict[str, dict[str, Any]]:
    """Return means over seeds for every model of the chart, of its best setting among those with the most runs."""
    found = {}
    for model in LINES:
        groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for run in read([RECORDS]):
            if run["model"] == model:
                groups.setdefault((setting(run), run["learning_rate"]), []).append(run)
        seeds = max(groups.values(), key=lambda runs: (len(runs), -fmean(run["loss"] for run in runs)))
        positions = seeds[0]["loss_by_position"]
        found[model] = {
            "loss": fmean(run["loss"] for run in seeds),
            "loss_by_position": {name: fmean(run["loss_by_position"][name] for run in seeds) for name in positions},
            "state_bytes": seeds[0]["state_bytes"],
        }
    return found


def chart(records: dict[str, dict[str, Any]]) -> str:
    """Return curves of the loss over the position in the text."""
    width, height, left, right, top, bottom = 830, 330, 58, 250, 34, 286
    positions = list(records["phase2"]["loss_by_position"])
    low, high = 2.6, 3.6
    x = [left + 40 + i * (width - right - left - 80) / (len(positions) - 1) for i in range(len(positions))]

    def y(loss: float) -> float:
        return bottom - (loss - low) / (high - low) * (bottom - top)

    parts = [f'<text x="{left}" y="18" class="small">loss on held-out text, nats per token (lower is better)</text>']
    for tick in (2.6, 2.8, 3.0, 3.2, 3.4, 3.6):
        parts.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/>')
        parts.append(f'<text class="small end" x="{left - 8}" y="{y(tick) + 4:.1f}">{tick:.1f}</text>')
    for place, name in zip(x, positions, strict=True):
        shown = name.replace("-", "–")
        parts.append(f'<text class="small middle" x="{place:.1f}" y="{bottom + 20}">{shown}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="small middle" x="{middle}" y="{bottom + 40}">tokens read before</text>')
    labels: list[tuple[float, str, str]] = []
    for number, (model, record) in enumerate(records.items()):
        points = [(place, y(record["loss_by_position"][name])) for place, name in zip(x, positions, strict=True)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path class="line c{number}" d="M{path}"/>')
        parts += [f'<circle class="dot c{number}" cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>' for a, b in points]
        state = f"state of {record['state_bytes'] / 1e6:.1f} MB" + (", grows" if model == "transformer" else "")
        labels.append((points[-1][1], f"{LINES[model]}: {record['loss']:.3f} on average", state))
    free = 0.0
    for end, label, state in sorted(labels):
        free = max(free, end)
        parts.append(f'<text x="{x[-1] + 14:.1f}" y="{free:.1f}">{label}</text>')
        parts.append(f'<text class="small" x="{x[-1] + 14:.1f}" y="{free + 17:.1f}">{state}</text>')
        free += 42
    return svg(width, height, "Held-out loss by position: Transformer, hybrid and pure model", parts)


def block() -> str:
    """Return a drawing of one block."""
    parts: list[str] = []

    def box(x: int, y: int, w: int, h: int, *lines: str) -> None:
        parts.append(f'<rect class="box" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>')
        first = y + h / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            small = " small" if number else ""
            parts.append(f'<text class="middle{small}" x="{x + w / 2}" y="{first + 19 * number}">{line}</text>')

    def wire(path: str) -> None:
        parts.append(f'<path class="wire" d="{path}" marker-end="url(#a)"/>')

    parts.append('<text x="6" y="222">stream</text>')
    wire("M62 217H806")
    box(84, 92, 70, 40, "norm")
    wire("M72 217V112H84")
    box(196, 20, 250, 78, "BK-Core", "g ← 1/(α − m g), α from V and Γ:", "one complex number per head")
    box(196, 118, 250, 78, "memory, or attention", "S ← exp(−Γ dt) S + η k vᵀ,", "or the last W keys and values")
    wire("M154 112H176V59H196")
    wire("M176 112V157H196")
    box(474, 92, 76, 40, "product")
    wire("M446 59H462V104H474")
    wire("M446 157H462V120H474")
    wire("M550 112H562V209")
    parts.append('<circle class="box" cx="562" cy="217" r="8"/><text class="middle" x="562" y="222">+</text>')
    box(596, 92, 62, 40, "norm")
    wire("M580 217V112H596")
    box(680, 92, 78, 40, "SwiGLU")
    wire("M658 112H680")
    wire("M758 112H776V209")
    parts.append('<circle class="box" cx="776" cy="217" r="8"/><text class="middle" x="776" y="222">+</text>')
    return svg(830, 240, "One block: a mixer and a feed-forward network, each added to the stream", parts)


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a picture whose colours follow the colour scheme of the reader."""
    marker = (
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, f"<title>{title}</title><style>{STYLE}</style>", marker, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
