"""Draw docs/rooms.svg: the rooms of the three packages in their order, and who imports whom.

Measured from the imports in the source; plain SVG, the same bytes for the same source. The order is
`ORDER` in tests/test_architecture.py, which holds the code to it. Nothing of ours is imported.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Pixels: a cell of the grid, a room's box, the margins around the grid.
CELL, BOX, LEFT, TOP, RIGHT, BOTTOM = 26, 96, 24, 96, 108, 20
# Imports of one file by another behind a dot, at least, and its radius. Coarse, so that the picture
# changes when the house does and not with every import.
RADII = ((10, 9.5), (4, 7), (1, 4.5))
# Of each package: what it is drawn with, and the ground behind its rooms.
COLOURS = {
    "profiler": ("#1b7a5a", "#eaf5f0"),
    "edge_sdk": ("#2458a6", "#edf2fb"),
    "coordinator": ("#a8481c", "#fbf0ea"),
}
INK, FAINT, PAPER = "#24292f", "#6b7280", "#ffffff"
LEGEND = (
    "The ground floor is at the bottom. From a box go to the left:",
    "each dot is a room that it imports, to be found at the foot of the",
    "column. Right of the boxes there is none: no room imports one above it.",
)
STYLE = f"""\
text {{ font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: {INK} }}
.box {{ fill: {PAPER}; stroke-width: 1.5 }}
.line {{ fill: none; stroke-width: 1; stroke-opacity: 0.4 }}
.package {{ font-size: 17px; font-weight: 700 }}
.title {{ font-size: 19px; font-weight: 700 }}
.head {{ font-size: 11px }}
.legend {{ fill: {FAINT} }}"""


class Room(NamedTuple):
    """A sub-package, or a module beside them."""

    package: str
    name: str


def room_order() -> dict[str, list[list[str]]]:
    """Return the rooms of each package from the ground up, as the architecture test holds them."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            order: dict[str, list[list[str]]] = ast.literal_eval(node.value)
            return order
    raise SystemExit("tests/test_architecture.py has no ORDER")


def all_rooms() -> list[Room]:
    """Return all rooms from the ground up."""
    return [
        Room(package, name)
        for package, lines in room_order().items()
        for line in lines
        for name in line
    ]


def room_of(module: str) -> Room:
    """Return the room of a module of ours, given by its dotted name."""
    package, name = module.split(".")[:2]
    return Room(package, name)


def count_imports() -> Counter[tuple[Room, Room]]:
    """Return how many pairs of modules stand behind each import of one room by another."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in room_order()
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    }
    found: Counter[tuple[Room, Room]] = Counter()
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for other in sorted(set(imported(tree)) & files.keys()):
            if room_of(other) != room_of(module):
                found[room_of(module), room_of(other)] += 1
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a module imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def draw_rooms() -> str:
    """Return the picture."""
    rooms, imports = all_rooms(), count_imports()
    size = CELL * len(rooms)
    width, height = LEFT + size + RIGHT, TOP + size + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="Rooms and their imports">',
        f"<style>\n{STYLE}\n</style>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        text(LEFT, 30, "Rooms in their order, and who imports whom", "title"),
        *grounds(rooms),
        *heads(rooms, imports),
        *lines(rooms, imports),
        *dots(rooms, imports),
        *boxes(rooms),
        *legend(width, height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def place(rooms: list[Room], room: Room) -> tuple[int, int]:
    """Return the left upper corner of a room's cell on the diagonal."""
    index = rooms.index(room)
    return LEFT + CELL * index, TOP + CELL * (len(rooms) - 1 - index)


def grounds(rooms: list[Room]) -> Iterator[str]:
    """Draw the ground of each package, with its name."""
    for package, (colour, ground) in COLOURS.items():
        own = [room for room in rooms if room.package == package]
        x, bottom = place(rooms, own[0])
        y, size = place(rooms, own[-1])[1], CELL * len(own)
        yield (
            f'<rect x="{x - 8}" y="{y - 4}" width="{size + BOX + 4}" height="{size + 8}" '
            f'rx="8" fill="{ground}"/>'
        )
        right, low = x + size + BOX - 16, bottom + CELL - 6
        yield text(right, low, package, "package", f'text-anchor="end" style="fill:{colour}"')


def heads(rooms: list[Room], imports: Counter[tuple[Room, Room]]) -> Iterator[str]:
    """Write above a column whose box is far below what it is called."""
    used = {other for _, other in imports if other.package != rooms[-1].package}
    for room in sorted(used):
        x, y = place(rooms, room)[0] + CELL // 2 + 2, TOP - 6
        turned = f'transform="rotate(-40 {x} {y})" style="fill:{COLOURS[room.package][0]}"'
        yield text(x, y, room.name, "head", turned)


def lines(rooms: list[Room], imports: Counter[tuple[Room, Room]]) -> Iterator[str]:
    """Draw for each import a way from a box to the left and down to another."""
    half = CELL // 2
    for room in rooms:
        stroke = f'stroke="{COLOURS[room.package][0]}"'
        x, y = place(rooms, room)
        reached = [other for one, other in imports if one == room]
        if reached:
            far = min(place(rooms, other)[0] for other in reached)
            yield f'<path class="line" {stroke} d="M{x} {y + half}H{far + half}"/>'
        users = [one for one, other in imports if other == room]
        if users:
            high = min(place(rooms, one)[1] for one in users)
            yield f'<path class="line" {stroke} d="M{x + half} {high + half}V{y}"/>'
            tip = f"M{x + half - 4} {y - 5}h8l-4 7z"
            yield f'<path fill="{COLOURS[room.package][0]}" d="{tip}"/>'


def dots(rooms: list[Room], imports: Counter[tuple[Room, Room]]) -> Iterator[str]:
    """Draw a dot where a row turns down, the larger the more modules import each other."""
    half = CELL // 2
    for (one, other), count in sorted(imports.items()):
        x, y = place(rooms, other)[0] + half, place(rooms, one)[1] + half
        radius = next(radius for least, radius in RADII if count >= least)
        yield f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{COLOURS[one.package][0]}"/>'


def boxes(rooms: list[Room]) -> Iterator[str]:
    """Draw the rooms themselves."""
    for room in rooms:
        x, y = place(rooms, room)
        yield (
            f'<rect class="box" x="{x}" y="{y + 2}" width="{BOX}" height="{CELL - 4}" rx="5" '
            f'stroke="{COLOURS[room.package][0]}"/>'
        )
        yield text(x + 9, y + 17, room.name)


def legend(width: int, height: int) -> Iterator[str]:
    """Say how to read the picture, where the grid is empty."""
    right, low = width - 24, height - BOTTOM - 6
    for index, row in enumerate(reversed(LEGEND)):
        yield text(right, low - 26 - 18 * index, row, "legend", 'text-anchor="end"')
    for index, (least, radius) in enumerate(RADII):
        x = right - 90 - 124 * index
        most = f"to {RADII[index - 1][0] - 1} imports" if index else "or more"
        yield f'<circle cx="{x}" cy="{low - 4}" r="{radius}" fill="{FAINT}"/>'
        yield text(x + 14, low, f"{least} {most}", "legend")


def text(x: float, y: float, words: str, kind: str = "", more: str = "") -> str:
    """Return a line of text."""
    attributes = "".join(f" {a}" for a in (f'class="{kind}"' if kind else "", more) if a)
    return f'<text x="{x}" y="{y}"{attributes}>{words}</text>'


if __name__ == "__main__":
    print(draw_rooms(), end="")
