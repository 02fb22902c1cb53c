"""Linear layers of few rows as sums that the compiler fuses: they read their weight at full speed.

The CPU's matrix product of a few rows reads weights at half of what memory gives.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F


def compile_few_rows(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """A backend of ``torch.compile``: the usual one, once the linear layers are spelled out.

    Args:
        graph: rows of a static number, a few.
        inputs: its example inputs.
    """
    from torch._inductor.compile_fx import compile_fx  # a second to import

    spell_out_linear(graph)
    return compile_fx(graph, inputs)


def spell_out_linear(graph: fx.GraphModule) -> None:
    """Replace ``F.linear`` by one weighted sum per row, products and sums in float32 or wider.

    The compiler makes one loop of all rows: each weight is read once for all of them.

    Args:
        graph: traced by ``torch.compile``, changed in place.
    """
    for node in list(graph.graph.nodes):
        if node.target is F.linear:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_sums(graph.graph, *node.args))
            graph.graph.erase_node(node)
    graph.recompile()


def _sums(graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    example: Tensor = x.meta["example_value"]
    wide = torch.promote_types(example.dtype, torch.float32)
    cast = torch.ops.aten.to.dtype  # as a method the compiler would not keep the graph on disk
    wide_NE, x_TE = (graph.call_function(cast, (node, wide)) for node in (weight, x))
    sums = []
    for row in range(example.shape[0]):
        x_E = graph.call_function(operator.getitem, (x_TE, row))
        product_NE = graph.call_function(torch.mul, (wide_NE, x_E))
        sums.append(graph.call_function(torch.sum, (product_NE, -1)))
    y_TN = graph.call_function(torch.stack, (sums,))
    if bias is not None:
        y_TN = graph.call_function(torch.add, (y_TN, bias))
    return graph.call_function(cast, (y_TN, example.dtype))
