"""Writes docs/paper.md: the paper's figures beside ours, all of ours simulated. ``make paper``.

Every number of the page comes from here. A row of results is kept once it is there, with the commit
it is of, so that a run that was stopped loses nothing: named kinds of rows are run alone, and
``--missing`` runs those that are not of the commit that is checked out.

Usage: python tools/paper [--missing] [KIND ...]     kinds: alone mix capacity static ...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from goals import smallest_cluster
from mixed import A100, MIX_70B, SCHEDULERS, capacity, serve_mix
from page import write_page
from runs import layout, serve_alone, serve_beside, simulate_config
from steps import attention_table, context_parallel_s, prefill_flops

M = 2**20
MODELS = ("llama3_8b", "llama3_70b")
CONTEXTS = (M, 2 * M, 4 * M, 10 * M)
STAGES = (1, 2, 4, 8, 16)
GROUPS = (1, 2, 4, 8)
RATES = (0.25, 0.5, 0.75, 1.0)
NUM_REQUESTS = 600  # of each mixed workload
STATIC = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens
TARGETS = (0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2)  # seconds
WITH_CAPACITY = ("lars", "fcfs, adaptive", "vLLM-like, 512", "vLLM-like, 2048", "LoongServe-like")

Job = tuple[str, Callable[..., Any], tuple[Any, ...]]


def jobs() -> list[Job]:
    """Name, function and arguments of every experiment, the longest first."""
    found: list[Job] = []
    for name, mesh in MIX_70B.items():
        platform = ["hardware=h100", "workload=mixed_2m", "schedule.max_sequences=256", *mesh]
        found.append((f"mix70/{name}", serve_mix, ("llama3_70b", platform, [], 1.75, 150)))
    found += [
        (f"capacity/{name}", capacity, ("llama3_8b", A100, SCHEDULERS[name], 200))
        for name in WITH_CAPACITY
    ]
    for rate in RATES:
        for name, words in SCHEDULERS.items():
            arguments = ("llama3_8b", A100, words, rate, NUM_REQUESTS)
            found.append((f"mix/{name}/{rate}", serve_mix, arguments))
    for model in MODELS:
        for context in CONTEXTS:
            for pp in STAGES:
                arguments = (model, context, *layout(pp=pp))
                found.append((f"alone/{model}/{context}/{pp}", serve_alone, arguments))
            arguments = (model, context, 16)
            found.append((f"cp/{model}/{context}", context_parallel_s, arguments))
        for context in (4 * M, 10 * M):
            for kvp in GROUPS:
                arguments = (model, context, kvp, *layout(pp=4, kvp=kvp))
                found.append((f"tpot/{model}/{context}/{kvp}", _alone_on_groups, arguments))
    for chunk in STATIC:
        words = [*layout(), "schedule=fixed", f"schedule.chunk={chunk}"]
        found.append((f"static/{chunk}", serve_beside, ("llama3_8b", M, *words)))
    for target in TARGETS:
        words = [*layout(), f"schedule.target_tbt={target}"]
        found.append((f"adaptive/{target}", serve_beside, ("llama3_8b", M, *words)))
    found += [
        (f"goal/{hardware}", smallest_cluster, (hardware,))
        for hardware in ("h100", "h200", "b200", "gb200_nvl72")
    ]
    found.append(("attention", attention_table, ()))
    found.append(("cp/llama3_405b/1048576", context_parallel_s, ("llama3_405b", M, 16)))
    found.append(("flops/llama3_405b", prefill_flops, ("llama3_405b", M)))
    return found


def run(job: Job) -> tuple[str, Any]:
    """Do one experiment; its result as plain values."""
    name, function, arguments = job
    started_s = time.perf_counter()
    result = function(*arguments)
    print(f"{name}: {time.perf_counter() - started_s:.1f} s", file=sys.stderr)
    return name, asdict(result) if hasattr(result, "__dataclass_fields__") else result


def _alone_on_groups(model: str, context: int, kvp: int, *words: str) -> Any:
    return serve_alone(model, context, *words, kvp=kvp)


def _commit() -> str:
    """The commit that is checked out."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Run experiments and write page, plots and numbers under docs/."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    file = docs / "paper" / "results.json"
    everything = {job[0]: job for job in jobs()}
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    commits = {name: old for name, old in before.get("commits", {}).items() if name in everything}
    results = {name: before[name] for name in commits}
    results["num_requests"] = NUM_REQUESTS
    results["step_overhead_s"] = simulate_config("bench").efficiency.step_overhead
    results["commits"], commit = commits, _commit()
    wanted = _wanted(everything, {name for name, old in commits.items() if old == commit})
    file.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for future in as_completed([pool.submit(run, everything[name]) for name in wanted]):
            name, results[name] = future.result()
            commits[name] = commit
            _write(file, results)
    _write(file, results)
    if commits.keys() == everything.keys():
        write_page(results, docs)
    else:
        print(f"no page: {len(everything) - len(commits)} rows are missing", file=sys.stderr)


def _wanted(names: Iterable[str], new: set[str]) -> list[str]:
    """Rows to run, by the words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="only rows of these kinds")
    parser.add_argument("--missing", action="store_true", help="only rows of other commits")
    arguments = parser.parse_args()
    return [
        name
        for name in names
        if (not arguments.kinds or name.split("/")[0] in arguments.kinds)
        and not (arguments.missing and name in new)
    ]


def _write(file: Path, results: dict[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    main()
