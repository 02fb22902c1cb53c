"""Small wrong changes to a file of Python: swapped comparisons, off by one, dropped statements."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COUNTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one file."""

    path: str  # from the root
    line: int
    text: str  # of that line
    kind: str
    before: str
    after: str
    start: int  # byte offsets of what is replaced
    stop: int

    def source(self, text: bytes) -> bytes:
        """The whole file with the change in it."""
        return text[: self.start] + self.after.encode() + text[self.stop :]

    def __str__(self) -> str:
        change = f"{_short(self.before)} -> {_short(self.after)}"
        return f"{self.path}:{self.line}: {change}  in  {_short(self.text)}"


class Finder(ast.NodeVisitor):
    """All mutants of a file, in the order of its lines.

    Left alone: what no test should ask for, as annotations, decorators, texts of errors and lines
    of the log.
    """

    def __init__(self, path: str, text: bytes) -> None:
        self.found: list[Mutant] = []
        self._path = path
        self._lines = [0]
        for line in text.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._text = text
        self.visit(ast.parse(text))

    def _add(self, node: ast.expr | ast.stmt, kind: str, after: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._lines[node.lineno - 1] + node.col_offset
        stop = self._lines[node.end_lineno - 1] + node.end_col_offset
        before = self._text[start:stop].decode()
        line = self._text[self._lines[node.lineno - 1] : self._lines[node.lineno]].decode().strip()
        self.found.append(Mutant(self._path, node.lineno, line, kind, before, after, start, stop))

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            changed = ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)
            self._add(node, "comparison", f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        is_text = any(_is_text(part) for part in (node.left, node.right))
        if type(node.op) in COUNTED and not is_text:
            changed = ast.BinOp(node.left, COUNTED[type(node.op)](), node.right)
            self._add(node, "arithmetic", f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._add(node, "logic", f"({ast.unparse(ast.BoolOp(other, node.values))})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node, "constant", str(not node.value))
        elif isinstance(node.value, int):
            self._add(node, "off by one", str(node.value + 1))
        elif isinstance(node.value, float):
            self._add(node, "constant", repr(2 * node.value if node.value else 1.0))

    def visit_If(self, node: ast.If) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        if not (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"):
            self._add(test, "condition", f"(not ({ast.unparse(test)}))")

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Call) or _is_log(node.value):
            return  # a docstring, or what nobody computes with
        self._add(node, "dropped statement", "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add(node, "dropped statement", "pass")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add(node, "dropped statement", "pass")

    def visit_Return(self, node: ast.Return) -> None:
        is_none = isinstance(node.value, ast.Constant) and node.value.value is None
        if node.value is not None and not is_none:
            self._add(node, "returned value", "return None")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Left alone: it states what holds anyway."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Left alone: a text."""


def _is_text(node: ast.expr) -> bool:
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_string or isinstance(node, ast.JoinedStr)


def _is_log(call: ast.Call) -> bool:
    return ast.unparse(call.func).startswith(("log.", "warnings."))


def _short(text: str) -> str:
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= 60 else line[:57] + "..."


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of one file that differ from it."""
    return Finder(str(path.relative_to(ROOT)), path.read_bytes()).found
