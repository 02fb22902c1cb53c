"""``mnemosyne bench serve``: load for an OpenAI-compatible server, and its results."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.progress import Progress

from mnemosyne.cli import FAILED, OK
from mnemosyne.config_client import BenchServeConfig
from mnemosyne.load.report import summary, write
from mnemosyne.load.requests import Outcome, planned
from mnemosyne.load.run import run


def bench_serve(config: BenchServeConfig) -> int:
    """Send the load of a config and print the results.

    Args:
        config: server, load and bounds.

    Returns:
        0; 2 if no request was served.

    Raises:
        ValueError: if the server does not answer at all.
    """
    requests, console = planned(config), Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=len(requests))

        def on_end(outcome: Outcome) -> None:
            progress.advance(task)

        outcomes = asyncio.run(run(config, requests, on_end))
    bounds = float(config.ttft), float(config.tbt)
    print("\n".join(summary(outcomes, *bounds)))
    if config.output is not None:
        write(outcomes, config.output)
    if config.plot is not None:
        from mnemosyne.load.picture import draw

        draw(outcomes, config.plot, *bounds)
    return OK if any(outcome.end == "served" for outcome in outcomes) else FAILED
