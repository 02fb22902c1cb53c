"""The forward pass as compiled pieces, cut where attention reads pages and where ranks meet.

Attention stays as it is, so every backend works, and so do collectives. A piece has one graph for
one row, and one for any other number, for each kind of layers that it lies between; all are made
before the first request and kept on disk.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mnemosyne.machine import cache_folder
from mnemosyne.operators import Rotary
from mnemosyne.parallel.feed_forward import own_rows
from mnemosyne.runtime.step import Layer, LayeredModel, Projections, Tables
from mnemosyne.step_context import StepContext

MANY_ROWS = 16  # of the steps that the graph for any number of rows is traced with

Piece = Callable[..., Any]


class _Graphs:
    """Graphs of pieces, one for each piece and the kinds of layers that it is called for.

    Args:
        kinds: of the layers held; layers of one kind share graphs.
    """

    def __init__(self, kinds: Sequence[int]) -> None:
        self._kinds = kinds
        self._made: dict[tuple[Any, ...], Piece] = {}
        self.for_any_rows = (
            False  # whether the graph that is traced now is to serve any number of rows
        )

    def __call__(self, piece: Piece, *layers: int) -> Piece:
        """The graph of a piece between some layers held; none is compiled before it is called."""
        key = piece, *(self._kinds[layer] for layer in layers)
        if key not in self._made:
            self._made[key] = _compiled(piece)
        return _marking(self._made[key]) if self.for_any_rows else self._made[key]


class CompiledModel:
    """A decoder whose pieces are compiled; its results are the decoder's, up to rounding.

    Args:
        model: weights loaded, of operators that the compiler can trace.
        device: of the weights.
    """

    def __init__(self, model: LayeredModel, device: torch.device) -> None:
        assert model.operators.can_compile
        self._model = model
        self._layers = model.decoder_layers()
        # the contents of layers are not checked at every call: one graph serves those of a kind
        kinds = [(layer.kind, *_shapes(layer)) for layer in self._layers]
        numbers = [kinds.index(kind) for kind in kinds]
        self._device = device
        self._run: Callable[..., Tensor] = self._run_whole
        if model.is_sharded or any(layer.is_sparse for layer in self._layers):
            self._run = self._run_cut
        self._one, self._many = _Graphs(numbers), _Graphs(numbers)

    def __call__(self, x: Tensor, positions_T: Tensor, context: StepContext) -> Tensor:
        """Hidden states ``[T, E]`` of the packed rows."""
        graph, hidden_TE = self._graphs(len(positions_T)), self._model.enter(x)
        begin = _begin if self._layers[0].meets_ranks else graph(_begin, 0)
        begun = begin(self._model, self._layers[0], hidden_TE, positions_T)
        return self._run(graph, hidden_TE, *begun, context)

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits ``[B, V]``, float32 or wider."""
        if self._model.is_sharded:  # one product, and then ranks meet
            return self._model.logits(hidden_BE)
        return self._graphs(len(hidden_BE))(_logits)(self._model, hidden_BE)

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile everything, or read it from disk: no step compiles after that.

        Every rank of a mesh calls it: ranks meet where they do in a step.

        Args:
            progress: called with (graphs' sizes done, sizes in all).
        """
        sizes = 1, MANY_ROWS
        with _cache_on_disk():
            for done, num_rows in enumerate(sizes):
                if progress is not None:
                    progress(done, len(sizes))
                self._many.for_any_rows = num_rows == MANY_ROWS
                x, positions_T = self._rows_of_zeros(num_rows)
                hidden_TE = self(x, positions_T, StepContext(_no_attention, own_rows))
                if self._model.is_last:
                    self.logits(hidden_TE)
        self._many.for_any_rows = False
        if progress is not None:
            progress(len(sizes), len(sizes))

    def _graphs(self, num_rows: int) -> _Graphs:
        return self._one if num_rows == 1 else self._many

    def _rows_of_zeros(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Input of the first layer held, and positions."""
        positions_T = torch.arange(num_rows, device=self._device)
        if self._model.is_first:
            return torch.zeros_like(positions_T), positions_T
        width = self._model.width
        zeros_TE = torch.zeros(num_rows, width, dtype=self._model.dtype, device=self._device)
        return zeros_TE, positions_T

    def _run_whole(
        self,
        graph: _Graphs,
        hidden_TE: Tensor,
        tables: Tables,
        projections: Projections,
        context: StepContext,
    ) -> Tensor:
        """All between two attentions is one graph."""
        layers = self._layers
        for index, (layer, following) in enumerate(pairwise(layers)):
            out_THD = context.attend(index, *projections, sink_H=layer.sink_H)
            hidden_TE, projections = graph(_between, index, index + 1)(
                layer, following, hidden_TE, out_THD, tables
            )
        last = len(layers) - 1
        out_THD = context.attend(last, *projections, sink_H=layers[-1].sink_H)
        return graph(_end, last)(self._model, layers[-1], hidden_TE, out_THD)

    def _run_cut(
        self,
        graph: _Graphs,
        hidden_TE: Tensor,
        tables: Tables,
        projections: Projections,
        context: StepContext,
    ) -> Tensor:
        """Products whose results are summed over ranks are called as they are, hooks and all."""
        layers = self._layers
        for index, layer in enumerate(layers):
            delta_TE = layer.attn(context.attend(index, *projections, sink_H=layer.sink_H))
            hidden_TE, x_TE = graph(_add_norm, index)(layer, hidden_TE, delta_TE)
            delta_TE = context.feed_forward(partial(self._feed_forward, index), x_TE)
            if index + 1 < len(layers):
                following = layers[index + 1]
                meets = following.meets_ranks
                between = _add_between if meets else graph(_add_between, index + 1)
                hidden_TE, projections = between(following, hidden_TE, delta_TE, tables)
        return graph(_add_end)(self._model, hidden_TE, delta_TE)

    def _feed_forward(self, index: int, x_TE: Tensor) -> Tensor:
        """The MLP of a layer held, over rows that may be those of all groups."""
        layer = self._layers[index]
        if layer.is_sparse:  # the products depend on the experts that rows are given to
            return layer.mlp(x_TE)
        return layer.mlp.narrow(self._graphs(len(x_TE))(_widen, index)(layer, x_TE))


def _no_attention(
    layer: int,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    rotary: Rotary | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Stands in for attention while pieces are compiled: it gives the shape alone."""
    return q_THD.contiguous()


def _begin(
    model: LayeredModel, layer: Layer, hidden_TE: Tensor, positions_T: Tensor
) -> tuple[Tables, Projections]:
    tables = model.rotary(positions_T)
    return tables, _project(layer, hidden_TE, tables)


def _between(
    layer: Layer, following: Layer, hidden_TE: Tensor, out_THD: Tensor, tables: Tables
) -> tuple[Tensor, Projections]:
    hidden_TE = layer.finish(hidden_TE, out_THD, own_rows)
    return hidden_TE, _project(following, hidden_TE, tables)


def _end(model: LayeredModel, layer: Layer, hidden_TE: Tensor, out_THD: Tensor) -> Tensor:
    return model.leave(layer.finish(hidden_TE, out_THD, own_rows))


def _add_norm(layer: Layer, hidden_TE: Tensor, delta_TE: Tensor) -> tuple[Tensor, Tensor]:
    return layer.mlp_norm(hidden_TE, delta_TE)


def _widen(layer: Layer, x_TE: Tensor) -> Tensor:
    return layer.mlp.widen(x_TE)


def _add_between(
    following: Layer, hidden_TE: Tensor, delta_TE: Tensor, tables: Tables
) -> tuple[Tensor, Projections]:
    hidden_TE = following.operators.add(hidden_TE, delta_TE)
    return hidden_TE, _project(following, hidden_TE, tables)


def _add_end(model: LayeredModel, hidden_TE: Tensor, delta_TE: Tensor) -> Tensor:
    return model.leave(model.operators.add(hidden_TE, delta_TE))


def _logits(model: LayeredModel, hidden_BE: Tensor) -> Tensor:
    return model.logits(hidden_BE)


def _project(layer: Layer, hidden_TE: Tensor, tables: Tables) -> Projections:
    """Projections as attention takes them, rotated in the graph."""
    return layer.all_turned(layer.project(hidden_TE), tables)


def _compiled(function: Piece) -> Piece:
    """The function compiled for the shapes it is first called with.

    With a code object of its own, because graphs are kept and counted per code object.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, code.co_name)
    return torch.compile(
        own, fullgraph=True, dynamic=False, options={"guard_filter_fn": _that_may_fail}
    )


def _shapes(layer: Layer) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in layer.named_parameters()]


def _that_may_fail(guards: Sequence[Any]) -> list[bool]:
    """The compiler's checks to keep before each call: rows and the state of torch.

    The others ask of weights, modules and globals, which do not change while a model is served, and
    take as long as a layer's small operators.
    """
    return [
        guard.guard_type in ("SHAPE_ENV", "GLOBAL_STATE")
        or (guard.guard_type == "TENSOR_MATCH" and not isinstance(guard.value, Parameter))
        for guard in guards
    ]


def _marking(piece: Piece) -> Piece:
    """The piece, to be traced for any number of rows from 2 up."""

    def mark(argument: Any) -> None:
        if isinstance(argument, Tensor):
            torch._dynamo.mark_dynamic(argument, 0)
        elif isinstance(argument, tuple):
            for part in argument:
                mark(part)

    def marked(*arguments: Any) -> Any:
        mark(arguments)
        return piece(*arguments)

    return marked


@contextmanager
def _cache_on_disk() -> Iterator[None]:
    """Have the compiler keep its output in the user's cache folder, while this lasts.

    Its default folder is a temporary one, and the only way to name another is its environment
    variable.
    """
    usual = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("compile"))
    try:
        yield
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        if usual is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = usual
