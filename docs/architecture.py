"""The picture of the floors, drawn from the imports, and the list of the folders in CONTRIBUTING.md.

`.venv/bin/python docs/architecture.py` writes both anew. tests/test_architecture.py reads the same tree by the same
functions, holds the floors, and compares the picture and the list.
"""

import ast
import functools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
LISTING = ROOT / "CONTRIBUTING.md"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# From the top: a module imports modules of its own room and of floors below its own, no others.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "library"),
    ("tune",),
    ("launch", "new_recipe", "profiling"),
    ("training", "report", "monitor", "doctor"),
    ("export", "run"),
    ("evaluation",),
    ("inference", "explain"),
    ("estimate", "checkpoint"),
    ("model", "engine"),
    ("data", "schedule"),
    ("kernels", "config", "distributed"),
    ("files", "console", "terminal", "usage"),
    ("errors",),
    ("openmp", "redact", "timeout", "version"),
)
# The same inside smoltrain/data: from the top, what is nearer to the model.
DATA_FLOORS: tuple[tuple[str, ...], ...] = (
    ("rows",),
    ("tokens",),
    ("tokenizers",),
    ("progress",),
    ("documents", "order"),
)

# --- reading the tree


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its full name; a package stands for its __init__.py."""
    modules = {}
    for path in sorted((root / "smoltrain").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


@functools.cache  # tests ask some twenty times for those of the whole package
def read_imports(path: Path) -> set[str]:
    """Full names of what a file imports, in functions too, and what it imports for type checkers alone.

    `from a.b import c` counts as `a.b` and as `a.b.c`, which may be a module or a name in one.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, itself left out."""
    modules = find_modules(root)
    arrows = {}
    for name, path in modules.items():
        used = {other for other in read_imports(path) if other in modules and other != name}
        # `from smoltrain.data import order` is an import of order, not of the package around it.
        packages = {other for other in used if any(deeper.startswith(f"{other}.") for deeper in used)}
        arrows[name] = used - packages
    return arrows


def room_of(module: str) -> str:
    """'data' for smoltrain.data.rows.loader, 'schedule' for smoltrain.schedule, '' for the package itself."""
    return ([*module.split("."), ""])[1]


def room_imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Room -> the other rooms from which its modules import."""
    rooms: dict[str, set[str]] = {}
    for module, used in module_imports(root).items():
        rooms.setdefault(room_of(module), set()).update(room_of(other) for other in used)
    return {room: used - {room, ""} for room, used in rooms.items()}


def describe_room(room: str, root: Path = ROOT) -> str:
    """What a folder or file of the package says of itself: the first line of its docstring."""
    folder = root / "smoltrain" / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path} says nothing of itself"
    return docstring.partition("\n")[0]


def list_rooms(root: Path = ROOT) -> list[str]:
    """Rows of a Markdown table: each folder and file of the package, from the top, and what it says of itself."""
    rooms = [room for floor in FLOORS for room in floor]
    rows = []
    for room in rooms:
        inner = [f"data/{name}" for floor in DATA_FLOORS for name in floor] if room == "data" else []
        rows += [f"| `{name}{_suffix(name, root)}` | {describe_room(name, root)} |" for name in (room, *inner)]
    return rows


def write_listing(page: str, rows: list[str]) -> str:
    """The page with these rows in the first table."""
    before, rule, after = page.partition("|---|---|\n")
    _, blank, rest = ("\n" + after).partition("\n\n")
    return before + rule + "\n".join(rows) + blank + rest


def _suffix(room: str, root: Path) -> str:
    return "/" if (root / "smoltrain" / room).is_dir() else ".py"


# --- drawing it

WIDTH, MARGIN, GAP = 920, 16, 12  # pixels
LINE, PADDING = 15, 10
CHARACTER = 6.1  # width of one at 11 pixels of a sans-serif, about
FILLS = ("#e8eef7", "#f6f8fb")  # of every other floor


def draw_floors(root: Path = ROOT) -> str:
    """The floors as SVG: a box for each room with what it is and the rooms that it imports from."""
    imports = room_imports(root)
    parts: list[str] = []
    top = MARGIN
    for number, floor in enumerate(FLOORS):
        width = (WIDTH - 2 * MARGIN - GAP * (len(floor) - 1)) / len(floor)
        texts = [_box_lines(room, imports[room], width, root) for room in floor]
        height = 2 * PADDING + LINE * (1 + max(len(lines) for lines in texts))
        for place, (room, lines) in enumerate(zip(floor, texts, strict=True)):
            left = MARGIN + place * (width + GAP)
            parts += _draw_box(room, lines, left, top, width, height, FILLS[number % 2])
        top += height + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">'
    )
    background = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])


def _box_lines(room: str, used: set[str], width: float, root: Path) -> list[tuple[str, str]]:
    """(text, colour) of each line under a box's name."""
    order = [name for floor in FLOORS for name in floor]
    columns = int((width - 2 * PADDING) / CHARACTER)
    lines = [(line, "#222") for line in textwrap.wrap(describe_room(room, root), columns)]
    if room == "data":
        inner = " < ".join(" , ".join(floor) for floor in reversed(DATA_FLOORS))
        lines += [(line, "#222") for line in textwrap.wrap(f"inside: {inner}", columns)]
    if used:
        names = ", ".join(sorted(used, key=order.index))
        lines += [(line, "#667") for line in textwrap.wrap(f"imports {names}", columns)]
    return lines


def _draw_box(
    room: str, lines: list[tuple[str, str]], left: float, top: float, width: float, height: float, fill: str
) -> Iterator[str]:
    yield (f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="#9ab"/>')
    x, y = left + PADDING, top + PADDING + LINE - 4
    yield f'<text x="{x:g}" y="{y:g}" font-size="13" font-weight="bold">{room}{_suffix(room, ROOT)}</text>'
    for number, (text, colour) in enumerate(lines, start=1):
        yield f'<text x="{x:g}" y="{y + number * LINE:g}" fill="{colour}">{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw_floors(), encoding="utf-8")
    LISTING.write_text(write_listing(LISTING.read_text(encoding="utf-8"), list_rooms()), encoding="utf-8")
