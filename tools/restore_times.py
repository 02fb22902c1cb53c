"""How long prefixes take from ``cache.dir``, and what writing them costs running decodes.

First, a prompt that is computed and written, then read by another start: time to the first token
of both. Then a folder that is filled with random leaves (not computed): the rate of restoring
against that of reading the same files, from the disk both. Last, decodes while leaves are written
and while none are, in turns: time between tokens. Files are dropped from the page cache before
they are read. Use a quiet machine.

Usage: python tools/restore_times.py [--tokens 32K] [--fill 256K] [--pairs 5] [--decodes 4]
       [--model bench] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np

from mnemosyne import LLM, SamplingParams
from mnemosyne.cache.chain import Chain, seed_of
from mnemosyne.cache.leaf_file import Leaf, Part, Span
from mnemosyne.config import parse_size
from mnemosyne.metrics import StepRecord
from mnemosyne.request import RequestOutput
from mnemosyne.runtime.leaves import RankLeaves
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.serve.engine import Engine

TAIL = 64  # tokens of a prompt that are computed behind what is restored
CONTEXT = 1024  # tokens of each decode
STEPS = 300  # of decodes in each half of a pair
READ_BYTES = 4 << 20  # at once, where files are just read
Times = tuple[float, float]
FIRST = SamplingParams(max_tokens=1, temperature=0.0)


def prompt_of(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32_000, num_tokens)


def open_model(model: str, folder: Path, num_tokens: int, **options: object) -> LLM:
    cache = {"dir": str(folder), "dir_max_bytes": "64G", "max_tokens": num_tokens + 16 * CONTEXT}
    return LLM(model, device="cpu", cache=cache, **options)  # type: ignore[arg-type]


def leaves_of(llm: LLM) -> RankLeaves:
    """The way of an engine to its folder."""
    leaves = llm._session._leaves
    assert leaves is not None
    return leaves


def drop_from_memory(folder: Path) -> None:
    """Have the system read files from the disk when they are next asked for."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_s(folder: Path) -> float:
    """Seconds to read all files, one after the other."""
    drop_from_memory(folder)
    started_s = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.read(READ_BYTES):
                pass
    return time.perf_counter() - started_s


def computed_and_restored(model: str, folder: Path, num_tokens: int) -> str:
    """Serve a prompt by two starts; one line about both."""
    found = []
    for _ in range(2):
        if folder.exists():
            drop_from_memory(folder)
        with open_model(model, folder, num_tokens) as llm:
            llm.engine.measure()
            (output,) = llm.generate(prompt_of(num_tokens), FIRST)
        assert output.error is None, output.error
        found.append((output.metrics.ttft_s or 0.0, output.metrics.num_restored, output.token_ids))
    (cold_s, _, cold), (warm_s, restored, warm) = found
    assert warm == cold, "a wrong token"
    return (
        f"{num_tokens:,} tokens: first token after {cold_s:.2f} s computed, {warm_s:.3f} s with "
        f"{restored:,} tokens restored: {warm_s / cold_s:.1%}"
    )


def fill(llm: LLM, ids: np.ndarray) -> int:
    """Write random leaves of a prompt; how many bytes."""
    folder = leaves_of(llm).folder
    layout, size = folder.layout, folder.layout.leaf_tokens
    chain = Chain(seed_of(bytes.fromhex(layout.model), None), ids, size)
    part = Part(Span(0, layout.num_layers), Span(0, layout.num_heads), Span(0, size))
    rng = np.random.default_rng(1)
    halves = rng.standard_normal(
        (2 * layout.num_layers, layout.num_heads * layout.piece_bytes // 4)
    )
    # the upper half of a float32 is a bfloat16
    pieces = [row.view(np.uint16)[1::2].copy() for row in halves.astype(np.float32)]
    pieces = [np.concatenate([piece, piece]).view(np.uint8).data for piece in pieces]
    for index, digest in enumerate(chain.digests):
        tokens = chain.tokens(index, index + 1).tobytes()
        folder.write(Leaf(digest, chain.before(index), index * size, tokens), part, pieces, 128)
    return folder.counts.bytes_written


def restored_against_read(model: str, folder: Path, num_tokens: int) -> str:
    """Restore a folder that was filled, and just read it; one line about both."""
    ids = prompt_of(num_tokens + TAIL)
    with open_model(model, folder, num_tokens) as llm:
        assert llm.engine.scheduler.leaves.counters()["cache_written_bytes"] == 0
        num_bytes = fill(llm, ids)
    plain_s, restored_s = [], []
    for _ in range(3):
        plain_s.append(read_s(folder))
        drop_from_memory(folder)
        records: list[StepRecord] = []
        with open_model(model, folder, num_tokens, on_step=records.append) as llm:
            (output,) = llm.generate(ids, FIRST)
        assert output.metrics.num_restored == num_tokens, output.metrics.num_restored
        restored_s.append(sum(r.actual_s for r in records if r.leaves_restored and not r.chunks))
    plain, restored = (num_bytes / median(each) / 1e6 for each in (plain_s, restored_s))
    return (
        f"{num_tokens:,} tokens, {num_bytes / 2**20:,.0f} MiB: restored at {restored:,.0f} MB/s, "
        f"read at {plain:,.0f} MB/s: {restored / plain:.0%}"
    )


class Rewriting:
    """Has the leaves of one long prompt written again and again, as if they were new.

    Args:
        llm: with a folder.
        num_tokens: of the prompt.
    """

    def __init__(self, llm: LLM, num_tokens: int) -> None:
        saver, self.folder = llm.engine.scheduler.leaves._saves, leaves_of(llm).folder
        assert saver is not None
        self._saver, prefixes = saver, llm.engine.scheduler._prefixes
        assert prefixes is not None
        with mock.patch.object(saver, "note", wraps=saver.note) as noted:
            prefixes.on_whole = noted
            llm.generate(prompt_of(num_tokens), FIRST)
        self._state: RequestState = noted.call_args.args[0]
        prefixes.on_whole = saver.note

    def begin(self) -> None:
        self.folder.clear()
        self.end()
        self._state.num_noted = 0
        self._saver.note(self._state)

    def end(self) -> None:
        self._saver.clear()


def decodes_beside_writes(
    model: str, folder: Path, num_tokens: int, num_decodes: int, num_pairs: int
) -> str:
    """Decode with and without leaves that are written, in turns; one line about both."""
    quiet, beside = list[Times](), list[Times]()
    with open_model(model, folder, num_tokens) as llm:
        engine = llm.engine
        engine.measure()
        rewriting = Rewriting(llm, num_tokens)
        params = SamplingParams(max_tokens=2 * STEPS * (num_pairs + 1), ignore_eos=True)
        running = [
            engine.add(prompt_of(CONTEXT, seed), params)[0] for seed in range(1, num_decodes + 1)
        ]
        while not all(output.token_ids for output in running):
            engine.step()
        before = rewriting.folder.counts.bytes_written
        for _ in range(num_pairs):
            rewriting.end()
            quiet.append(_times_of(engine, running[0]))
            rewriting.begin()
            beside.append(_times_of(engine, running[0]))
        rewriting.end()
        engine.abort("cancelled")
        written = rewriting.folder.counts.bytes_written - before
    said = []
    for column, name in enumerate(("p50", "p99")):
        ratio = median(b[column] / q[column] for q, b in zip(quiet, beside, strict=True))
        said.append(f"{name} {1000 * median(q[column] for q in quiet):.2f} ms, {ratio - 1:+.1%}")
    return (
        f"{num_decodes} decodes while {written / 2**20:,.0f} MiB are written: {'; '.join(said)} "
        f"(medians of {num_pairs} pairs)"
    )


def _times_of(engine: Engine, output: RequestOutput) -> Times:
    """Percentiles of the time between tokens over some steps: 50 and 99, seconds."""
    before = len(output.metrics.tbt_s)
    for _ in range(STEPS):
        engine.step()
    times = output.metrics.tbt_s[before:]
    return median(times), float(np.percentile(times, 99))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench")
    parser.add_argument("--tokens", default="32K", help="computed and restored; 0: not measured")
    parser.add_argument("--fill", default="256K", help="filled and restored; 0: not measured")
    parser.add_argument("--pairs", type=int, default=5, help="of decodes; 0: not measured")
    parser.add_argument("--decodes", type=int, default=4, help="that run together")
    parser.add_argument("--dir", type=Path, help="on the disk to measure; unset: a temporary one")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="mnemosyne-leaves-", dir=arguments.dir))
    num_tokens, num_filled = (parse_size(n) for n in (arguments.tokens, arguments.fill))
    try:
        if num_tokens:
            print(computed_and_restored(arguments.model, scratch / "computed", num_tokens))
        if num_filled:
            print(restored_against_read(arguments.model, scratch / "filled", num_filled))
        if arguments.pairs:
            beside = (scratch / "beside", min(num_tokens or 8192, 8192))
            counts = (arguments.decodes, arguments.pairs)
            print(decodes_beside_writes(arguments.model, *beside, *counts))
    finally:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
