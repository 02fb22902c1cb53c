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
from mnemosyne.config import EngineConfig
from mnemosyne.config_bench import BenchConfig
from mnemosyne.joining.checkpoint import find_checkpoint, path_on_disk
from mnemosyne.machine import num_cores

OK, FAILED = 0, 2  # exit statuses
PAGES_EACH = 2  # pages that a request may take beyond its tokens


def bench(config: BenchConfig) -> int:
    """Measure what the config asks for.

    Returns:
        0, or ``FAILED`` if a peer did not start or do what it was asked to: the others' results
        are there, and the reason.

    Raises:
        ValueError: if this engine does not, or none is left.
    """
    _check_output(config.output)
    console = Console(stderr=True)
    failures = Failures(console)
    if config.start:
        found = _starts(config, console, failures)
    else:
        found = _runs(config, console, failures)
    if not found:
        raise ValueError(next(iter(failures.reasons.values())))
    report.print_table(found, Console())
    for name, reason in failures.reasons.items():
        print(f"{name}: left out, {reason}")
    print(f"all runs: {config.output}")
    if config.plot is not None:
        _draw(found, config.plot)
    return FAILED if failures.reasons else OK


class Failures:
    """The peers that failed, and why; they are left out of the rest."""

    def __init__(self, console: Console) -> None:
        self.reasons: dict[str, str] = {}
        self._console = console

    def add(self, name: str, error: ValueError) -> None:
        """Note a peer's failure; that of our own engine is raised."""
        if name == report.OURS:
            raise error
        self.reasons[name] = str(error)
        self._console.print(f"{name}: left out, {error}", markup=False, highlight=False)


def _runs(config: BenchConfig, console: Console, failures: Failures) -> list[Result]:
    """Every case on every engine, in turns."""
    model = str(path_on_disk(config.model, config.dtype))
    cases = make_cases(config)
    settings = engine_settings(config, cases, model)
    with _engines(config, settings, console, failures) as engines:
        versions = {engine.name: engine.about["version"] for engine in engines}

        def requests(case: Case) -> Any:
            able = [engine.name for engine in engines if can_run(engine.about, case)]
            for name in sorted(set(versions) - set(able)):
                console.print(f"{case.name}: {name} cannot, left out")
            return case.requests(config.seed, settings["vocab_size"])

        def on_run(result: Result, results: Sequence[Result]) -> None:
            numbers = ", ".join(f"{k} {v:,.2f}" for k, v in result.runs[-1].items())
            console.print(f"{result.case}, {result.engine}: {numbers}", highlight=False)
            _write(config, results, failures, versions=versions)

        found = compare(
            engines,
            cases,
            runs=config.runs,
            requests=requests,
            on_run=on_run,
            on_failure=failures.add,
        )
        if found:
            _write(config, found, failures, versions=versions)
        return found


def _write(
    config: BenchConfig, results: Sequence[Result], failures: Failures, **known: Any
) -> None:
    settings = {**asdict(config), "failures": failures.reasons, **known}
    report.write(Path(config.output), settings, results)


def _starts(config: BenchConfig, console: Console, failures: Failures) -> list[Result]:
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
            if result.engine in failures.reasons:
                continue
            try:
                if result.engine == report.OURS:
                    seconds = start_ours(words, settings["threads"])
                else:
                    program = by_name[result.engine]
                    seconds = start_peer(program, peer_settings(program, config, settings))
            except ValueError as error:
                failures.add(result.engine, error)
                continue
            result.runs.append({"start_s": seconds})
            console.print(f"start, {result.engine}: {seconds:.2f} s", highlight=False)
    found = [result for result in found if result.runs]
    if found:
        _write(config, found, failures)
    return found


@contextmanager
def _engines(
    config: BenchConfig, settings: dict[str, Any], console: Console, failures: Failures
) -> Iterator[list[EngineProcess]]:
    """All engines that open; they idle while another one runs."""
    with ExitStack() as stack:
        engines = []
        for program in engine_programs(config):
            started_s = time.perf_counter()
            try:
                engine = EngineProcess(program, peer_settings(program, config, settings))
            except ValueError as error:
                failures.add(program.name, error)
                continue
            stack.callback(engine.close)
            seconds = time.perf_counter() - started_s
            console.print(f"{program.name}: {engine.about['version']}, ready in {seconds:.1f} s")
            engines.append(engine)
        yield engines


def engine_programs(config: BenchConfig) -> list[Program]:
    """The engines to start, ours first."""
    ours = [Program(report.OURS, "ours.py", sys.executable)] if config.ours else []
    return ours + [
        Program(peer, f"with_{peer}.py", getattr(config, f"{peer}_python") or sys.executable)
        for peer in config.peers
    ]


def engine_settings(config: BenchConfig, cases: Sequence[Case], model: str) -> dict[str, Any]:
    """The first line that every engine gets; see ``bench/peers``.

    Raises:
        ValueError: if a case is longer than the model allows.
    """
    spec = find_checkpoint(model).spec
    for case in cases:
        if case.max_positions > spec.max_positions:
            raise ValueError(
                f"lengths, max_tokens and beside must fit the model's {spec.max_positions} "
                f"positions, got {case.max_positions} in {case.name}; shorten them"
            )
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
        "vocab_size": spec.vocab_size,
        "token_bytes": spec.kv_bytes_per_token(),
        "engine": engine,
    }


def peer_settings(
    program: Program, config: BenchConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """The first line for one engine; that of llama.cpp names its own file of the model.

    Raises:
        ValueError: if llama.cpp has no such model.
    """
    if program.name != "llamacpp":
        return settings
    from mnemosyne.bench.gguf_file import gguf_file

    path = Path(settings["model"])
    file = gguf_file(find_checkpoint(settings["model"]).spec, path, config.dtype)
    return settings | {"gguf": str(file)}


def _check_output(path: str) -> None:
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(
            f"output must be a file that can be written, got {path!r}; "
            "name one in an existing directory"
        )


def _draw(results: Sequence[Result], path: str) -> None:
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    from mnemosyne.bench.picture import draw

    draw(results, path)
    print(f"picture: {path}")
