"""Linear layers in bfloat16 on CPU: this project's kernels and torch's product, in turns.

Each number is the median time in ms of a call per layer, for as many layers as there are in 138 MB
of weights in huge pages. *read* only fetches the same bytes.

Usage: python tools/bench_linear.py [--rows 1,16,2048] [--shapes 5632x1024,1024x2816] [--gated]
       [--repeats 7] [--threads N]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from mnemosyne.kernels.cpu.memory import huge_zeros
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from mnemosyne.operators import TORCH, NativeOperators, Operators

NUM_BYTES = 138_412_032  # of weights: 12 of 5632 x 1024

Product = Callable[[Tensor, Tensor], object]


def by_operators(operators: Operators, is_gated: bool, x_TE: Tensor, weight_NE: Tensor) -> object:
    if not is_gated:
        return operators.linear(x_TE, [(weight_NE, None)])
    gate, up = weight_NE.chunk(2)
    return operators.gated(x_TE, (gate, None), (up, None))


def read(x_TE: Tensor, weight_NE: Tensor) -> object:
    return weight_NE.view(torch.float32).sum()


def products(num_rows: int, is_gated: bool) -> dict[str, Product]:
    """Products that can be compared here, by name."""
    found: dict[str, Product] = {"torch": partial(by_operators, TORCH, is_gated), "read": read}
    for instructions in INSTRUCTION_SETS:
        most_rows = instructions.most_rows
        if instructions.why_not() is None and (most_rows is None or num_rows <= 2 * most_rows):
            # beyond the rows for which it is the faster, too
            any_rows = NativeOperators(replace(instructions, most_rows=None))
            found[instructions.name] = partial(by_operators, any_rows, is_gated)
    return dict(sorted(found.items()))


def measure(products: dict[str, Product], x_TE: Tensor, weights: list[Tensor], repeats: int) -> str:
    """A line of the medians."""
    ms: dict[str, list[float]] = {name: [] for name in products}
    for repeat in range(repeats + 1):
        for name, product in products.items():
            started_s = time.perf_counter()
            for weight_NE in weights:
                product(x_TE, weight_NE)
            if repeat:  # the first time does not count
                ms[name].append(1e3 * (time.perf_counter() - started_s))
    return "".join(f"{name:>10}{median(values):9.2f}" for name, values in ms.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,2048")
    parser.add_argument("--shapes", default="5632x1024", help="outputs x columns")
    parser.add_argument("--gated", action="store_true", help="halves of a weight: gate and up")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shapes.split(","):
        num_outputs, num_columns = map(int, shape.split("x"))
        count = max(1, NUM_BYTES // (2 * num_outputs * num_columns))
        weights = [huge_zeros((num_outputs, num_columns), torch.bfloat16) for _ in range(count)]
        for weight_NE in weights:
            weight_NE.copy_(torch.randn(num_outputs, num_columns) / num_columns**0.5)
        print(f"{count} weights of {shape}, ms")
        for num_rows in map(int, arguments.rows.split(",")):
            x_TE = torch.randn(num_rows, num_columns).bfloat16()
            compared = products(num_rows, arguments.gated)
            line = measure(compared, x_TE, weights, arguments.repeats)
            print(f"{num_rows:6} rows{line}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
