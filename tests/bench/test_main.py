"""The loop that times an engine: who comes when, who is cut off, what goes where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mnemosyne.bench.peers.main import serve
from mnemosyne.bench.process import PROGRAMS

ECHO = """
import sys
class Echo:
    about = {"version": "echo 1"}
    def add(self, index, request): print("noise"); self.left = [(index, t) for t in request["ids"]]
    def step(self): return [self.left.pop(0)]
    def stop(self): pass
def open_engine(settings): return Echo()
"""


class Counting:
    """Gives each request one token per step, numbered; remembers what was asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._counts: dict[int, int] = {}

    def add(self, index: int, request: dict[str, Any]) -> None:
        self.said.append(f"add {index}")
        self._counts[index] = 0

    def step(self) -> list[tuple[int, int]]:
        self.said.append("step")
        for index in self._counts:
            self._counts[index] += 1
        return list(self._counts.items())

    def stop(self) -> None:
        self.said.append("stop")


def request(max_tokens: int, after: int = 0) -> dict[str, Any]:
    return {"ids": [1], "max_tokens": max_tokens, "is_filled": False, "after": after}


def test_a_request_comes_when_the_others_have_their_tokens_and_ends_the_run() -> None:
    engine = Counting()

    answers = serve(engine, [request(9), request(9), request(2, after=3)])

    assert engine.said == ["add 0", "add 1", *["step"] * 3, "add 2", *["step"] * 2, "stop"]
    assert [answer["token_ids"] for answer in answers] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2]]
    assert all(sorted(a["times_s"]) == a["times_s"] for a in answers)
    assert answers[0]["added_s"] <= answers[0]["times_s"][0]
    assert answers[2]["added_s"] >= answers[0]["times_s"][2]


def test_what_an_engine_prints_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    lines = [json.dumps({}), json.dumps([{"ids": [5, 6], "max_tokens": 2, "after": 0}])]

    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "main.py"), str(tmp_path / "echo.py")],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
    )

    about, (answer,) = (json.loads(line) for line in done.stdout.splitlines())
    assert about == {"version": "echo 1"}
    assert answer["token_ids"] == [5, 6]
    assert "noise" in done.stderr
