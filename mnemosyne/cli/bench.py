"""``mnemosyne bench``: this engine and others in turns, as a table, a file and a picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from mnemosyne.bench import report
from mnemosyne.bench.cases import Case, make_cases
from mnemosyne.bench.compare import Result, can_run, compare
from mnemosyne.bench.process import EngineProcess, Program
from mnemosyne.bench.start import PROMPT, start_ours, start_peer
from mnemosyne.checkpoint import path_on_disk
from mnemosyne.config import EngineConfig
from mnemosyne.config_bench import BenchConfig
from mnemosyne.machine import num_cores

PAGES_EACH = 2  # pages that a request may take beyond its tokens


def bench(config: BenchConfig) -> int:
    """Measure what the config asks for.

    Returns:
        0.

    Raises:
        ValueError: if an engine does not start, or does not do what it is asked to.
    """
    _check_output(config.output)
    console = Console(stderr=True)
    found = _starts(config, console) if config.start else _runs(config, console)
    report.print_table(found, Console())
    print(f"all runs: {config.output}")
    if config.plot is not None:
        _draw(found, config.plot)
    return 0


def _runs(config: BenchConfig, console: Console) -> list[Result]:
    """Every case on every engine, in turns."""
    model = str(path_on_disk(config.model, config.dtype))
    cases = make_cases(config)
    settings = engine_settings(config, cases, model)
    with _engines(config, settings, console) as engines:
        versions = {engine.name: engine.about["version"] for engine in engines}

        def requests(case: Case) -> Any:
            able = [engine.name for engine in engines if can_run(engine.about, case)]
            for name in sorted(set(versions) - set(able)):
                console.print(f"{case.name}: {name} cannot, left out")
            return case.requests(config.seed, settings["vocab_size"])

        def on_run(result: Result, results: Sequence[Result]) -> None:
            numbers = ", ".join(f"{k} {v:,.2f}" for k, v in result.runs[-1].items())
            console.print(f"{result.case}, {result.engine}: {numbers}", highlight=False)
            kept = {**asdict(config), "versions": versions}
            report.write(Path(config.output), kept, results)

        return compare(engines, cases, runs=config.runs, requests=requests, on_run=on_run)


def _starts(config: BenchConfig, console: Console) -> list[Result]:
    """Fresh processes in turns: ours as the command, the peers as their own programs."""
    model = str(path_on_disk(config.model, config.dtype))
    case = Case("start", (len(PROMPT),), 1, is_filled=False)
    settings = engine_settings(config, [case], model)
    programs = [program for program in engine_programs(config) if program.name != report.OURS]
    words = [f"model={model}", f"dtype={config.dtype}", f"attention={config.attention}"]
    found = [Result(case="start", engine=report.OURS)] if config.ours else []
    found += [Result(case="start", engine=program.name) for program in programs]
    by_name = {program.name: program for program in programs}
    for _ in range(config.runs):
        for result in found:
            if result.engine == report.OURS:
                seconds = start_ours(words, settings["threads"])
            else:
                seconds = start_peer(by_name[result.engine], settings)
            result.runs.append({"start_s": seconds})
            console.print(f"start, {result.engine}: {seconds:.2f} s", highlight=False)
    report.write(Path(config.output), asdict(config), found)
    return found


@contextmanager
def _engines(
    config: BenchConfig, settings: dict[str, Any], console: Console
) -> Iterator[list[EngineProcess]]:
    """All engines, open; they idle while another one runs."""
    with ExitStack() as stack:
        engines = []
        for program in engine_programs(config):
            started_s = time.perf_counter()
            engine = EngineProcess(program, settings)
            stack.callback(engine.close)
            seconds = time.perf_counter() - started_s
            console.print(f"{program.name}: {engine.about['version']}, ready in {seconds:.1f} s")
            engines.append(engine)
        yield engines


def engine_programs(config: BenchConfig) -> list[Program]:
    """What to start, ours first."""
    ours = [Program(report.OURS, "ours.py", sys.executable)] if config.ours else []
    return ours + [
        Program(peer, f"with_{peer}.py", getattr(config, f"{peer}_python") or sys.executable)
        for peer in config.peers
    ]


def engine_settings(config: BenchConfig, cases: Sequence[Case], model: str) -> dict[str, Any]:
    """The first line that every engine gets; see ``bench/peers``."""
    num_requests = max(len(case.lengths) + 1 for case in cases)
    room = max(case.num_cached for case in cases)
    longest = max(max(*case.lengths, case.beside or 0) + case.max_tokens for case in cases)
    engine = {entry.name: getattr(config, entry.name) for entry in fields(EngineConfig)}
    engine = {k: asdict(v) if hasattr(v, "__slots__") else v for k, v in engine.items()}
    engine["model"] = model
    pages = PAGES_EACH * num_requests * config.cache.page_size
    engine["cache"]["max_tokens"] = config.cache.max_tokens or room + pages
    engine["schedule"]["max_sequences"] = max(config.schedule.max_sequences, num_requests)
    return {
        "model": model,
        "dtype": config.dtype,
        "threads": config.threads or num_cores(),
        "chunk": config.peer_chunk,
        "max_tokens": room + pages,
        "max_length": longest,
        "max_requests": num_requests,
        "fills": any(case.is_filled for case in cases),
        "vocab_size": _vocab_size(model),
        "engine": engine,
    }


def _vocab_size(model: str) -> int:
    from mnemosyne.checkpoint import find_checkpoint

    return find_checkpoint(model).spec.vocab_size


def _check_output(path: str) -> None:
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(
            f"output must be a file that can be written, got {path!r}; "
            "name one in an existing directory"
        )


def _draw(results: Sequence[Result], path: str) -> None:
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed; pip install 'mnemosyne[plots]'")
        return
    from mnemosyne.bench.picture import draw

    draw(results, path)
    print(f"picture: {path}")
