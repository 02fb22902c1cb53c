"""transformers with every cast to float32 made one to float64: an oracle without its roundings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXACT = 1e-10  # relative to the largest logit: all that reordered float64 can make of it


class Wide(TorchFunctionMode):
    """Where it is active, torch makes float64 of what asks for float32."""

    def __enter__(self) -> Self:
        self._usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # quotients of whole numbers take it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._usual)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.float:
            return args[0].double()
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return function(*(_widened(value) for value in args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def wide_oracle(path: Path) -> transformers.PreTrainedModel:
    """A checkpoint in transformers, attention and experts written out; run it in ``Wide()``."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    with Wide():
        model = getattr(transformers, architecture).from_pretrained(
            path,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    # the whole of Llama 4 asks its text half for what only a picture gives
    half = model.language_model if architecture == "Llama4ForConditionalGeneration" else model
    return half.eval()


@torch.inference_mode()
def wide_logits(path: Path, token_ids: list[int]) -> Tensor:
    """Logits [T, V] of every position of one prompt, whichever half of a file holds the text."""
    model = wide_oracle(path)
    with Wide():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
