"""Is attention right on this GPU, and how fast? One call, under nine minutes.

    python tools/gpu_suite.py --json gpu.json    # on a machine with a GPU
    python tools/gpu_suite.py --write-table      # and have attention=auto go by what it measured
    python tools/gpu_suite.py --cpu-smoke        # tiny shapes in Triton's interpreter: does it run?

Every section is a process of its own with a time budget. What it found before it failed or ran
out of time is kept, and the others run. Prefill counts the FLOP of the causal half; decode counts
K and V.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = "conf/attention_cuda.json"
# Module and seconds of each section.
SECTIONS = {
    "machine": ("timing", 40),
    "correct": ("correctness", 130),
    "decode": ("speed", 90),
    "chunk": ("speed", 90),
    "configs": ("speed", 50),
    "fused": ("speed", 40),
    "needle": ("correctness", 95),
}


def run_section(name: str, smoke: bool) -> dict[str, Any]:
    """One section in a process of its own; it tells each entry in a line of JSON as it comes."""
    budget_s = SECTIONS[name][1]
    command = [sys.executable, __file__, "--section", name, *(["--cpu-smoke"] if smoke else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if smoke:
        environment["TRITON_INTERPRET"] = "1"
    section: dict[str, Any] = {}
    started_s = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdout=out, stderr=log, timeout=budget_s
            )
            failed = f"ended with {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            failed = f"took over {budget_s} s"
        for file in (out, log):
            file.seek(0)
        # an entry that was cut off has no line end
        lines = [line for line in out if line.startswith("{") and line.endswith("\n")]
        section["result"] = {key: x for line in lines for key, x in json.loads(line).items()}
        if failed:
            section |= {"failed": failed, "log": log.read()[-2000:]}
    wrong = [key for key, entry in section["result"].items() if "failed" in entry]
    if wrong and not failed:
        section["failed"] = f"wrong: {', '.join(wrong)}"
    return section | {"seconds": time.perf_counter() - started_s}


def print_section(name: str, section: dict[str, Any]) -> None:
    """A table: an entry per line."""
    print(f"\n{name}: {section['seconds']:.0f} s {section.get('failed', '')}", flush=True)
    for key, entry in section["result"].items():
        fields = (
            f"{field} {value:.4g}" if isinstance(value, float) else f"{field} {value}"
            for field, value in entry.items()
        )
        print(f"  {key:44} {'  '.join(fields)}", flush=True)
    if "log" in section:
        print(section["log"], file=sys.stderr)


def faster(section: dict[str, Any]) -> str:
    """Which of our backends took less time at every length from 64K keys on; flex if neither."""
    seconds = {key: entry.get("seconds") for key, entry in section["result"].items()}
    lengths = [int(key.split()[1]) for key in seconds if key.startswith("flex ")]
    pairs = [(seconds.get(f"triton {n}"), seconds[f"flex {n}"]) for n in lengths if n >= 2**16]
    won = all(None not in (ours, flex) and ours < flex for ours, flex in pairs)
    return "triton" if pairs and won else "flex"


def write_table(sections: dict[str, Any], path: Path) -> None:
    """Note the faster backends of this GPU, beside those of others."""
    table = json.loads(path.read_text())
    capability = sections["machine"]["result"]["device"]["capability"]
    table[capability] = {kind: faster(sections[kind]) for kind in ("decode", "chunk")}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes, no GPU")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here, print its JSON")
    parser.add_argument("--write-table", action="store_true", help=f"note the faster in {TABLE}")
    options = parser.parse_args()
    if options.write_table and options.cpu_smoke:
        parser.error("--write-table needs a GPU: what --cpu-smoke times says nothing of one")
    if options.section:
        module = importlib.import_module(f"tools.gpu.{SECTIONS[options.section][0]}")
        for key, entry in getattr(module, options.section)(options.cpu_smoke):
            print(json.dumps({key: entry}), flush=True)
        return 0
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    report: dict[str, Any] = {"commit": commit, "smoke": options.cpu_smoke, "sections": {}}
    report["versions"] = {name: version(name) for name in ("torch", "triton")}
    for name in SECTIONS:
        report["sections"][name] = section = run_section(name, options.cpu_smoke)
        print_section(name, section)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = any("failed" in section for section in report["sections"].values())
    if options.write_table and not failed:
        write_table(report["sections"], ROOT / TABLE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
