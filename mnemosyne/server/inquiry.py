"""The internal request that every dialect makes of a body, read in a worker process."""

from __future__ import annotations

from typing import Any

import msgspec

from mnemosyne.request import SamplingParams


class Inquiry(msgspec.Struct, kw_only=True):
    """A request of any dialect; its prompts travel beside it, one after another."""

    model: str  # as the client named it, for the answer
    num_tokens: list[int]  # of each prompt
    params: dict[str, Any]  # fields of SamplingParams that the client gave
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_progress: bool = False
    return_token_ids: bool = False
    logprobs: bool = False  # whether to show those of the output
    echo: bool = False  # whether the answer begins with the prompt
    echo_texts: list[str] = []  # of the prompts, where it does
    is_silent: bool = False  # no token was asked for; one is made and not shown
    ignored: list[str] = []  # unknown fields

    def sampling(self) -> SamplingParams:
        """Sampling parameters for the engine.

        JSON has no whole numbers as keys.
        """
        fields = dict(self.params)
        if "logit_bias" in fields:
            fields["logit_bias"] = {int(k): v for k, v in fields["logit_bias"].items()}
        return SamplingParams(**fields)
