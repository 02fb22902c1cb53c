"""Other people's clients against `mnemosyne serve`, each in an environment of its own.

lm-eval's loglikelihoods must be those of transformers; guidellm and aiperf must run through.

Usage: python -m tools.nightly [--clients lm-eval guidellm aiperf] [--folder FOLDER]
Environments are made in FOLDER once, by pip. Exit 1 if a client finds fault.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemosyne.joining.checkpoint import find_checkpoint
from tools.soaked import front

FOLDER = Path.home() / ".cache" / "mnemosyne-nightly"
LIMIT_S = 900.0  # for one client
TOLERANCE = 1e-4  # of a loglikelihood
PAIRS = (
    ("The tallest mountain on Earth is", " Mount Everest, which is 8,849 metres high."),
    ("Paris is the capital of", " France."),
    ("Question: what is two and two?\nAnswer:", " four"),
    ("def add(a, b):\n    return", " a + b"),
    ("Water is made of hydrogen and", " cheese, as every child knows."),
)


@dataclass(frozen=True, slots=True)
class Client:
    """A client of servers.

    Args:
        packages: that pip installs for it.
        check: is given its programs' folder, a server's URL and the model's folder; what is wrong.
    """

    packages: Sequence[str]
    check: Callable[[Path, str, Path], str | None]


def check_lm_eval(programs: Path, url: str, model: Path) -> str | None:
    """Compare its loglikelihoods with those of transformers in float32."""
    program = Path(__file__).with_name("in_lm_eval.py")
    said = run([programs / "python", program, url, model], programs.parent, given=json.dumps(PAIRS))
    found = [loglikelihood for loglikelihood, _ in json.loads(said.splitlines()[-1])]
    wanted = loglikelihoods(model)
    print("lm-eval:", *(f"{a:.5f} ({b:.5f})" for a, b in zip(found, wanted, strict=True)))
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    return None if worst <= TOLERANCE else f"loglikelihoods differ by {worst:.1e}"


def loglikelihoods(model: Path) -> list[float]:
    """Log-probability of each continuation, in float32 by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for context, continuation in PAIRS:
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logprobs_TV = oracle(ids).logits[0, start - 1 : -1].log_softmax(-1)
        found.append(float(logprobs_TV.gather(1, ids[0, start:, None]).sum()))
    return found


def check_guidellm(programs: Path, url: str, model: Path) -> str | None:
    """Run a short benchmark; all its requests must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run(
            [
                *(programs / "guidellm", "benchmark", "run", "--target", url, "--model", "any"),
                *("--processor", model, "--data", "prompt_tokens=64,output_tokens=16"),
                *("--profile", "concurrent", "--rate", "2", "--max-requests", "6"),
                *("--output-path", report),
            ],
            programs.parent,
        )
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    print("guidellm:", totals)
    return None if totals["successful"] == 6 else f"of six requests these succeeded: {totals}"


def check_aiperf(programs: Path, url: str, model: Path) -> str | None:
    """Run a short benchmark; all its requests must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        run(
            [
                *(programs / "aiperf", "profile", "--model", "any", "--url", url, "--streaming"),
                *("--endpoint-type", "chat", "--tokenizer", model, "--concurrency", "2"),
                *("--request-count", "6", "--synthetic-input-tokens-mean", "64"),
                *("--output-tokens-mean", "16", "--artifact-dir", folder, "--ui", "none"),
            ],
            programs.parent,
        )
        (report,) = Path(folder).rglob("profile_export_aiperf.json")
        told = json.loads(report.read_text())
    count = told["request_count"]["avg"]
    print("aiperf:", count, "requests; errors:", told.get("error_summary"))
    return None if count == 6 and not told.get("error_summary") else "requests failed"


CLIENTS = {
    "lm-eval": Client(("lm-eval[api]==0.4.13", "transformers"), check_lm_eval),
    "guidellm": Client(("guidellm==0.8.1",), check_guidellm),
    "aiperf": Client(("aiperf==0.13.0",), check_aiperf),
}


def run(command: Sequence[str | Path], folder: Path, given: str = "") -> str:
    """Run a program of a client; its standard output.

    Raises:
        RuntimeError: with the end of what it said, if it fails.
    """
    words = [str(word) for word in command]
    ended = subprocess.run(
        words, input=given, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S
    )
    if ended.returncode:
        raise RuntimeError(f"{words[0]} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    return ended.stdout


def programs_of(name: str, folder: Path) -> Path:
    """The folder of a client's programs, which are installed if they are not there."""
    made = folder / name
    if not (made / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
        packages = CLIENTS[name].packages
        subprocess.run([made / "bin" / "pip", "install", "--quiet", *packages], check=True)
        (made / "installed").touch()
    return made / "bin"


def main(words: list[str]) -> int:
    """Run the clients, tell what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args(words)
    programs = {name: programs_of(name, given.folder) for name in given.clients}
    model, num_wrong = find_checkpoint("smollm2").path, 0
    with front(f"model={model}", "dtype=float32", "serve.model_names=[any]") as server:
        for name in given.clients:
            try:
                wrong = CLIENTS[name].check(programs[name], server.url, model)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                wrong = str(error)
            print(f"{name}: {wrong or 'well'}", flush=True)
            num_wrong += wrong is not None
    return min(1, num_wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
