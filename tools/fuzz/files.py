"""The door of files: whole checkpoints of which one file is not as it should be."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from unittest.mock import patch

from mnemosyne import LLM, SamplingParams
from mnemosyne.model_zoo.needle import write_needle
from tools.fuzz import contents
from tools.fuzz.door import Door
from tools.fuzz.small import write_small

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PARAMS = SamplingParams(max_tokens=2, temperature=0.0)
HELLO = [{"role": "user", "content": "monday"}]
LIMIT_S = 10.0  # a start takes some tenths of a second, a template at most the bound below
TEMPLATE_S = 1


@dataclass(frozen=True, slots=True)
class Change:
    """One file of one checkpoint, and how it is changed: by a seed, for it to be told again."""

    base: str
    file: str
    kind: str
    seed: str


class Files:
    """Checkpoints to spoil.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._bases = {"needle": write_needle(folder / "needle")}
        for family in FAMILIES:
            for shards in (1, 3):
                name = f"{family}-{shards}"
                self._bases[name] = write_small(
                    folder / name, family, shards, tied=shards == 3, like=self._bases["needle"]
                )
        self._names = {
            name: sorted(file.name for file in path.iterdir()) for name, path in self._bases.items()
        }
        self._work, self._numbers = folder / "work", count()
        self._answers = {name: self._open(path) for name, path in self._bases.items()}

    def draw(self, rng: random.Random) -> Change:
        base = rng.choice(list(self._bases))
        file = rng.choice([*self._names[base], "config.json", "chat_template.jinja"])
        return Change(base, file, rng.choice(contents.kinds(file)), str(rng.random()))

    def feed(self, change: Change) -> bool:
        path = self._work / str(next(self._numbers))
        path.mkdir(parents=True)
        for name in self._names[change.base]:
            (path / name).symlink_to(self._bases[change.base] / name)
        contents.spoil(path / change.file, change.kind, random.Random(change.seed))
        try:
            self._open(path, is_chat=change.kind == "template" or "token" in change.file)
        except ValueError as error:
            said = str(error)
            assert " must " in said, "a refusal has a rule"
            assert said.isprintable(), "a refusal is harmless"
            assert len(said) < 4000, "a refusal is short"
            return False
        finally:
            shutil.rmtree(path)
        return True

    def control(self) -> None:
        name = "needle" if next(self._numbers) % 2 else "llama-3"
        assert self._open(self._bases[name]) == self._answers[name], "the control answers anew"

    def _open(self, path: Path, is_chat: bool = False) -> list[int]:
        """Answer of a checkpoint to ids; text and chat are tried, and may be refused."""
        with LLM(str(path), device="cpu", schedule={"chunk": 64}, cache={"max_tokens": 512}) as llm:
            ids, *others = llm.generate([[5, 6, 7], "monday tuesday"], PARAMS)
            refusals = [output.error for output in (ids, *others) if output.error is not None]
            if is_chat and llm.tokenizer is not None:
                try:
                    llm.tokenizer.apply_chat_template(HELLO)
                except ValueError as error:
                    refusals.append(str(error))
        for said in refusals:
            assert " must " in said, f"a refusal has a rule: {said}"
        return ids.token_ids


@contextmanager
def files_door() -> Iterator[Door]:
    """Files of checkpoints, changed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("mnemosyne.serve.rendering.PROCESSOR_S", TEMPLATE_S),
    ):
        files = Files(Path(folder))
        yield Door(
            name="files",
            draw=files.draw,
            feed=files.feed,
            control=files.control,
            limit_s=LIMIT_S,
        )
