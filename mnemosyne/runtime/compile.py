"""The forward pass as compiled pieces, cut where attention reads pages.

Attention stays as it is, so every backend works. A piece has one graph for each of a few numbers
of rows, and one for all others; all are made before the first request and kept on disk.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from mnemosyne.attention.segments import Attend
from mnemosyne.kernels.cpu import linear
from mnemosyne.machine import cache_folder
from mnemosyne.runtime.few_rows import compile_few_rows
from mnemosyne.runtime.step import Layer, LayeredModel

# Steps of so many rows have graphs of their own. Where a linear layer is spelled out as a sum per
# row, two rows have one as well: with more the sums gained little in one measurement and lost much
# in another. Where C++ kernels do everything, a compiler adds nothing to one row.
USUAL_ROWS = (1,)
ROWS_OF_SUMS = (1, 2)
ROWS_OF_KERNELS = ()
MANY_ROWS = 16  # of the steps that the graph for any number of rows is traced with

Rotary = tuple[Tensor, Tensor]
Projections = tuple[Tensor, Tensor, Tensor]
Piece = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What lies between calls of attention; every layer uses the same graphs."""

    first: Piece
    between: Piece
    last: Piece
    project: Piece
    finish: Piece
    logits: Piece

    @classmethod
    def make(cls, wrap: Callable[[Piece], Piece]) -> Self:
        """All pieces, wrapped; none is compiled before it is called."""
        functions: tuple[Piece, ...] = (_first, _between, _last, _project, _finish, _logits)
        return cls(*map(wrap, functions))


class CompiledModel:
    """A decoder whose pieces are compiled; it gives what the decoder gives, up to rounding.

    Args:
        model: weights loaded.
        mode: ``layer``: each layer is compiled before and after its attention. ``step``: all but
            attention is compiled, across layers, from the ids to the logits.
        device: of the weights.
        rows: numbers of rows that get graphs of their own; unset: the usual ones of the device.
            One row without a graph is left to the decoder.
    """

    def __init__(
        self,
        model: LayeredModel,
        mode: str,
        device: torch.device,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._layers = model.decoder_layers()
        for ask in (linear.can_run, linear.has_amx):  # they ask the compiler and the disk
            torch.compiler.assume_constant_result(ask)
        # one graph serves all layers, and what they hold is not checked at every call
        assert all(_shapes(layer) == _shapes(self._layers[0]) for layer in self._layers)
        self._device = device
        self._run = {"layer": self._run_layers, "step": self._run_step}[mode]
        is_cpu = device.type == "cpu"
        has_kernel = is_cpu and _dtypes(self._layers[0]) == {torch.bfloat16} and linear.can_run()
        has_sums = is_cpu and not has_kernel
        usual = ROWS_OF_SUMS if has_sums else ROWS_OF_KERNELS if has_kernel else USUAL_ROWS
        self._rows: tuple[int, ...] = tuple(usual if rows is None else rows)
        self._compiles_logits = mode == "step" and not has_kernel  # one product is all they are
        backend = compile_few_rows if has_sums else "inductor"
        self._few = {n: _Pieces.make(lambda f: _compiled(f, backend)) for n in self._rows}
        self._many = _Pieces.make(_compiled)

    def __call__(self, x: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states ``[T, E]`` of the packed rows."""
        num_rows = len(positions_T)
        if num_rows == 1 and num_rows not in self._rows:
            return self._model(x, positions_T, attend)
        return self._run(self._few.get(num_rows, self._many), x, positions_T, attend)

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits ``[B, V]``, float32 or wider."""
        if not self._compiles_logits:
            return self._model.logits(hidden_BE)
        num_rows = len(hidden_BE)
        bucket = next((n for n in self._rows if n >= num_rows), None)
        if bucket is None:
            return self._many.logits(self._model, hidden_BE)
        padded_BE = pad(hidden_BE, (0, 0, 0, bucket - num_rows)) if bucket > num_rows else hidden_BE
        return self._few[bucket].logits(self._model, padded_BE)[:num_rows]

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile everything, or read it from disk: no step compiles after that.

        Args:
            progress: called with (buckets done, buckets in all).
        """
        many = self._many
        buckets = [*((n, self._few[n]) for n in self._rows), (MANY_ROWS, None)]
        with _cache_on_disk():
            for done, (num_rows, pieces) in enumerate(buckets):
                if progress is not None:
                    progress(done, len(buckets))
                if pieces is None:
                    self._many = _Pieces(*(_marking(getattr(many, f)) for f in many.__slots__))
                ids_T = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
                hidden_TE = self(ids_T, torch.arange(num_rows, device=self._device), _NoAttention())
                self.logits(hidden_TE)
        self._many = many
        if progress is not None:
            progress(len(buckets), len(buckets))

    def _run_layers(
        self, pieces: _Pieces, x: Tensor, positions_T: Tensor, attend: Attend
    ) -> Tensor:
        hidden_TE, rotary = self._model.enter(x, positions_T)
        for index, layer in enumerate(self._layers):
            out_THD = attend(index, *pieces.project(layer, hidden_TE, rotary))
            hidden_TE = pieces.finish(layer, hidden_TE, out_THD)
        return self._model.leave(hidden_TE)

    def _run_step(self, pieces: _Pieces, x: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        model, layers = self._model, self._layers
        hidden_TE, rotary, projections = pieces.first(model, layers[0], x, positions_T)
        for index, (layer, following) in enumerate(pairwise(layers)):
            out_THD = attend(index, *projections)
            hidden_TE, projections = pieces.between(layer, following, hidden_TE, out_THD, rotary)
        out_THD = attend(len(layers) - 1, *projections)
        return pieces.last(model, layers[-1], hidden_TE, out_THD)


class _NoAttention:
    """Stands in for attention while pieces are compiled: it gives the shape alone."""

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return q_THD.contiguous()

    def feed_forward(self, mlp: Callable[[Tensor], Tensor], x_TE: Tensor) -> Tensor:
        return mlp(x_TE)


def _first(
    model: LayeredModel, layer: Layer, x: Tensor, positions_T: Tensor
) -> tuple[Tensor, Rotary, Projections]:
    hidden_TE, rotary = model.enter(x, positions_T)
    return hidden_TE, rotary, layer.project(hidden_TE, rotary)


def _between(
    layer: Layer, following: Layer, hidden_TE: Tensor, out_THD: Tensor, rotary: Rotary
) -> tuple[Tensor, Projections]:
    hidden_TE = layer.finish(hidden_TE, out_THD, _own_rows)
    return hidden_TE, following.project(hidden_TE, rotary)


def _last(model: LayeredModel, layer: Layer, hidden_TE: Tensor, out_THD: Tensor) -> Tensor:
    return model.leave(layer.finish(hidden_TE, out_THD, _own_rows))


def _project(layer: Layer, hidden_TE: Tensor, rotary: Rotary) -> Projections:
    return layer.project(hidden_TE, rotary)


def _finish(layer: Layer, hidden_TE: Tensor, out_THD: Tensor) -> Tensor:
    return layer.finish(hidden_TE, out_THD, _own_rows)


def _logits(model: LayeredModel, hidden_BE: Tensor) -> Tensor:
    return model.logits(hidden_BE)


def _own_rows(mlp: Callable[[Tensor], Tensor], x_TE: Tensor) -> Tensor:
    """The MLP of a model that shares it with no other group."""
    return mlp(x_TE)


def _compiled(function: Piece, backend: Any = "inductor") -> Piece:
    """The function compiled for the shapes it is first called with.

    With a code object of its own, because graphs are kept and counted per code object.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, code.co_name)
    return torch.compile(
        own,
        fullgraph=True,
        dynamic=False,
        backend=backend,
        options={"guard_filter_fn": _that_may_fail},
    )


def _shapes(layer: Layer) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in layer.named_parameters()]


def _dtypes(layer: Layer) -> set[torch.dtype]:
    return {value.dtype for _, value in layer.named_parameters()}


def _that_may_fail(guards: Sequence[Any]) -> list[bool]:
    """Which of the compiler's checks before each call to keep: rows and the state of torch.

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

    def marked(*arguments: Any) -> Any:
        for argument in arguments:
            for tensor in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(tensor, Tensor):
                    torch._dynamo.mark_dynamic(tensor, 0)
        return piece(*arguments)

    return marked


@contextmanager
def _cache_on_disk() -> Iterator[None]:
    """Have the compiler keep what it makes in the user's cache folder, while this lasts.

    Its usual folder is a temporary one, and the only way to name another is its environment
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
