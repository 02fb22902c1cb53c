"""``mnemosyne demo``: one passkey in a long text, a dozen short requests served beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from mnemosyne.cli.demo_view import DemoView, times_table
from mnemosyne.config_generate import DemoConfig
from mnemosyne.llm import LLM
from mnemosyne.metrics import StepRecord
from mnemosyne.model_zoo.haystack import CYCLES, Recital, cycle, haystack, text_of
from mnemosyne.process import INTERRUPTED, say
from mnemosyne.request import RequestOutput, SamplingParams

FOUND, NOT_FOUND = 0, 1  # exit statuses
SHORT_TOKENS = 24  # of each short answer
ANSWER_TOKENS = 16  # room for the passkey and its end token

NEXT = """
next, with a model that speaks, or one of yours:
  mnemosyne chat model=smollm2
  mnemosyne generate model=/path/to/model chat=true prompt_file=question.txt
  mnemosyne serve model=/path/to/model"""


@dataclass(slots=True, eq=False)
class Asked:
    """A request of the demo, with the answer that must come."""

    name: str
    recital: Recital
    output: RequestOutput

    @property
    def is_right(self) -> bool:
        return self.output.token_ids == self.recital.answer_ids.tolist()


@dataclass(slots=True, eq=False)
class Run:
    """All requests of one phase."""

    long: Asked | None = None
    shorts: list[Asked] = field(default_factory=list)


def demo(config: DemoConfig) -> int:
    """Hide a passkey, find it while others are served, show what happened.

    Args:
        config: length, depth and the engine.

    Returns:
        0 if the passkey and every short answer came out right, 1 if not, 130 after Ctrl-C.

    Raises:
        ValueError: if the config cannot be used.
    """
    _check_model(config.model)
    _check_plot(config.plot)
    records: list[StepRecord] = []
    recital = haystack(config.num_tokens, depth=config.depth, seed=config.seed)
    with LLM.from_config(config, on_step=records.append) as llm:
        alone = _serve(llm, config.num_short, long=None, view=None)
        records.clear()
        with DemoView(llm, records, target_tbt_s=config.schedule.target_tbt_s) as view:
            try:
                together = _serve(llm, config.num_short, long=recital, view=view)
            except KeyboardInterrupt:
                view.stop()
                say("interrupted: the passkey was not read back")
                return INTERRUPTED
    print(times_table(_outputs(alone), _outputs(together)))
    _draw(records, config)
    return _report(together)


def _serve(llm: LLM, num_short: int, *, long: Recital | None, view: DemoView | None) -> Run:
    """Serve the short requests, spread over the prefill of the long one if there is one."""
    run = Run()
    engine = llm.engine
    engine.measure()
    gap_s = 0.0
    started_s = time.perf_counter()
    if long is not None:
        params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
        run.long = Asked("long", long, engine.add(long.prompt_ids, params)[0])
        gap_s = 0.9 * engine.scheduler.prefill_s(len(long.prompt_ids)) / max(num_short, 1)
    names = list(CYCLES)
    while engine.has_work or len(run.shorts) < num_short:
        elapsed_s = time.perf_counter() - started_s
        idle = not engine.has_work
        while len(run.shorts) < num_short and (idle or elapsed_s >= gap_s * len(run.shorts)):
            run.shorts.append(_ask(llm, names[len(run.shorts) % len(names)]))
            idle = False
        pieces = engine.step()
        if view is not None:
            view.update(run.long.output if run.long else None, run.shorts, pieces)
    return run


def _ask(llm: LLM, name: str) -> Asked:
    recital = cycle(name, SHORT_TOKENS)
    params = SamplingParams(max_tokens=SHORT_TOKENS, temperature=0.0)
    return Asked(name, recital, llm.engine.add(recital.prompt_ids, params)[0])


def _outputs(run: Run) -> list[RequestOutput]:
    return [short.output for short in run.shorts]


def _check_model(model: str) -> None:
    """The texts are ids of the needle's vocabulary, and only it recites them."""
    if model != "needle":
        raise ValueError(
            f"model must be needle in the demo, got {model!r}; mnemosyne generate takes any model"
        )


def _check_plot(plot: str) -> None:
    """Refuse a plot before the work that could not be drawn after it."""
    path = Path(plot)
    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"plot must be a .png file in a directory that exists, got {plot!r}; "
            "plot=demo.png puts it here"
        )


def _draw(records: list[StepRecord], config: DemoConfig) -> None:
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed; pip install matplotlib")
        return
    from mnemosyne.plot import draw_run

    draw_run(records, config.plot, target_s=config.schedule.target_tbt_s)
    print(f"plot: {config.plot}")


def _report(run: Run) -> int:
    assert run.long is not None
    wrong = [short.name for short in run.shorts if not short.is_right]
    if wrong:
        print(f"wrong short answers: {', '.join(wrong)}")
    hidden, read = run.long.recital.answer_ids, run.long.output
    ttft_s = read.metrics.ttft_s or float("nan")
    print(f"hidden:  {text_of(hidden)}\nread:    {read.text.strip()}")
    num_tokens = len(read.prompt_token_ids)
    verdict = "found" if run.long.is_right else "NOT FOUND"
    print(f"passkey {verdict} in {num_tokens:,} tokens after {ttft_s:.1f} s")
    if not run.long.is_right or wrong:
        return NOT_FOUND
    print(NEXT)
    return FOUND
