"""Picture of the rooms of the package and of what each imports, drawn from the sources as SVG.

    python tools/rooms_picture.py    # writes docs/rooms.svg (make picture)

An arrow that follows from others is left out, and so are those to the words that all rooms share.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "rooms.svg"
REMARKS = {
    "cli": "commands, Hydra",
    "bench": "engines side by side",
    "llm": "the offline API",
    "joining": "config in, engine out",
    "server": "HTTP over engines",
    "serve": "the loop, text, asyncio",
    "client": "of any such server",
    "load": "load for servers",
    "simulate": "steps on a clock",
    "schedule": "plans, chunks, policies",
    "runtime": "a plan becomes tokens",
    "model_zoo": "families of models",
    "operators": "between two attentions",
    "attention": "backends, exact merge",
    "parallel": "ranks, links, watchdog",
    "cache": "pages and their tables",
    "kernels": "Triton, Gluon, C++",
}
API = ("llm", "session", "options", "__init__")
SHARED = "config, request, shape, metrics, files, machine"
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW_HEIGHT, TOP = 960, 160, 46, 92, 56

Graph = dict[str, set[str]]


@dataclass(frozen=True, slots=True)
class Box:
    """The place of a room in the picture."""

    x: float  # of its middle
    y: float  # of its upper edge


def main() -> None:
    """Write the picture, with the commit that it shows."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    PICTURE.write_text(draw(reduced(read_imports(ROOT / "mnemosyne")), commit), encoding="utf-8")


def read_imports(package: Path) -> Graph:
    """Return the rooms that each room imports."""
    graph: Graph = {room: set() for room in REMARKS}
    for path in sorted(package.glob("*.py")) + sorted(package.glob("*/**/*.py")):
        room = _room_of(path.relative_to(package).with_suffix("").parts[0])
        if room is not None:
            targets = {_room_of(name) for name in _imported(path)}
            graph[room] |= {target for target in targets if target not in (None, room)}
    return graph


def _imported(path: Path) -> Iterator[str]:
    """Yield the first name after the package's own of each import of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mnemosyne":
            yield from ("llm" if alias.name[0].isupper() else alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnemosyne."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from (name[1] for name in names if name[0] == "mnemosyne" and len(name) > 1)


def _room_of(name: str) -> str | None:
    if name in API:
        return "llm"
    if name in ("cli", "__main__"):
        return "cli"
    return name if name in REMARKS else None


def reduced(graph: Mapping[str, set[str]]) -> Graph:
    """Leave out each edge that a longer way replaces; within a circle all edges stay."""
    reached = {room: _reached(graph, room) for room in graph}
    return {
        room: {
            target
            for target in targets
            if not any(
                target in reached[other] and room not in reached[other]
                for other in targets - {target}
            )
        }
        for room, targets in graph.items()
    }


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for target in graph[ahead.pop()] - found:
            found.add(target)
            ahead.append(target)
    return found


def levels(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return rooms by the longest way down to them, the ones that nobody imports first."""
    depth = dict.fromkeys(REMARKS, 0)
    for _ in REMARKS:  # as many rounds as the longest way has rooms, at most
        for room in REMARKS:
            for target in graph[room]:
                depth[target] = max(depth[target], min(depth[room] + 1, len(REMARKS) - 1))
    used = sorted(set(depth.values()))
    return [[room for room in REMARKS if depth[room] == level] for level in used]


def place(graph: Mapping[str, set[str]]) -> tuple[dict[str, Box], list[list[str]]]:
    """Return a place for each room, and the way of each arrow.

    An arrow over several levels takes a place of its own in those between, so that it leads past
    the rooms there. Rooms and arrows stand near those above that lead to them.
    """
    rows = levels(graph)
    row_of = {room: row for row, rooms in enumerate(rows) for room in rooms}
    ways = []
    for room in REMARKS:
        for target in sorted(graph[room]):
            between = range(row_of[room] + 1, row_of[target])
            stops = [f"{room}>{target}@{row}" for row in between]
            ways.append([room, *stops, target])
            for row, stop in zip(between, stops, strict=True):
                rows[row].append(stop)
    above: dict[str, list[str]] = {}
    for way in ways:
        for upper, lower in pairwise(way):
            above.setdefault(lower, []).append(upper)
    boxes: dict[str, Box] = {}
    for row, items in enumerate(rows):
        near = {item: [boxes[other].x for other in above.get(item, ())] for item in items}
        items.sort(key=lambda item: (mean(near[item]) if near[item] else WIDTH / 2, item))
        share = WIDTH / sum(_share(item) for item in items)
        left = 0.0
        for item in items:
            boxes[item] = Box(left + share * _share(item) / 2, TOP + row * ROW_HEIGHT)
            left += share * _share(item)
    return boxes, ways


def _share(item: str) -> float:
    return 1.0 if item in REMARKS else 0.3


def draw(graph: Mapping[str, set[str]], commit: str) -> str:
    """Return the picture as SVG."""
    boxes, ways = place(graph)
    height = max(box.y for box in boxes.values()) + ROW_HEIGHT + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>The rooms of Mnemosyne and their imports, commit {commit}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#7a8699"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<text x="24" y="32" font-size="16" font-weight="600" fill="#1f2933">Rooms and imports'
        f'<tspan font-size="12" font-weight="400" fill="#5b6675" dx="12">commit {commit}, drawn by '
        "tools/rooms_picture.py</tspan></text>",
        *(_arrow([boxes[stop] for stop in way]) for way in ways),
        *(line for room in REMARKS for line in _room(room, boxes[room])),
        f'<rect x="24" y="{height - 62:.0f}" width="{WIDTH - 48}" height="38" rx="6" '
        'fill="#f3f5f8" stroke="#c5ccd6"/>',
        f'<text x="{WIDTH / 2:.0f}" y="{height - 38:.0f}" text-anchor="middle" fill="#1f2933">'
        f"any room may import: {SHARED}. Arrows that follow from others are left out.</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _room(room: str, box: Box) -> Iterator[str]:
    left = box.x - BOX_WIDTH / 2
    yield (
        f'<rect x="{left:.0f}" y="{box.y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        'fill="#eaf1fb" stroke="#5b82b8"/>'
    )
    middle = f'x="{box.x:.0f}" text-anchor="middle"'
    yield f'<text {middle} y="{box.y + 19:.0f}" font-weight="600" fill="#1f2933">{room}</text>'
    yield f'<text {middle} y="{box.y + 36:.0f}" fill="#5b6675">{REMARKS[room]}</text>'


def _arrow(way: list[Box]) -> str:
    """Return a curve from the lower edge of the first box to the upper edge of the last one."""
    first, *stops, last = way
    points = [(first.x, first.y + BOX_HEIGHT)]
    for stop in stops:
        points += [(stop.x, stop.y), (stop.x, stop.y + BOX_HEIGHT)]
    points.append((last.x, last.y))
    path = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x1, y1), (x2, y2) in pairwise(points):
        bend = (y2 - y1) / 2
        path += f"C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="#7a8699" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    main()
