"""Draw the packages of `resolvent` and their imports, for docs/architecture.md.

Usage: python scripts/draw_architecture.py docs/images/architecture.svg

A package is above all packages that it imports, and right below the lowest package that imports it. An arrow that a
longer path of arrows implies is left out. The picture follows the reader's light or dark mode.
"""

import sys
from collections import defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import grimp

ROOT = "resolvent"
FOUNDATION = (
    "errors",
    "files",
    "manifest",
    "tensors",
    "device",
    "fields",
    "memory",
    "native",
    "seeds",
    "terminal",
    "wording",
    "_version",
)
"""Small modules that everything may import; one box at the bottom stands for all of them, and gets no arrows."""
ENTRY = ("__main__",)

WIDTH, ROW, BOX, MARGIN = 820, 92, 46, 16
STYLE = """
text { font: 15px system-ui, sans-serif; text-anchor: middle; fill: #1f2328 }
.lines { font-size: 12px; fill: #59636e }
rect { fill: #eef2ff; stroke: #4051b5; stroke-width: 1.2 }
.foundation { fill: #f6f8fa; stroke: #8c959f }
path { stroke: #6e7781; stroke-width: 1.2; fill: none; marker-end: url(#arrow) }
marker path { fill: #6e7781; stroke: none; marker-end: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .lines { fill: #9198a1 }
  rect { fill: #1b2447; stroke: #8c9eff } .foundation { fill: #21262d; stroke: #6e7681 }
  path { stroke: #9198a1 } marker path { fill: #9198a1 }
}
"""


def imports_between_packages(graph: grimp.ImportGraph) -> dict[str, set[str]]:
    """Return every package and top-level module, with the others that it imports; the foundation left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in graph.modules:
        importer = _package(module)
        for imported in map(_package, graph.find_modules_directly_imported_by(module)):
            if importer and imported and importer != imported:
                found[importer].add(imported)
        if importer:
            found[importer] |= set()
    return dict(found)


def rows_of(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return packages by height, the highest first: each above all that it imports, right below its importers.

    Raises:
        ValueError: packages import each other in a circle.
    """
    pending: list[str] = []

    @cache
    def height(package: str) -> int:
        if package in pending:
            raise ValueError(f"import circle: {' -> '.join([*pending, package])}")
        pending.append(package)
        found = 1 + max((height(imported) for imported in imports[package]), default=-1)
        pending.pop()
        return found

    heights = {package: height(package) for package in sorted(imports)}
    for package in sorted(heights, key=heights.__getitem__, reverse=True):
        importers = [heights[importer] for importer, imported in imports.items() if package in imported]
        if importers:
            heights[package] = min(importers) - 1
    return [[name for name, at in heights.items() if at == row] for row in range(max(heights.values()), -1, -1)]


def necessary(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that no longer way of imports implies."""

    @cache
    def reached(package: str) -> frozenset[str]:
        return frozenset(imports[package]).union(*map(reached, imports[package]))

    return [
        (importer, imported)
        for importer, all_imported in sorted(imports.items())
        for imported in sorted(all_imported)
        if not any(imported in reached(other) for other in all_imported if other != imported)
    ]


def place(rows: list[list[str]], arrows: list[tuple[str, str]]) -> list[list[tuple[str, ...]]]:
    """Order every row, with a gap for each arrow that passes it, so that arrows cross little and no box is crossed.

    Returns:
        rows of names, ``(package,)``, and gaps, ``(importer, imported)``.
    """
    row_of = {package: number for number, row in enumerate(rows) for package in row}
    slots: list[list[tuple[str, ...]]] = [[(package,) for package in row] for row in rows]
    above: dict[tuple[int, tuple[str, ...]], list[tuple[str, ...]]] = defaultdict(list)
    for arrow in arrows:
        first, last = (row_of[package] for package in arrow)
        way = [arrow[:1], *[arrow] * (last - first - 1), arrow[1:]]
        for number, (upper, lower) in enumerate(pairwise(way), first):
            above[number + 1, lower].append(upper)
            if lower == arrow:
                slots[number + 1].append(arrow)
    for number in range(1, len(slots)):
        share = {slot: (at + 1) / (len(slots[number - 1]) + 1) for at, slot in enumerate(slots[number - 1])}
        mean = {slot: fmean([share[upper] for upper in above[number, slot]] or [1]) for slot in slots[number]}
        slots[number].sort(key=mean.__getitem__)
    return slots


def draw(imports: dict[str, set[str]], lines: dict[str, int]) -> str:
    """Return the picture as SVG; lines of code are rounded to hundreds."""
    arrows = necessary(imports)
    slots = place(rows_of(imports), arrows)
    at = {
        (number, slot): WIDTH * (place + 1) / (len(row) + 1)
        for number, row in enumerate(slots)
        for place, slot in enumerate(row)
    }
    row_of = {slot[0]: number for number, slot in at if len(slot) == 1}
    height = MARGIN + len(slots) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + BOX + MARGIN}" role="img">',
        f"<title>Packages of {ROOT} and their imports</title><style>{STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for importer, imported in arrows:
        first, last = row_of[importer], row_of[imported]
        gaps = [at[number, (importer, imported)] for number in range(first + 1, last)]
        parts.append(_arrow([at[first, (importer,)], *gaps, at[last, (imported,)]], MARGIN + first * ROW))
    for package, number in row_of.items():
        size = f"{round(lines[package], -2) or lines[package]:,} lines"
        parts.append(_box(package, size, at[number, (package,)], MARGIN + number * ROW, 120))
    names = ", ".join(name for name in FOUNDATION if not name.startswith("_"))
    parts.append(
        _box(
            names,
            "small modules for all above; ops imports errors alone",
            WIDTH / 2,
            height,
            WIDTH - 2 * MARGIN,
            "foundation",
        )
    )
    return "\n".join([*parts, "</svg>", ""])


def count_lines(folder: Path) -> dict[str, int]:
    """Count the lines of Python of every package and top-level module."""
    lines: dict[str, int] = defaultdict(int)
    for path in folder.rglob("*.py"):
        package = path.relative_to(folder).parts[0].removesuffix(".py")
        lines[package] += len(path.read_text(encoding="utf-8").splitlines())
    return lines


def _package(module: str) -> str | None:
    """Return the top-level name that a module belongs to; None for what the picture leaves out."""
    _, _, path = module.partition(".")
    name = path.partition(".")[0]
    return None if not name or name in (*FOUNDATION, *ENTRY) else name


def _arrow(xs: list[float], y: int) -> str:
    """Return an arrow from a box at height ``y``, straight past every row between, to the box in the last row."""
    path = f"M{xs[0]:.0f} {y + BOX}"
    for number, (x, u) in enumerate(pairwise(xs), 1):
        end, middle = y + number * ROW, y + number * ROW - (ROW - BOX) / 2
        last = number == len(xs) - 1
        path += f" C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {end - 2 if last else end}"
        path += "" if last else f" V{end + BOX}"
    return f'<path d="{path}"/>'


def _box(name: str, below: str, x: float, y: float, width: float, kind: str = "package") -> str:
    return (
        f'<rect class="{kind}" x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 20}">{name}</text><text class="lines" x="{x:.0f}" y="{y + 37}">{below}</text>'
    )


if __name__ == "__main__":
    graph = grimp.build_graph(ROOT)
    folder = Path(__file__).parents[1] / "src" / ROOT
    Path(sys.argv[1]).write_text(draw(imports_between_packages(graph), count_lines(folder)), encoding="utf-8")
