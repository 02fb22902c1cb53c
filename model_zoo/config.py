"""Reading config.json so that no entry goes unnoticed: used, known to be neutral, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from mnemosyne.files import is_there, printable, read_object, shown

# Bookkeeping, training, generation defaults (read elsewhere): none of it enters the forward pass.
NEUTRAL = frozenset(
    """
    _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path attention_dropout
    attn_implementation bos_token_id cache_implementation chunk_size_feed_forward cls_token_id
    decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_llama_config label2id
    length_penalty mask_token_id max_length max_new_tokens max_sequence_length min_length min_p
    model_max_length no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id prefix problem_type remove_invalid_values repetition_penalty residual_dropout
    return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id
    task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_cache
    """.split()  # noqa: SIM905  # a name per line would bury the code
)
NOTHING: Mapping[str, Any] = MappingProxyType({})
MAX_SIZE = 2**40  # of any count: positions are the largest, and products of two stay below int64
MAX_NUMBER = 1e30  # products of two stay finite
MIN_NUMBER = 1e-30


class Config:
    """Entries of a config.json that remember which of them were read.

    Every method raises ValueError, naming the entry, for a value that breaks its rule.

    Args:
        entries: by name.
        section: what stands before the names in errors, such as ``"rope_parameters."``.
        absent: what stands in for entries that are not there, where a family has its own defaults.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        section: str = "",
        absent: Mapping[str, Any] = NOTHING,
    ) -> None:
        self._entries = entries
        self._section = section
        self._absent = absent
        self._read: set[str] = set()

    def value(self, name: str, absent: Any = None) -> Any:
        """The raw entry; ``absent`` only if there is none, so that null stays None."""
        self._read.add(name)
        return self._entries.get(name, self._absent.get(name, absent))

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        """A whole number; ``default`` stands in for absent and null, and None makes it required."""
        value = self.value(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(name, f"be a whole number >= {least}", value)
        self.require(value <= most, name, f"be at most {most:,}", value)
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        least: float = MIN_NUMBER,
        most: float = MAX_NUMBER,
    ) -> float:
        """A positive number; ``default`` as for ``integer``."""
        value = self.value(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            self.refuse(name, "be a positive number", value)
        self.require(least <= value <= most, name, f"lie in [{least:g}, {most:g}]", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; ``default`` stands in for absent and null."""
        value = self.value(name)
        value = default if value is None else value
        self.require(isinstance(value, bool), name, "be true or false", value)
        return bool(value)

    def section(self, name: str) -> Config | None:
        """A nested object as a Config of its own; None for absent, null and empty ones."""
        value = self.value(name)
        self.require(value is None or isinstance(value, dict), name, "be an object", value)
        return Config(value, section=f"{self._section}{name}.") if value else None

    def same_entries(self, other: Config) -> bool:
        """Return whether both hold the same names and values."""
        return self._entries == other._entries

    def require(self, holds: bool, name: str, rule: str, value: object, remedy: str = "") -> None:
        """Refuse the entry unless ``holds``."""
        if not holds:
            self.refuse(name, rule, value, remedy)

    def refuse(self, name: str, rule: str, value: object, remedy: str = "") -> NoReturn:
        """Raise ValueError worded *name* must *rule*, got *value*; *remedy*."""
        remedy = remedy or "correct the file or use another model"
        where = f"{self._section}{printable(name)} in config.json"
        raise ValueError(f"{where} must {rule}, got {shown(value)}; {remedy}")

    def refuse_rest(self, neutral: frozenset[str] = frozenset()) -> None:
        """Refuse every entry that nobody read, is not neutral and is not null, false or empty."""
        for name, value in self._entries.items():
            harmless = value is None or value is False or value in ({}, [], "")
            self.require(
                harmless or name in self._read or name in neutral,
                name,
                "be absent or null",
                value,
                "it is not implemented; remove it only if the model computes the same without it",
            )


def read_config(path: Path) -> dict[str, Any]:
    """The entries of ``path/config.json``.

    Raises:
        ValueError: if the path does not exist, is not a checkpoint directory, or the file cannot
            be read as ``files.read_object`` does.
    """
    if not _exists(path):
        raise ValueError(
            f"model must be a path that exists, got {shown(str(path), 400)}; check the spelling"
        )
    file = path / "config.json"
    if not path.is_dir() or not is_there(file):
        raise ValueError(
            f"model must be a Hugging Face checkpoint, a directory with config.json, got "
            f"{shown(str(path), 400)}, which is not a checkpoint; point at the directory of the "
            "model"
        )
    return read_object(file)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that is closed to us
        return False
