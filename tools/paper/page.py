"""The text of docs/paper.md, from the results of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from pictures import by_size, draw_all
from rows import efficiency, layout_rows, mix_rows, step_rows

M = 2**20
Results = dict[str, Any]
MIX_COLUMNS = (
    ("TTFT of short ones, s", "short_ttft_s", 1.0),
    ("of long ones, s", "long_ttft_s", 1.0),
    ("of all, s", "ttft_s", 1.0),
    ("TBT, ms", "tbt_s", 1e3),
)


def write_page(results: Results, docs: Path) -> None:
    """Write ``paper.md`` and its plots.

    Args:
        results: by the names of the experiments.
        docs: the folder.
    """
    draw_all(results, docs / "paper")
    parts = (
        intro(results),
        figures(results),
        chunks(results),
        plane(results),
        scaling(results),
        groups(results),
        mixes(results),
        goals(results),
    )
    (docs / "paper.md").write_text("\n".join(parts), encoding="utf-8")


def intro(results: Results) -> str:
    """Introduce the page, and the code that it is of."""
    return f"""\
# The paper's figures, and ours

Written by `make paper` (`tools/paper`, half an hour on two cores); do not edit.
{_commits(results["commits"])}

*Theirs* are the figures of Medha (arXiv 2409.17264v5; v1 is *Mnemosyne*). *Ours* are
simulated: the engine and the scheduler are those that serve, and every step takes the time
that a roofline gives for it (`mnemosyne/simulate/cost.py`) at the peaks in `conf/hardware` and
the efficiencies in `conf/efficiency/published.yaml`, one set for everything on this page,
taken from what others published and not chosen to meet any figure here. **No number of ours on
this page was measured on a GPU.** The scheduler predicts steps with its own linear model,
fitted on the simulated hardware as it is at the start of a real engine.

Operations are counted causally (a query meets half of the keys on average). Medha counts without
that half, so that its 50 to 60% of the peak are 26 to 31% here. `1M` is 1,048,576 tokens. All is
bfloat16. Within a stage nothing overlaps; a stage sends a step on while it computes the next.
"""


def _commits(commits: dict[str, str]) -> str:
    """The commits of the rows, by the first part of their names."""
    kinds: dict[str, set[str]] = {}
    for name, commit in sorted(commits.items()):
        kinds.setdefault(commit, set()).add(name.split("/")[0])
    if len(kinds) == 1:
        return f"All of it is of commit {next(iter(kinds))}."
    parts = (f"{commit} ({', '.join(sorted(names))})" for commit, names in kinds.items())
    return fill(f"Its rows are of commits {'; '.join(parts)}.", width=95)


def figures(results: Results) -> str:
    """The main table."""
    rows = [
        ("what", "setting", "theirs", "ours", "ours / theirs"),
        *step_rows(results),
        *layout_rows(results),
        *mix_rows(results),
    ]
    return "\n".join(("## Side by side", "", _table(rows), "", why(results)))


def why(results: Results) -> str:
    """Why ours differ."""
    attention = results["attention"]
    overhead = f"{1e3 * results['step_overhead_s']:g} ms"
    return f"""\
Why ours differ:

- *Times of prefill and of static chunks* are about half of theirs, or less: nearly all of a
  prefill at these lengths is attention, which we take to reach 65% of the peak
  (FlashAttention-3), while theirs reached 26 to 31% over the whole prefill, and about a seventh
  in the example of the static chunk (512 tokens against 1M keys are 54 ms at 65% of eight H100).
  Ratios between layouts depend little on it.
- *Smallest chunk, cost of chunk 32*: a roofline turns at one point, here at
  {attention["saturating"]} tokens ({attention["saturating_at_peaks"]} if attention and reads of
  the cache reached the peaks of the data sheet), and beyond it a chunk costs nothing more; a real
  kernel loses something to tiles and to splitting the keys.
- *Against context parallelism*: our baseline is an ideal one. Its ring hides all messages, every
  rank has the same work, and its attention is as fast as ours. Then it has no bubbles and reads
  no weights twice, and a pipeline of chunks comes close to it only as prompts grow (below). What
  theirs gained on it a roofline does not see. Context parallelism has no answer to what chunks
  are for: a decode that rides along waits for the whole prompt.
- *Decode penalty of SPP*: every stage adds {overhead} of step overhead and a message over the
  network, both assumptions; the share of a step that they take is larger because the rest of our
  step is faster.
- *Mixed load*: how far a queue grows depends on how close to its limit a system is, and on how
  long one looks. Our prompts are log-uniform between 128K and 1M (theirs are not stated), arrive
  for as long as {_mix_length(results)} requests take, and are then served to the end.
- *The tail over all requests* is that of the long ones, which are 5%: no scheduler makes a
  prefill of a minute much shorter, so p99 over all of them hardly moves here; the tail of the
  short ones is what scheduling decides, and is listed apart. Most of the gain comes from the
  chunk rule alone: with adaptive chunks at most one long prompt takes part in a step and leaves
  time to the short ones, even first come, first served.
- *Packing*: a long prompt with slack leaves up to 40% of its step to others. Under LRS it seldom
  comes first while others wait, so that there is nothing to leave; under LARS it does.
- *TPOT of 70B under the 2M mix*: our chunks fill every step up to the target of 30 ms whatever
  the layout, so that TPOT of the short ones is what the target allows. A long decode alone
  exceeds the target with SPP 8 and meets it with more groups.
"""


def chunks(results: Results) -> str:
    share = by_size(results["attention"]["share"])
    rows = [
        ("chunk, tokens", *map(str, share)),
        ("rate of attention", *(f"{s:.0%}" for s in share.values())),
    ]
    return f"""\
## Smallest saturating chunk

Attention of one chunk over 1M keys, Llama-3 70B on eight H100, as a share of its best rate.

{_table(rows)}

![rate of attention by chunk](paper/attention.png)
"""


def plane(results: Results) -> str:
    rows = [("chunk", "TTFT of 1M, s", "TBT p50, ms", "TBT p99, ms", "longest gap, ms")]
    for kind in ("static", "adaptive"):
        for name, run in results.items():
            if name.startswith(f"{kind}/"):
                size = name.partition("/")[2]
                label = f"{int(size):,} tokens" if kind == "static" else f"{1e3 * float(size):g} ms"
                gaps = (run["tbt_p50_s"], run["tbt_p99_s"], run["tbt_max_s"])
                times = (f"{run['ttft_s']:.1f}", *(f"{1e3 * gap:.1f}" for gap in gaps))
                rows.append((f"{kind}, {label}", *times))
    return f"""\
## Adaptive against static chunks

One prompt of 1M tokens and one decode beside it, Llama-3 8B on eight H100. A static chunk that
is quick at the beginning is slow at the end, as its attention grows with the context; an
adaptive one is as large as the target allows at every position.

{_table(rows)}

![TTFT against TBT](paper/plane.png)
"""


def scaling(results: Results) -> str:
    parts = [
        "## TTFT and sequence pipeline parallelism",
        "",
        "A lone prompt; TP 8 on every stage; time in seconds, and in brackets the scaling "
        "efficiency against one stage. An asterisk: does not fit the memory, served as if it "
        "did. CP: the baseline of context parallelism on as many GPUs as the last column.",
        "",
    ]
    for model, name in (("llama3_8b", "Llama-3 8B"), ("llama3_70b", "Llama-3 70B")):
        rows = [("context", *(f"{8 * pp} GPUs" for pp in (1, 2, 4, 8, 16)), "CP, 128 GPUs")]
        for context in (M, 2 * M, 4 * M, 10 * M):
            cells = []
            for pp in (1, 2, 4, 8, 16):
                run = results[f"alone/{model}/{context}/{pp}"]
                star = "" if run["fits"] else "\\*"
                share = efficiency(results, model, context, pp)
                cells.append(f"{run['ttft_s']:,.1f}{star} ({share:.0%})")
            cp = results[f"cp/{model}/{context}"]
            rows.append((f"{context // M}M", *cells, f"{cp:,.1f}"))
        parts += [f"{name} on H100:", "", _table(rows), ""]
    return "\n".join([*parts, "![TTFT by GPUs](paper/scaling.png)", ""])


def groups(results: Results) -> str:
    rows = [("model, context", *(f"KVP {kvp}" for kvp in (1, 2, 4, 8)))]
    for model, name in (("llama3_8b", "8B"), ("llama3_70b", "70B")):
        for context in (4 * M, 10 * M):
            runs = [results[f"tpot/{model}/{context}/{kvp}"] for kvp in (1, 2, 4, 8)]
            cells = (f"{1e3 * r['tpot_s']:.1f}" + ("" if r["fits"] else "\\*") for r in runs)
            rows.append((f"{name}, {context // M}M", *cells))
    return f"""\
## TPOT and KV-cache parallelism

Milliseconds per token of one request at the end of its context, SPP 4 x TP 8 on H100, 32 GPUs per
group. An asterisk: does not fit the memory, served as if it did.

{_table(rows)}

![TPOT by groups](paper/groups.png)
"""


def mixes(results: Results) -> str:
    parts = [
        f"""\
## Short and long requests together

Llama-3 8B on 16 A100 (TP 8 x SPP 2), {_mix_length(results)} requests, 5% of them of 128K to 1M
tokens, the others as in ShareGPT; the same requests for every scheduler. Percentiles are p50 /
p95 / p99. *On time*: first tokens within twice the time of their prefill alone, at least a
second. *vLLM-like*: first come, first served, static chunks of 512 or 2048 tokens beside the
decodes, no preemption. *LoongServe-like*: whole prompts, up to 1M tokens of them at a time,
first come, first served, both instances of eight GPUs on every prefill at perfect efficiency.
*Not packed*: a long prompt leaves nothing of its step to others.
"""
    ]
    for rate in (0.25, 0.5, 0.75, 1.0):
        rows = [("scheduler", *(name for name, _, _ in MIX_COLUMNS), "on time")]
        for key, run in results.items():
            _, *rest = key.split("/")
            if key.startswith("mix/") and rest[1] == str(rate):
                cells = (_triple(run[field], unit) for _, field, unit in MIX_COLUMNS)
                rows.append((rest[0], *cells, f"{run['on_time']:.0%}"))
        parts += [f"At {rate} requests per second:", "", _table(rows), ""]
    rows = [("scheduler", "requests per second")]
    rows += [
        (key.partition("/")[2], f"{value:.2f}")
        for key, value in results.items()
        if key.startswith("capacity/")
    ]
    parts += [
        "Capacity, the highest rate at which 90% of 200 requests are on time:",
        "",
        _table(rows),
        "",
        "![TTFT of short requests](paper/mixes.png)",
        "",
        "Llama-3 70B on 64 H100, 150 requests, 5% of them of 2M tokens, 1.75 per second, TP 8:",
        "",
        _table(_mix70(results)),
        "",
    ]
    return "\n".join(parts)


def _mix70(results: Results) -> list[tuple[str, ...]]:
    rows = [
        (
            "layout",
            "TPOT of short ones, ms",
            "TPOT of long ones, ms",
            "TTFT of short ones, s",
            "TTFT of long ones, s",
        )
    ]
    for key, run in results.items():
        if key.startswith("mix70/"):
            rows.append(
                (
                    key.partition("/")[2],
                    _triple(run["tpot_s"], 1e3),
                    _triple(run["long_tpot_s"], 1e3),
                    _triple(run["short_ttft_s"], 1),
                    _triple(run["long_ttft_s"], 1),
                )
            )
    return rows


def goals(results: Results) -> str:
    rows = [
        (
            "GPU",
            "how many",
            "pp x kvp x tp",
            "TBT beside a prefill, ms",
            "TPOT alone, ms",
            "TTFT alone, s",
        )
    ]
    for key, goal in results.items():
        if key.startswith("goal/"):
            mesh = f"{goal['pp']} x {goal['kvp']} x {goal['tp']}"
            times = (1e3 * goal["planned_tbt_s"], 1e3 * goal["tpot_s"], goal["ttft_s"])
            rows.append(
                (key.partition("/")[2], str(goal["gpus"]), mesh, *(f"{t:,.1f}" for t in times))
            )
    return f"""\
## Our own goal: 10M tokens with at most 20 ms between tokens

Llama-3 8B, one request of 10M tokens decoding while another prompt is prefilled in chunks of 32;
the smallest cluster of 4, 8, 12, 16, 24, 32, 40, 48, 64, 96 or 128 GPUs in which `mnemosyne
plan` finds a layout, whatever its TTFT, and a run in that layout.

{_table(rows)}
"""


def _mix_length(results: Results) -> int:
    return results["num_requests"]


def _triple(values: Sequence[float], unit: float) -> str:
    return " / ".join(f"{unit * v:,.1f}" if unit * v >= 10 else f"{unit * v:.2f}" for v in values)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
