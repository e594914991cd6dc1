"""Draw the packages of `resolvent` and who imports whom, for docs/architecture.md.

    python scripts/draw_architecture.py docs/images/architecture.svg

A package stands above all that it imports. An arrow is left out where a longer way says the same. The picture follows the
reader's light or dark mode.
"""

import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import grimp

ROOT = "resolvent"
FOUNDATION = ("errors", "files", "manifest", "tensors", "device", "_version")
"""Small modules that everything may import; one box at the bottom stands for all of them, and gets no arrows."""
ENTRY = ("__main__",)

WIDTH, ROW, BOX, MARGIN, FONT = 820, 92, 46, 16, 15
STYLE = """
text { font: %dpx system-ui, sans-serif; text-anchor: middle; fill: #1f2328 }
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
""" % FONT


def imports_between_packages(graph: grimp.ImportGraph) -> dict[str, set[str]]:
    """Every package and top-level module, with the others that it imports; the foundation left out."""
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
    """Packages by height: each stands above all that it imports. The first row is the highest.

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
    return [[name for name, at in heights.items() if at == row] for row in range(max(heights.values()), -1, -1)]


def necessary(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no longer way of imports implies."""

    @cache
    def reached(package: str) -> frozenset[str]:
        return frozenset(imports[package]).union(*map(reached, imports[package]))

    return [
        (importer, imported)
        for importer, all_imported in sorted(imports.items())
        for imported in sorted(all_imported)
        if not any(imported in reached(other) for other in all_imported if other != imported)
    ]


def draw(imports: dict[str, set[str]], lines: dict[str, int]) -> str:
    """The picture as SVG."""
    rows, box, height = rows_of(imports), {}, 0
    for number, row in enumerate(rows):
        width = min(150, (WIDTH - 2 * MARGIN) // len(row) - 14)
        for place, package in enumerate(row):
            x = WIDTH * (place + 1) / (len(row) + 1)
            box[package] = (x, MARGIN + number * ROW, width)
        height = MARGIN + (number + 1) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + BOX + MARGIN}" role="img">',
        f"<title>Packages of {ROOT} and their imports</title><style>{STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for importer, imported in necessary(imports):
        (x, y, _), (u, v, _) = box[importer], box[imported]
        middle = (y + BOX + v) / 2
        parts.append(f'<path d="M{x:.0f} {y + BOX} C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v - 2}"/>')
    for package, (x, y, width) in box.items():
        parts.append(_box(package, f"{lines[package]:,} lines", x, y, width))
    names = ", ".join(name for name in FOUNDATION if not name.startswith("_"))
    parts.append(_box(names, "imported by all", WIDTH / 2, height, WIDTH - 2 * MARGIN, "foundation"))
    return "\n".join([*parts, "</svg>", ""])


def count_lines(folder: Path) -> dict[str, int]:
    """Lines of Python of every package and top-level module."""
    lines: dict[str, int] = defaultdict(int)
    for path in folder.rglob("*.py"):
        lines[path.relative_to(folder).parts[0].removesuffix(".py")] += len(path.read_text(encoding="utf-8").splitlines())
    return lines


def _package(module: str) -> str | None:
    """The top-level name that a module belongs to; None for what the picture leaves out."""
    _, _, path = module.partition(".")
    name = path.partition(".")[0]
    return None if not name or name in (*FOUNDATION, *ENTRY) else name


def _box(name: str, below: str, x: float, y: float, width: float, kind: str = "package") -> str:
    return (
        f'<rect class="{kind}" x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 20}">{name}</text><text class="lines" x="{x:.0f}" y="{y + 37}">{below}</text>'
    )


if __name__ == "__main__":
    graph = grimp.build_graph(ROOT)
    folder = Path(__file__).parents[1] / "src" / ROOT
    Path(sys.argv[1]).write_text(draw(imports_between_packages(graph), count_lines(folder)), encoding="utf-8")
