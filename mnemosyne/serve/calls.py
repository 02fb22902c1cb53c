"""The prompts of one call: listed, read and added, each accepted or refused alone."""

from __future__ import annotations

from collections.abc import Sequence

from mnemosyne.plain import plain_list
from mnemosyne.request import RequestOutput, SamplingParams
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.intake import Intake, refused_output
from mnemosyne.serve.prompts import MAX_PROMPTS, Prompt, PromptIds, list_prompts

Asked = tuple[PromptIds | RequestOutput, SamplingParams]


def read_call(
    intake: Intake,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[Asked]:
    """The request of a call, prompts as ids; no engine is needed for it.

    Args:
        intake: reads the prompts.
        prompts: one or several.
        params: one for all, or one per prompt.

    Returns:
        Per prompt its ids, or the output of one that was refused, and its parameters.

    Raises:
        ValueError: if the prompts cannot be listed, or there are not as many params.
    """
    listed = list_prompts(prompts)
    if params is None or isinstance(params, SamplingParams):
        each = [params or SamplingParams()] * len(listed)
    else:
        each = plain_list("params", params, limit=MAX_PROMPTS, of="SamplingParams")
    if len(each) != len(listed):
        raise ValueError(
            f"params must be one SamplingParams or one per prompt, got {len(each)} for "
            f"{len(listed)} prompts; pass a single one to share it"
        )
    return [(_read(intake, prompt), own) for prompt, own in zip(listed, each, strict=True)]


def add_call(engine: Engine, asked: list[Asked]) -> list[RequestOutput]:
    """Queue the result of ``read_call``; one output per prompt, which fill as the engine steps."""
    return [_add(engine, prompt, params) for prompt, params in asked]


def _read(intake: Intake, prompt: Prompt) -> PromptIds | RequestOutput:
    try:
        return intake.read(prompt)
    except ValueError as error:
        return refused_output(prompt, str(error))


def _add(
    engine: Engine, prompt: PromptIds | RequestOutput, params: SamplingParams
) -> RequestOutput:
    if isinstance(prompt, RequestOutput):
        return prompt
    try:
        samples = engine.add(prompt, params)
    except ValueError as error:
        return refused_output(prompt, str(error))
    if len(samples) > 1:
        samples[0].samples = samples
    return samples[0]
