"""Short requests that arrive while one long prompt is prefilled and others decode, in real time.

The same arrivals on the same ids are served by this engine under ``lars`` with adaptive chunks and
under ``fcfs`` with chunks of 2048, and by vLLM if an interpreter that has it is named; each in a
process of its own with all cores. Every engine is opened and warmed before the clock starts.

``--record steps`` writes what the steps of a policy took to ``steps-POLICY.jsonl``. Once the
simulator is calibrated to such a file, best to that of another policy than it is to predict, it
serves the same arrivals (``--calibration FILE``), and what it says is set beside what was measured.

Usage: python tools/shorts_beside_long.py [--length 64K] [--shorts 20] [--every 3] [--target 0.5]
       [--engines lars fcfs] [--vllm PYTHON] [--record PREFIX] [--calibration FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

DECODES = 4  # requests that decode from before the long prompt until the end
DECODE_CONTEXT = 512
LONG, FIRST_SHORT = DECODES, DECODES + 1  # indices of requests
LONG_AT_S = 2.0
SHORT_TOKENS = 16  # that a short request asks for
ENDLESS = 4096  # tokens of a request that decodes until the end


def serve(engine: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Serve requests from when they are due until all but the endless ones have their tokens.

    Args:
        engine: with ``add(index, request)`` and ``step() -> [(index, token_id)]``.
        requests: of each ``ids``, ``max_tokens`` and ``at_s``, in order of ``at_s``.

    Returns:
        Of each request ``added_s`` and ``times_s`` of its tokens. A request counts from when it is
        due, though an engine that is inside a step takes it only afterwards.
    """
    answers: list[dict[str, Any]] = []
    waiting_for = {i for i, r in enumerate(requests) if r["max_tokens"] < ENDLESS}
    started_s = time.perf_counter()
    while waiting_for:
        now_s = time.perf_counter() - started_s
        while len(answers) < len(requests) and requests[len(answers)]["at_s"] <= now_s:
            engine.add(len(answers), requests[len(answers)])
            answers.append({"added_s": requests[len(answers)]["at_s"], "times_s": []})
        for index, _ in engine.step():
            answers[index]["times_s"].append(time.perf_counter() - started_s)
            if len(answers[index]["times_s"]) == requests[index]["max_tokens"]:
                waiting_for.discard(index)
    engine.stop()
    return answers


def run_engine(path: str) -> None:
    """Serve as the process of an engine: a line of settings and requests in, answers out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints
    settings, requests = json.loads(sys.stdin.readline())
    spec = importlib.util.spec_from_file_location("engine_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = module.open_engine(settings)
    warm = [{"ids": r["ids"][:256], "max_tokens": 4, "is_filled": False} for r in requests[:2]]
    serve(engine, [{**request, "at_s": 0.0} for request in warm])
    answers.write(json.dumps(serve(engine, requests)) + "\n")
    answers.flush()


def make_requests(length: int, num_shorts: int, every_s: float) -> list[dict[str, Any]]:
    """Decodes at 0, the long prompt at 2 s, then a short one at about every ``every_s`` seconds."""
    import numpy as np

    rng = np.random.default_rng(0)

    def request(num_tokens: int, max_tokens: int, at_s: float) -> dict[str, Any]:
        ids = rng.integers(0, 32_000, num_tokens).tolist()
        return {"ids": ids, "max_tokens": max_tokens, "at_s": at_s, "is_filled": False}

    found = [request(DECODE_CONTEXT, ENDLESS, 0.0) for _ in range(DECODES)]
    found.append(request(length, 1, LONG_AT_S))
    at_s = LONG_AT_S
    for _ in range(num_shorts):
        at_s += every_s * rng.uniform(0.5, 1.5)
        found.append(request(int(rng.integers(32, 513)), SHORT_TOKENS, at_s))
    return found


def make_settings(
    requests: list[dict[str, Any]], schedule: dict[str, Any], record: str | None
) -> dict[str, Any]:
    """The settings of ``mnemosyne.bench.peers``; steps of our engine are written to ``record``."""
    from mnemosyne.joining.checkpoint import path_on_disk

    model = str(path_on_disk("bench", "bfloat16"))
    room = sum(len(r["ids"]) + r["max_tokens"] + 256 for r in requests)
    return {
        "model": model,
        "dtype": "bfloat16",
        "threads": len(os.sched_getaffinity(0)),
        "chunk": 2048,
        "max_tokens": room,
        "max_length": max(len(r["ids"]) + r["max_tokens"] for r in requests),
        "max_requests": len(requests),
        "fills": False,
        "engine": {
            "model": model,
            "dtype": "bfloat16",
            "schedule": schedule,
            "cache": {"max_tokens": room},
            "metrics": {"path": record},
        },
    }


def summarise(answers: list[dict[str, Any]], num_shorts: int) -> dict[str, float]:
    """Seconds: first tokens of the short ones, gaps of those that decode, the long one's end."""
    from mnemosyne.metrics import percentiles

    shorts = answers[FIRST_SHORT : FIRST_SHORT + num_shorts]
    ttft_s = percentiles(answer["times_s"][0] - answer["added_s"] for answer in shorts)
    long_end_s = answers[LONG]["times_s"][0]
    gaps_s = [
        after - before
        for answer in answers[:DECODES]
        for before, after in zip(answer["times_s"], answer["times_s"][1:], strict=False)
        if LONG_AT_S < after <= long_end_s
    ]
    tbt_s = percentiles(gaps_s)
    return {
        "ttft_p50_s": ttft_s[50],
        "ttft_p99_s": ttft_s[99],
        "tbt_p50_s": tbt_s[50],
        "tbt_p99_s": tbt_s[99],
        "long_s": long_end_s - LONG_AT_S,
        "last_short_s": max(answer["added_s"] for answer in shorts) - LONG_AT_S,
    }


def measure(python: str, file: str, settings: Any, requests: Any) -> list[dict[str, Any]]:
    """Serve the requests by one engine in a process of its own.

    Raises:
        subprocess.CalledProcessError: if the engine fails; what it says goes to standard error.
    """
    peers = Path(__file__).parents[1] / "mnemosyne" / "bench" / "peers"
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
    done = subprocess.run(
        [python, __file__, "--serve", str(peers / file)],
        input=json.dumps([settings, requests]) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def simulate(
    calibration: str, requests: list[dict[str, Any]], schedule: dict[str, Any]
) -> list[dict[str, Any]]:
    """Simulate ``serve`` on the machine whose steps a file holds.

    Raises:
        ValueError: if the file holds too few steps, or none.
    """
    from mnemosyne import cli
    from mnemosyne.cli.shapes import calibrated, find_shape
    from mnemosyne.joining.simulated import build_simulation
    from mnemosyne.simulate.workload import Arrival

    words = [f"schedule.{name}={value}" for name, value in schedule.items()]
    config = cli.config_of("simulate", "model=bench", "hardware=cpu_2core", *words)
    shape = find_shape("bench")
    config = calibrated(replace(config, calibration=calibration), shape)
    arrivals = [Arrival(r["at_s"], len(r["ids"]), r["max_tokens"]) for r in requests]
    metrics = [output.metrics for output in build_simulation(config, shape).run(arrivals)]
    return [
        {
            "added_s": m.arrival_s,
            "times_s": list(accumulate(m.tbt_s, initial=m.arrival_s + (m.ttft_s or 0.0))),
        }
        for m in metrics
    ]


def show(name: str, outcome: dict[str, float]) -> None:
    print(
        f"{name:<17}TTFT of shorts p50 {outcome['ttft_p50_s']:7.2f} p99 "
        f"{outcome['ttft_p99_s']:7.2f} s   TBT p50 {outcome['tbt_p50_s']:6.2f} p99 "
        f"{outcome['tbt_p99_s']:6.2f} s   long done after {outcome['long_s']:6.1f} s, "
        f"last short came after {outcome['last_short_s']:5.1f} s"
    )


def show_simulated(name: str, outcome: dict[str, float], measured: dict[str, float]) -> None:
    """A simulated run, and how far it is from the measured one."""
    show(f"{name}, simulated", outcome)
    off = {key: outcome[key] / measured[key] - 1 for key in ("ttft_p50_s", "tbt_p50_s", "long_s")}
    print(
        f"{'':<17}off by {off['ttft_p50_s']:+.1%} in median TTFT, {off['tbt_p50_s']:+.1%} in "
        f"median TBT, {off['long_s']:+.1%} in the time of the long prompt"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", default="64K", help="tokens of the long prompt")
    parser.add_argument("--shorts", type=int, default=20)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between short ones, mean")
    parser.add_argument("--target", type=float, default=0.5, help="seconds of schedule.target_tbt")
    parser.add_argument(
        "--engines", nargs="*", default=["lars", "fcfs"], choices=["lars", "fcfs"], help="of ours"
    )
    parser.add_argument("--vllm", help="an interpreter that has vLLM")
    parser.add_argument("--record", help="write the steps of ours to PREFIX-POLICY.jsonl")
    parser.add_argument("--calibration", help="steps that a simulation of ours is fitted to")
    parser.add_argument("--json", help="add a line per engine to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.serve:
        run_engine(arguments.serve)
        return 0
    from mnemosyne.config import parse_size

    length = parse_size(arguments.length, "--length")
    requests = make_requests(length, arguments.shorts, arguments.every)
    schedules = {
        "lars": {"policy": "lars", "target_tbt": arguments.target},
        "fcfs": {"policy": "fcfs", "chunk": 2048},
    }
    runs = [(name, sys.executable, "ours.py", schedules[name]) for name in arguments.engines]
    if arguments.vllm:
        runs.append(("vllm", arguments.vllm, "with_vllm.py", {}))
    for name, python, file, schedule in runs:
        record = f"{arguments.record}-{name}.jsonl" if arguments.record else None
        simulated = None
        if arguments.calibration and name in schedules:  # first: a bad file is told at once
            answers = simulate(arguments.calibration, requests, schedule)
            simulated = summarise(answers, arguments.shorts)
        answers = measure(python, file, make_settings(requests, schedule, record), requests)
        outcome = summarise(answers, arguments.shorts)
        show(name, outcome)
        outcomes = {name: outcome}
        if simulated is not None:
            show_simulated(name, simulated, outcome)
            outcomes[f"{name}, simulated"] = simulated
        if arguments.json:  # after each engine: the next one takes minutes, and may be stopped
            with open(arguments.json, "a", encoding="utf-8") as lines:
                for engine, found in outcomes.items():
                    lines.write(json.dumps({"engine": engine, "length": length, **found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
