"""Other people's clients against `mnemosyne serve`, each in an environment of its own.

lm-eval's loglikelihoods must be those of transformers; guidellm and aiperf must run through;
opencode, which gives up after 3 s of silence, must wait for ranks that stand still for 25 s.

Usage: python -m tools.nightly [--clients lm-eval guidellm aiperf opencode] [--folder FOLDER]
Environments are made in FOLDER once, by pip and npm. Exit 1 if a client finds fault.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemosyne.joining.checkpoint import find_checkpoint
from tools.soaked import Front, front

FOLDER = Path.home() / ".cache" / "mnemosyne-nightly"
LIMIT_S = 900.0  # for one client
TOLERANCE = 1e-4  # of a loglikelihood
HELD_S = 25.0  # for which ranks stand still; the front takes them for dead after 30
IDLE_MS = 3000  # of silence, after which opencode gives up
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
        packages: that are installed for it.
        check: is given its programs' folder, a server and the model's folder; what is wrong.
        is_npm: whether npm installs them, else pip.
    """

    packages: Sequence[str]
    check: Callable[[Path, Front, Path], str | None]
    is_npm: bool = False


def check_lm_eval(programs: Path, server: Front, model: Path) -> str | None:
    """Compare its loglikelihoods with those of transformers in float32."""
    program = Path(__file__).with_name("in_lm_eval.py")
    said = run(
        [programs / "python", program, server.url, model], programs.parent, given=json.dumps(PAIRS)
    )
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


def check_guidellm(programs: Path, server: Front, model: Path) -> str | None:
    """Run a short benchmark; all its requests must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run(
            [
                *(programs / "guidellm", "run", "--disable-console"),
                *("--backend", f"kind=openai_http,target={server.url},model=any"),
                *("--tokenizer", f"kind=hf_auto,model={model}"),
                *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
                *("--profile", "kind=concurrent,streams=2"),
                *("--constraint", "kind=max_requests,count=6"),
                *("--output", f"kind=json,path={report}"),
            ],
            programs.parent,
        )
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    print("guidellm:", totals)
    return None if totals["successful"] == 6 else f"of six requests these succeeded: {totals}"


def check_aiperf(programs: Path, server: Front, model: Path) -> str | None:
    """Run a short benchmark; all its requests must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        run(
            [
                *(programs / "aiperf", "profile", "--model", "any", "--url", server.url),
                *("--streaming", "--endpoint-type", "chat", "--tokenizer", model),
                *(
                    "--concurrency",
                    "2",
                    "--request-count",
                    "6",
                    "--synthetic-input-tokens-mean",
                    "64",
                ),
                *("--output-tokens-mean", "16", "--artifact-dir", folder, "--ui-type", "none"),
            ],
            programs.parent,
        )
        (report,) = Path(folder).rglob("profile_export_aiperf.json")
        told = json.loads(report.read_text())
    count = told["request_count"]["avg"]
    print("aiperf:", count, "requests; errors:", told.get("error_summary"))
    return None if count == 6 and not told.get("error_summary") else "requests failed"


def check_opencode(programs: Path, server: Front, model: Path) -> str | None:
    """Have it answer while the ranks stand still; it must not give up, nor ask twice."""
    options = {"baseURL": f"{server.url}/v1", "apiKey": "none"}
    patience = {"chunkTimeout": IDLE_MS, "headerTimeout": IDLE_MS}
    models = {"m": {"name": "m", "limit": {"context": 8192, "output": 64}}}
    adapter = "@ai-sdk/openai-compatible"
    local = {"npm": adapter, "name": "local", "options": options | patience, "models": models}
    config = {"autoupdate": False, "model": "local/m", "provider": {"local": local}}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "opencode.json").write_text(json.dumps(config))
        for process in server.ranks:
            os.kill(process, signal.SIGSTOP)
        threading.Timer(HELD_S, go_on, [server.ranks]).start()
        program = programs.parent / "opencode-linux-x64" / "bin" / "opencode"
        said = run([program, "run", "-m", "local/m", "Say hello"], Path(folder), home=folder)
    print("opencode:", said.strip())
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    is_left = 'mnemosyne_answers_total{end="left"}' in page
    return "it gave up" if is_left or not said.strip() else None


def go_on(processes: Sequence[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGCONT)


CLIENTS = {
    "lm-eval": Client(("lm-eval[api]==0.4.13", "transformers"), check_lm_eval),
    "guidellm": Client(("guidellm==0.8.1",), check_guidellm),
    "aiperf": Client(("aiperf==0.13.0",), check_aiperf),
    "opencode": Client(("opencode-ai@1.18.33",), check_opencode, is_npm=True),
}


def run(
    command: Sequence[str | Path], folder: Path, *, given: str = "", home: str | None = None
) -> str:
    """Run a program of a client; its standard output.

    Raises:
        RuntimeError: with the end of what it said, if it fails.
    """
    words = [str(word) for word in command]
    ended = subprocess.run(
        words,
        input=given,
        cwd=folder,
        env=os.environ | ({} if home is None else {"HOME": home, "PWD": home}),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if ended.returncode:
        raise RuntimeError(f"{words[0]} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    return ended.stdout


def programs_of(name: str, folder: Path) -> Path:
    """The folder of a client's programs, which are installed if they are not there."""
    made = folder / name
    client = CLIENTS[name]
    if not (made / "installed").exists():
        made.mkdir(parents=True, exist_ok=True)
        if client.is_npm:
            words = ["npm", "install", "--ignore-scripts", "--prefix", str(made)]
        else:
            subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
            words = [str(made / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*words, *client.packages], check=True)
        (made / "installed").touch()
    return made / ("node_modules/.bin" if client.is_npm else "bin")


def main(words: list[str]) -> int:
    """Run the clients, tell what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args(words)
    programs = {name: programs_of(name, given.folder) for name in given.clients}
    model, num_wrong = find_checkpoint("smollm2").path, 0
    with front(
        f"model={model}", "dtype=float32", "serve.model_names=[any]", "serve.keep_alive=1s"
    ) as server:
        for name in given.clients:
            try:
                wrong = CLIENTS[name].check(programs[name], server, model)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                wrong = str(error)
            print(f"{name}: {wrong or 'well'}", flush=True)
            num_wrong += wrong is not None
    return min(1, num_wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
