"""The program that asks whether the tests notice small wrong changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.mutate.__main__ import ROOMS, draw
from tools.mutate.concerned import files_concerning
from tools.mutate.mutants import Finder
from tools.mutate.runs import Judge, Tree, Verdict

CODE = '''
"""é: a text of two bytes."""
@dataclass(slots=True)
class Box:
    size: int = 3

    def holds(self, count: int) -> bool:
        log.info("%d", count + 1)
        if count > self.size - 1 and count:
            raise ValueError(f"count must be < {self.size + 1}")
        self.fill(count)
        return True
'''


def test_every_change_is_made_once_and_still_parses() -> None:
    mutants = Finder("box.py", CODE.encode()).found

    changes = [(mutant.line, mutant.before, mutant.after) for mutant in mutants]
    assert changes == [
        (5, "3", "4"),
        (9, "count > self.size - 1 and count", "(not (count > self.size - 1 and count))"),
        (9, "count > self.size - 1 and count", "(count > self.size - 1 or count)"),
        (9, "count > self.size - 1", "(count >= self.size - 1)"),
        (9, "self.size - 1", "(self.size + 1)"),
        (9, "1", "2"),
        (10, 'raise ValueError(f"count must be < {self.size + 1}")', "pass"),
        (11, "self.fill(count)", "pass"),
        (12, "return True", "return None"),
        (12, "True", "False"),
    ]
    for mutant in mutants:
        changed = mutant.source(CODE.encode()).decode()
        compile(changed, "box.py", "exec")
        different = [a != b for a, b in zip(CODE.splitlines(), changed.splitlines(), strict=True)]
        assert different.index(True) == mutant.line - 1
        assert sum(different) == 1


def test_a_seed_draws_the_same_mutants_evenly_over_the_rooms() -> None:
    drawn = draw(["schedule", "cache", "config"], 9, seed=5)

    assert drawn == draw(["schedule", "cache", "config"], 9, seed=5)
    assert drawn != draw(["schedule", "cache", "config"], 9, seed=6)
    assert [mutant.path.rpartition("/")[0] for mutant in drawn].count("mnemosyne/cache") == 3


def test_tests_of_a_module_are_those_of_its_name_its_importers_and_its_room() -> None:
    found = files_concerning("mnemosyne/schedule/chunking.py")

    assert found[0] == "tests/schedule/test_chunking.py"
    assert "tests/schedule/test_plain_recomputation.py" in found
    assert "tests/schedule/test_policy.py" in found
    for pattern in ROOMS.values():
        assert pattern.endswith(".py")


def test_the_fastest_of_equally_near_tests_go_first() -> None:
    seconds = {"tests/schedule/test_policy.py": 1.0, "tests/schedule/test_admission.py": 2.0}

    found = files_concerning("mnemosyne/schedule/chunking.py", seconds)

    assert found[0] == "tests/schedule/test_chunking.py"
    of_the_room = [file for file in found if file.startswith("tests/schedule/")]
    places = [of_the_room.index(file) for file in seconds]
    assert places == sorted(places)
    slower = {**seconds, "tests/schedule/test_policy.py": 3.0}
    again = files_concerning("mnemosyne/schedule/chunking.py", slower)
    assert again.index("tests/schedule/test_policy.py") > again.index(
        "tests/schedule/test_admission.py"
    )


TESTS = """
import pathlib
from answers import answer

def test_right():
    assert answer() == 42
"""
UNSOUND = """
def test_broken():
    assert False

def test_flaky():
    mark = pathlib.Path("ran")
    mark.touch() if (is_first := not mark.exists()) else mark.unlink()
    assert not is_first
"""


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tree, Tree]]:
    """Two trees, to stay as it is and to be mutated."""
    plain, mutated = (Tree(tmp_path_factory.mktemp(name), Path()) for name in ("plain", "mutated"))
    (plain.root / "answers.py").write_text("def answer():\n    return 42\n")
    yield plain, mutated
    plain.close()
    mutated.close()


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("return 42", Verdict.LIVES),
        ("return 43", Verdict.KILLED),
        ("import os; os._exit(3)", Verdict.KILLED),
        ("while True: pass", Verdict.HANGS),
    ],
)
def test_a_mutant_is_killed_by_what_passes_without_it_alone(
    trees: tuple[Tree, Tree], monkeypatch: pytest.MonkeyPatch, body: str, verdict: Verdict
) -> None:
    monkeypatch.setattr("tools.mutate.runs.TEST_S", 4.0)
    monkeypatch.setattr("tools.mutate.runs.SMALL_SHARE", 100.0)  # however busy the machine is
    (trees[1].root / "answers.py").write_text(f"def answer():\n    {body}\n")
    for tree in trees:
        (tree.root / "test_it.py").write_text(TESTS + UNSOUND * (verdict is Verdict.LIVES))
    judge = Judge(trees[0], limit_s=60)

    found, test, passed = judge.try_out(trees[1], lambda seconds: ["test_it.py"])

    assert found is verdict
    assert test == ("" if verdict is Verdict.LIVES else "test_it.py::test_right")
    assert passed == (["test_it.py"] if verdict is Verdict.LIVES else [])
    if verdict is Verdict.LIVES:
        assert judge.not_counted == {"test_it.py::test_broken", "test_it.py::test_flaky"}
