"""Is attention right on this GPU, and how fast? One call, under nine minutes.

    python tools/gpu_suite.py --json benchmarks/gpu/h100.json    # on a machine with a GPU
    python tools/gpu_suite.py --write-table    # and have attention=auto go by what it measured
    python tools/gpu_suite.py --cpu-smoke      # tiny shapes in Triton's interpreter: does it run?

Every section is a process of its own with a time budget. What it found before it failed or ran
out of time is kept, in the file as well, and the others run. Sections that time nothing run
together; the others have the GPU to themselves. Speeds stand beside the percentage of a measured
copy or matmul: prefill counts the FLOP of the causal half, decode counts K and V once.
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
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock, Timer
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = "conf/attention_cuda.json"
TOTAL_S = 510  # all of it, whatever the budgets
# Module and seconds of each section.
SECTIONS = {
    "machine": ("machine", 40),
    "triton": ("correctness", 150),
    "flex": ("correctness", 150),
    "needle": ("correctness", 150),
    "configs": ("speed", 90),
    "decode": ("speed", 80),
    "chunk": ("speed", 80),
    "step": ("step", 110),
    "far": ("correctness", 200),
}
STAGES = (
    *(("machine",), ("triton", "flex", "needle", "far")),
    *(("configs",), ("decode",), ("chunk",), ("step",)),
)
FOR_THE_TABLE = ("machine", "triton", "configs", "decode", "chunk")  # must not have failed
PEAKS = {"GB_s": ("copy", "percent_of_copy"), "TFLOP_s": ("matmul", "percent_of_matmul")}

Section = dict[str, Any]


class Report:
    """Findings so far, printed and written as they come."""

    def __init__(self, path: Path | None, smoke: bool, commit: str = "") -> None:
        versions = {name: version(name) for name in ("torch", "triton")}
        versions["python"] = sys.version.split()[0]
        self.sections: dict[str, Section] = {}
        self._about = {"commit": commit, "smoke": smoke, "versions": versions}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = Lock()  # sections of a stage report at the same time

    def begin(self, name: str) -> None:
        with self._lock:
            self.sections[name] = {"result": {}}

    def add(self, name: str, key: str, entry: dict[str, Any]) -> None:
        """Take an entry, put it beside the peaks and report it."""
        with self._lock:
            self._relate(entry)
            self.sections[name]["result"][key] = entry
            print(f"{name:8} {key:44} {in_words(entry)}", flush=True)
            self._write()

    def end(self, name: str, **fields: Any) -> None:
        """Note how a section ended."""
        with self._lock:
            section = self.sections[name]
            section |= fields
            wrong = [key for key, entry in section["result"].items() if "failed" in entry]
            if wrong and "failed" not in section:
                section["failed"] = f"wrong: {', '.join(wrong)}"
            ended = section.get("failed", "done")
            print(f"{name:8} {ended}, {section['seconds']:.0f} s", flush=True)
            if "log" in section:
                print(section["log"], file=sys.stderr)
            self._write()

    def failed(self, names: Iterable[str]) -> list[str]:
        """Those of some sections that found something wrong, or did not end."""
        sections = self.sections
        return [name for name in names if "failed" in sections.get(name, {"failed": "not run"})]

    def _relate(self, entry: dict[str, Any]) -> None:
        peaks = self.sections.get("machine", {"result": {}})["result"]
        for unit, (peak, percent) in PEAKS.items():
            if unit in entry and unit in peaks.get(peak, {}):
                entry[percent] = 100 * entry[unit] / peaks[peak][unit]

    def _write(self) -> None:
        if self._path is not None:
            report = self._about | {"sections": self.sections}
            self._path.write_text(json.dumps(report, indent=1) + "\n")


def commit_here() -> str:
    """The commit of this checkout; nothing where it is a copy, or git is missing."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def in_words(entry: dict[str, Any]) -> str:
    """The fields of an entry, but for those that its key tells."""
    fields = ((key, x) for key, x in entry.items() if key not in ("shape", "config"))
    return "  ".join(
        f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in fields
    )


def run_section(
    report: Report, smoke: bool, configs: dict[str, Any], until_s: float, name: str
) -> None:
    """One section in a process of its own; it reports each entry in a line of JSON as it comes."""
    started_s = time.perf_counter()
    budget_s = min(SECTIONS[name][1], until_s - started_s)
    report.begin(name)
    if budget_s < 1:
        report.end(name, seconds=0.0, failed=f"no time is left of {TOTAL_S} s")
        return
    command = [sys.executable, __file__, "--section", name, "--configs", json.dumps(configs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if smoke:
        command.append("--cpu-smoke")
        environment["TRITON_INTERPRET"] = "1"
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        timer = Timer(budget_s, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            # an entry that was cut off has no line end, and others may print too
            if line.startswith("{") and line.endswith("\n"):
                for key, entry in json.loads(line).items():
                    report.add(name, key, entry)
        code = process.wait()
        is_late = not timer.is_alive()
        timer.cancel()
        fields: dict[str, Any] = {"seconds": time.perf_counter() - started_s}
        if code:
            log.seek(0)
            failed = f"took over {budget_s:.0f} s" if is_late else f"ended with {code}"
            fields |= {"failed": failed, "log": log.read()[-2000:]}
    report.end(name, **fields)


def fastest_configs(sections: dict[str, Section]) -> dict[str, Any]:
    """The candidate of the least seconds of each shape, among those that are right."""
    right = sections["triton"]["result"] if "triton" in sections else {}
    best: dict[str, Any] = {}
    for key, entry in sections["configs"]["result"].items():
        known = best.get(entry["shape"])
        if "seconds" not in entry or "failed" in right.get(key, {}):
            continue
        if known is None or entry["seconds"] < known["seconds"]:
            best[entry["shape"]] = entry
    return {shape: entry["config"] for shape, entry in best.items()}


def faster(section: Section) -> str:
    """The backend that took less time at every length from 64K keys on; flex if neither."""
    seconds = {key: entry.get("seconds") for key, entry in section["result"].items()}
    lengths = [int(key.split()[1]) for key in seconds if key.startswith("flex ")]
    pairs = [(seconds.get(f"triton {n}"), seconds[f"flex {n}"]) for n in lengths if n >= 2**16]
    won = all(ours is not None and (flex is None or ours < flex) for ours, flex in pairs)
    return "triton" if pairs and won else "flex"


def write_table(sections: dict[str, Section], path: Path) -> None:
    """Note the faster backends and configs of this GPU, beside those of others."""
    table = json.loads(path.read_text())
    capability = sections["machine"]["result"]["device"]["capability"]
    row: dict[str, Any] = {kind: faster(sections[kind]) for kind in ("decode", "chunk")}
    table[capability] = row | {"configs": fastest_configs(sections)}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def run_all(report: Report, smoke: bool, names: Collection[str]) -> None:
    """Stage by stage; from ``configs`` on the kernels are those that it found to be fastest."""
    until_s = time.perf_counter() + TOTAL_S
    configs: dict[str, Any] = {}
    for stage in STAGES:
        run: Callable[[str], None] = partial(run_section, report, smoke, configs, until_s)
        with ThreadPoolExecutor(len(stage)) as threads:
            list(threads.map(run, [name for name in stage if name in names]))
        if "configs" in stage and "configs" in names:
            configs = fastest_configs(report.sections)


def run_here(name: str, smoke: bool, configs: dict[str, Any]) -> None:
    """A section in this process: a line of JSON for each entry."""
    from mnemosyne.kernels.tile import TileConfig
    from tools.gpu.setting import Setting

    setting = Setting(smoke, {shape: TileConfig(**fields) for shape, fields in configs.items()})
    module = importlib.import_module(f"tools.gpu.{SECTIONS[name][0]}")
    for key, entry in getattr(module, name)(setting):
        print(json.dumps({key: entry}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--commit", help="what is measured, where there is no repository to ask")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes, no GPU")
    parser.add_argument("--write-table", action="store_true", help=f"note the faster in {TABLE}")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections, not all")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here, print its JSON")
    parser.add_argument("--configs", type=json.loads, default={}, help="of kernels, for --section")
    options = parser.parse_args(arguments)
    if options.write_table and options.cpu_smoke:
        parser.error("--write-table needs a GPU: what --cpu-smoke times says nothing of one")
    if options.section:
        run_here(options.section, options.cpu_smoke, options.configs)
        return 0
    report = Report(options.json, options.cpu_smoke, options.commit or commit_here())
    run_all(report, options.cpu_smoke, options.only or SECTIONS)
    failed = report.failed(FOR_THE_TABLE)
    if options.write_table and failed:
        print(f"{TABLE} is left as it was: {', '.join(failed)} failed", file=sys.stderr)
    elif options.write_table:
        write_table(report.sections, ROOT / TABLE)
    return 1 if report.failed(report.sections) else 0


if __name__ == "__main__":
    sys.exit(main())
