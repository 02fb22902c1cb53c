"""References of pages to the code, `path:line` (`name`): find names, and bring lines up to date.

python tools/doc_references.py    # rewrite the lines of all pages
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATTERN = re.compile(r"`(?P<path>[\w/.-]+\.(?:py|h|cpp)):(?P<line>\d+)`\s+\(`(?P<name>[\w.]+)`\)")


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference of a page."""

    path: str
    line: int
    name: str  # of a function, class or constant; methods as Class.method


def main() -> None:
    """Rewrite the lines of all references that moved."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        fresh = PATTERN.sub(_with_its_line, text)
        if fresh != text:
            page.write_text(fresh, encoding="utf-8")
            print(page.relative_to(ROOT))


def pages() -> list[Path]:
    """Return all pages for people."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def references(page: Path) -> Iterator[Reference]:
    """Yield the references of a page."""
    for found in PATTERN.finditer(page.read_text(encoding="utf-8")):
        yield Reference(found["path"], int(found["line"]), found["name"])


def line_of(path: Path, name: str) -> int | None:
    """Return the line on which a file defines a name, None if it does not."""
    if not path.is_file():
        return None
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return dict(_definitions(ast.parse(source), "")).get(name)
    define = re.compile(
        rf"^(?:.*\b(?:inline|struct|class|constexpr|void|#define)\b.*)\b{name}\b[^;]*"
    )
    lines = (number for number, line in enumerate(source.splitlines(), 1) if define.match(line))
    return next(lines, None)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + child.name, child.lineno
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{child.name}.")
        elif isinstance(child, (ast.Assign, ast.AnnAssign)):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            for target in targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                yield from ((prefix + each.id, child.lineno) for each in names if _is_name(each))


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


def _with_its_line(found: re.Match[str]) -> str:
    line = line_of(ROOT / found["path"], found["name"])
    if line is None:
        raise ValueError(f"{found['path']} must define {found['name']}, got no such name")
    return found[0].replace(f":{found['line']}`", f":{line}`", 1)


if __name__ == "__main__":
    main()
