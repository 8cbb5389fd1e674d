"""Draws which module imports which, from the code itself, as docs/figures/import_graph.svg.

Modules are grouped by package; those at the root are divided into the files that a saved model carries and the rest.
Modules and groups are placed in ranks, importers above what they import, and arrows that follow from others are left
out. `--check` compares the committed figure with the code and changes nothing.
"""

import argparse
import ast
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from layered_layout import Drawing, Graph, Item, arrange, components
from sync_demonstration import code_files

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "figures" / "import_graph.svg"
PACKAGE = "mfuser"
# From top to bottom: a module imports from its own layer and from those below.
LAYERS = ("scripts", "training", "evaluation", "data", "above", "model", "root")
TITLES = {
    "above": "root files above the model",
    "model": "model files (carried by a saved model)",
    "root": "other root files",
}
COLOURS = {
    "scripts": "#e8eaf6",
    "training": "#fff3e0",
    "evaluation": "#e8f5e9",
    "data": "#e0f2f1",
    "above": "#fffde7",
    "model": "#fce4ec",
    "root": "#f5f5f5",
}
FONT_SIZE, CHARACTER = 12, 7.3  # of the monospaced labels, in pixels
BOX_HEIGHT, BOX_PADDING, BOX_GAP = 26, 7, 14
RANK_GAP, PART_GAP, FRAME_GAP = 34, 28, 46
FRAME_PADDING, FRAME_TITLE = 16, 26
ROW_WIDTH = 900  # the parts of a group are laid out in rows of about this width


# Reading the code


def read_imports(root: Path = ROOT) -> Graph:
    """
    Reads every `import` statement of the package, also those inside functions and `try` blocks.

    Args:
        root (`Path`):
            The package directory.

    Returns:
        `dict[str, set[str]]`: For each module, such as `data.tables` or `modeling_mfuser`, the modules of the package
        that it imports.
    """
    folders = [root, *(path.parent for path in root.glob("*/__init__.py"))]
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for folder in folders
        for path in folder.glob("*.py")
        if path.stat().st_size > 0
    }
    return {module: imported_modules(module, files[module], files) - {module} for module in sorted(files)}


def imported_modules(module: str, path: Path, modules: Iterable[str]) -> set[str]:
    """Modules of the package that the file of `module` imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = [PACKAGE, *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    found = set()
    for name in names:
        package, _, inside = name.partition(".")
        if package != PACKAGE:
            continue
        # "data.loading.load_domain" is a name in data.loading; "__version__" one in __init__
        candidates = [inside, inside.rpartition(".")[0], f"{inside.rpartition('.')[0]}.__init__".lstrip(".")]
        found.update([candidate for candidate in candidates if candidate in modules][:1])
    return found


def layer_of(module: str, model_files: Iterable[str]) -> str:
    """The layer of a module: its package or, at the root, "model" or "root"."""
    package, separator, _ = module.partition(".")
    if separator:
        return package
    return "model" if module in model_files else "root"


def layers(graph: Graph, root: Path = ROOT) -> dict[str, str]:
    """The layer of every module of `graph`. Root modules that import model files are above the model."""
    model_files = {name.removesuffix(".py") for name in code_files(root=root)}
    layer = {module: layer_of(module, model_files) for module in graph}
    above = [module for module in graph if layer[module] == "root" and graph[module] & model_files]
    return layer | dict.fromkeys(above, "above")


def upward_imports(graph: Graph, layer: Mapping[str, str]) -> list[str]:
    """Imports from a lower layer into a higher one, each as "importer -> imported"."""
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if LAYERS.index(layer[target]) < LAYERS.index(layer[module])
    ]


def cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules of one import cycle, or an empty list."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        for target in sorted(graph[module]):
            if found := search(target, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module, []))), [])


def reduced(graph: Graph) -> Graph:
    """The same graph without the arrows that follow from others. The graph must have no cycle."""
    reachable: Graph = {}

    def reach(node: str) -> set[str]:
        if node not in reachable:
            reachable[node] = graph[node].union(*map(reach, graph[node]))
        return reachable[node]

    return {node: targets - set().union(*map(reach, targets)) for node, targets in graph.items()}


# Drawing


def module_box(module: str) -> Item:
    return Item(len(label(module)) * CHARACTER + 2 * BOX_PADDING, BOX_HEIGHT)


def label(module: str) -> str:
    return module.rpartition(".")[2]


def arrange_group(graph: Graph) -> Drawing:
    """Places the modules of one group: each connected part in ranks, and the parts side by side in rows."""
    group = Drawing({})
    x = y = 0.0
    row: list[Drawing] = []
    for part in components(graph):
        drawing = arrange({node: module_box(node) for node in sorted(part)}, part, RANK_GAP, BOX_GAP)
        if row and x + drawing.width > ROW_WIDTH:
            x, y = 0.0, y + max(above.height for above in row) + RANK_GAP
            row = []
        drawing.move(x, y)
        x += drawing.width + PART_GAP
        row.append(drawing)
        group.items |= drawing.items
        group.arrows += drawing.arrows
        group.width = max(group.width, x - PART_GAP)
        group.height = max(group.height, y + drawing.height)
    return group


def curve(drawing: Drawing, arrow: list[str], style: str) -> str:
    """An arrow as an SVG path, vertical wherever it leaves, passes or reaches an item."""
    start = drawing.items[arrow[0]]
    x, y = start.x, start.y + start.height
    path = f"M{x:.0f} {y:.0f}"
    for name in arrow[1:]:
        item = drawing.items[name]
        middle = (y + item.y) / 2
        path += f"C{x:.0f} {middle:.0f} {item.x:.0f} {middle:.0f} {item.x:.0f} {item.y:.0f}"
        x, y = item.x, item.y
        if name != arrow[-1]:
            y += item.height
            path += f"V{y:.0f}"
    return f'<path class="{style}" d="{path}"/>'


def box(item: Item, text: str, style: str) -> str:
    left, top = item.x - item.width / 2, item.y
    shape = f'<rect class="{style}" x="{left:.0f}" y="{top:.0f}" width="{item.width:.0f}" height="{item.height:.0f}"/>'
    baseline = top + item.height / 2 + FONT_SIZE / 3
    return f'{shape}<text x="{item.x:.0f}" y="{baseline:.0f}" text-anchor="middle">{escape(text)}</text>'


STYLE = f"""\
text {{ font: {FONT_SIZE}px 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #212121 }}
.title {{ font: bold 13px 'DejaVu Sans', Helvetica, Arial, sans-serif }}
.note {{ font: 12px 'DejaVu Sans', Helvetica, Arial, sans-serif; fill: #616161 }}
.module {{ fill: white; stroke: #78909c; rx: 4px }}
.frame {{ stroke: #b0bec5; rx: 8px }}
.arrow {{ fill: none; stroke: #546e7a; stroke-width: 1.2; marker-end: url(#head) }}
.layer {{ fill: none; stroke: #37474f; stroke-width: 2.5; marker-end: url(#head) }}"""


def draw(graph: Graph, layer: Mapping[str, str]) -> str:
    """
    Draws an import graph without cycles.

    Args:
        graph (`dict[str, set[str]]`):
            The modules that each module imports.
        layer (`Mapping[str, str]`):
            The layer of each module.

    Returns:
        `str`: An SVG image.
    """
    names = [name for name in LAYERS if name in layer.values()]
    inner, between = {}, {}
    for name in names:
        members = [module for module in graph if layer[module] == name]
        targets = set().union(*(graph[module] for module in members))
        inner[name] = arrange_group(reduced({module: graph[module] & set(members) for module in members}))
        between[name] = {layer[target] for target in targets} - {name}
    frames = {
        name: Item(
            max(drawing.width, len(TITLES.get(name, name)) * CHARACTER) + 2 * FRAME_PADDING,
            drawing.height + 2 * FRAME_PADDING + FRAME_TITLE,
        )
        for name, drawing in inner.items()
    }
    outer = arrange(frames, reduced(between), FRAME_GAP, FRAME_GAP)

    parts = []
    for name, drawing in inner.items():
        frame = outer.items[name]
        left, top = frame.x - frame.width / 2, frame.y
        parts.append(
            f'<rect class="frame" fill="{COLOURS[name]}" x="{round(left)}" y="{top:.0f}" '
            f'width="{frame.width:.0f}" height="{frame.height:.0f}"/>'
            f'<text class="title" x="{left + FRAME_PADDING:.0f}" y="{top + 22:.0f}">'
            f"{escape(TITLES.get(name, name + '/'))}</text>"
        )
        drawing.move(frame.x - drawing.width / 2, top + FRAME_PADDING + FRAME_TITLE)
        parts += [curve(drawing, arrow, "arrow") for arrow in drawing.arrows]
        parts += [box(drawing.items[module], label(module), "module") for module in graph if layer[module] == name]
    parts += [curve(outer, arrow, "layer") for arrow in outer.arrows]

    margin, caption = 12, 26
    width, height = outer.width + 2 * margin, outer.height + 2 * margin + caption
    note = "An arrow points from an importer to what it imports. Arrows that follow from others are left out."
    body = "\n".join(parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" \
viewBox="0 0 {width:.0f} {height:.0f}">
<title>Import graph of {PACKAGE}</title>
<style>
{STYLE}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" \
markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="#37474f"/></marker></defs>
<rect width="100%" height="100%" fill="white"/>
<text class="note" x="{margin}" y="{margin + 12}">{escape(note)}</text>
<g transform="translate({margin} {margin + caption})">
{body}
</g>
</svg>
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the committed figure is out of date")
    check = parser.parse_args(arguments).check
    graph = read_imports()
    if found := cycle(graph):
        print(f"import cycle: {' -> '.join([*found, found[0]])}")
        return 1
    if found := upward_imports(graph, layer := layers(graph)):
        print("imports from a lower layer into a higher one:", *found, sep="\n  ")
        return 1
    figure = draw(graph, layer)
    if check:
        current = FIGURE.exists() and FIGURE.read_text(encoding="utf-8") == figure
        print(f"{FIGURE.relative_to(ROOT)}: {'current' if current else 'out of date, run tools/import_graph.py'}")
        return int(not current)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(figure, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
