"""Sampling fields of a body to those of ``SamplingParams``; all dialects of OpenAI share them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mnemosyne.plain import refusal
from mnemosyne.request import SamplingParams
from mnemosyne.server.fields import Fields

# taken as they are: SamplingParams knows their rules
SAME = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "stop", "stop_token_ids", "ignore_eos"),
    *("skip_special_tokens", "n", "priority", "deadline", "prompt_logprobs", "cache_salt"),
)
# known, and of no effect on the answer here
INERT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "request_id", "parallel_tool_calls"),
    *("include_reasoning", "timings_per_token", "cache_prompt", "spaces_between_special_tokens"),
)


@dataclass(frozen=True, slots=True)
class Off:
    """The values allowed in a field that would change the answer and is not built."""

    values: tuple[Any, ...]
    remedy: str


LATER = "this server has none of it yet"
REFUSED: Mapping[str, Off] = {
    "best_of": Off((1,), "ask for n samples instead"),
    "suffix": Off(("",), LATER),
    "functions": Off(([],), LATER),
    "function_call": Off(("none", "auto"), LATER),
    "guided_json": Off((), LATER),
    "guided_regex": Off((), LATER),
    "guided_choice": Off((), LATER),
    "guided_grammar": Off((), LATER),
    "structured_outputs": Off(({},), LATER),
    "grammar": Off(("",), LATER),
    "json_schema": Off(({},), LATER),
    "audio": Off((), "this server writes text"),
    "modalities": Off((["text"], []), "this server writes text"),
    "prediction": Off((), LATER),
    "web_search_options": Off((), "this server looks nothing up"),
    "use_beam_search": Off((False,), "sample instead"),
    "length_penalty": Off((1, 1.0), "it belongs to beam search"),
    "early_stopping": Off((False,), "it belongs to beam search"),
    "logits_processors": Off(([],), "use logit_bias"),
    "bad_words": Off(([],), "use logit_bias"),
    "allowed_token_ids": Off(([],), "use logit_bias"),
    "truncate_prompt_tokens": Off((-1,), "shorten the prompt yourself"),
    "include_stop_str_in_output": Off((False,), "read stop_reason"),
    "chat_template": Off((), "the model's own is used; use chat_template_kwargs"),
    "documents": Off(([],), "put them into a message"),
    "continue_final_message": Off((False,), "send a plain prompt to /v1/completions"),
    "typical_p": Off((1, 1.0), "use top_p or min_p"),
    "mirostat": Off((0,), "use top_p or min_p"),
    "dry_multiplier": Off((0, 0.0), "use frequency_penalty"),
    "xtc_probability": Off((0, 0.0), "use min_p"),
}


def read_sampling(fields: Fields) -> dict[str, Any]:
    """Read the fields of ``SamplingParams`` that a body gives.

    Raises:
        ValueError: for a field that would change the answer and is not built.
    """
    for name, off in REFUSED.items():
        value = fields.get(name)
        if value is not None and value not in off.values:
            raise refusal(name, "be left out", value, off.remedy)
    kind = fields.mapping("response_format").get("type", "text")
    if kind != "text":
        raise refusal("response_format.type", "be text", kind, LATER)
    fields.know(*INERT)
    given = {name: fields.get(name) for name in SAME}
    biases = fields.mapping("logit_bias")
    for key in biases:
        if not re.fullmatch(r"\d{1,18}", key):
            raise refusal("logit_bias", "map token ids to biases", key, "write ids in digits")
    return {
        **{name: value for name, value in given.items() if value is not None},
        **({"logit_bias": biases} if biases else {}),
    }


def read_max_tokens(fields: Fields, *names: str, default: int | None) -> int | None:
    """The limit on the output under the first of these names that a body gives.

    Returns:
        None where it gives none and there is no default: as many as fit.
    """
    given = [fields.whole(name, low=0, high=2**53) for name in names]
    return next((value for value in given if value is not None), default)


def checked(given: dict[str, Any]) -> SamplingParams:
    """The parameters, once they follow their rules.

    Raises:
        ValueError: naming the first that does not.
    """
    biases = {int(k): v for k, v in given.get("logit_bias", {}).items()}
    return SamplingParams(**{**given, "logit_bias": biases})
