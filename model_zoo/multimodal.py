"""The text half of a file that holds a vision or audio half as well: entries and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mnemosyne.model_zoo.config import NEUTRAL, Config


class Whole(NamedTuple):
    """A multimodal architecture, and the architectures of its text half."""

    model_type: str
    halves: tuple[str, ...]  # architectures, the default first


WHOLES = {
    "Gemma3ForConditionalGeneration": Whole("gemma3", ("Gemma3ForCausalLM",)),
    "Llama4ForConditionalGeneration": Whole("llama4", ("Llama4ForCausalLM",)),
    "Mistral3ForConditionalGeneration": Whole(
        "mistral3", ("MistralForCausalLM", "Ministral3ForCausalLM")
    ),
}
# Entries beside text_config that are about the other half, or about where it joins.
OTHER_HALF = frozenset(
    """
    architectures audio_config audio_token_id audio_token_index boi_token_id boi_token_index
    eoa_token_id eoi_token_id eoi_token_index image_break_token_id image_end_token_id
    image_seq_length image_token_id image_token_index mm_tokens_per_image model_type
    multimodal_projector_bias
    projector_hidden_act spatial_merge_size text_config tie_word_embeddings video_token_id
    vision_config vision_end_token_id vision_feature_layer vision_feature_select_strategy
    vision_start_token_id
    """.split()  # noqa: SIM905  # a name per line would bury the code
)
# Where files keep the text half: as older and as newer releases of transformers name it.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHER_PREFIXES = tuple(
    f"{outer}{part}."
    for outer in ("", "model.")
    for part in ("vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower")
)


def text_entries(entries: Mapping[str, Any], model_types: Mapping[str, str]) -> Mapping[str, Any]:
    """The entries of the text half, as a file of it alone would have them.

    Args:
        entries: of config.json.
        model_types: ``model_type`` of each architecture of text.

    Raises:
        ValueError: if there is no text half, it is of another family, or an entry beside it is
            unknown.
    """
    outer = Config(entries)
    (name,) = entries["architectures"]
    whole, text = WHOLES[name], outer.section("text_config")
    model_type = outer.value("model_type")
    outer.require(
        model_type in (None, whole.model_type),
        "model_type",
        f"be {whole.model_type} for {name}",
        model_type,
    )
    if text is None:
        outer.refuse("text_config", "describe the text half", entries.get("text_config"))
    known = {model_types[half]: half for half in whole.halves}
    kind = text.value("model_type", absent=next(iter(known)))
    text.require(kind in list(known), "model_type", f"be one of {', '.join(known)}", kind)
    outer.refuse_rest(NEUTRAL | OTHER_HALF)
    own = {"architectures": [known[kind]], "model_type": kind}
    shared = {
        entry: entries[entry]
        for entry in ("dtype", "torch_dtype", "tie_word_embeddings")
        if entries.get(entry) is not None
    }
    if {"dtype", "torch_dtype"} & shared.keys():
        own |= {"dtype": None, "torch_dtype": None}
    return {**entries["text_config"], **own, **shared}


def text_name(stored: str) -> str | None:
    """The name of a tensor in a file of the text half alone; None for one of the other half."""
    if stored.startswith(OTHER_PREFIXES):
        return None
    for theirs, ours in TEXT_PREFIXES.items():
        if stored.startswith(theirs):
            return ours + stored.removeprefix(theirs)
    return stored
