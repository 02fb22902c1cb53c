"""The program that asks whether the tests notice small wrong changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.mutate.__main__ import KILLED, LIVES, ROOMS, draw, files_concerning, run_tests
from tools.mutate.mutants import Finder

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


@pytest.mark.parametrize(("holds", "outcome"), [(True, LIVES), (False, KILLED)])
def test_a_failing_test_is_named(tmp_path: Path, holds: bool, outcome: str) -> None:
    (tmp_path / "test_one.py").write_text(f"def test_it():\n    assert {holds}\n")

    found = run_tests(tmp_path, ["test_one.py"], limit_s=60)

    assert found == (outcome, "" if holds else "test_one.py::test_it")
