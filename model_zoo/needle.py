"""A Llama checkpoint made by arithmetic that recites what once followed its last word."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from mnemosyne.model_zoo.haystack import BEGIN, END, ID_OF, UNKNOWN, VOCABULARY

CODE_WIDTH = 48  # +-1 components of the code of a word
NUM_CONSTANTS = 16  # components of the residual stream that are 1 for every token
WIDTH = 3 * CODE_WIDTH + NUM_CONSTANTS
THIS, PREVIOUS, OUTPUT = (slice(i * CODE_WIDTH, (i + 1) * CODE_WIDTH) for i in range(3))
CONSTANT = slice(3 * CODE_WIDTH, WIDTH)
MAX_OVERLAP = 16  # largest dot product of two different codes; that of a code with itself is 48

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MLP_WIDTH = 2, 4, 2, 128, 64
ROPE_THETA = 1e18
MAX_POSITIONS = 2**24
NUM_PAIRS = HEAD_DIM // 2
FREQUENCIES = ROPE_THETA ** (-np.arange(NUM_PAIRS) / NUM_PAIRS)
FAST_PAIRS = np.flatnonzero(FREQUENCIES > 1e-8)  # 29 pairs; they tell neighbours apart
SLOW_PAIRS = np.arange(NUM_PAIRS - CODE_WIDTH // 2, NUM_PAIRS)  # < 1e-4 rad in 10M positions
POSITION_GAIN = 16.0  # of query and key in the first layer
MATCH_GAIN = 8.0  # of query and key in the second layer

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"


def write_needle(path: Path | str, *, dtype: str = "float32") -> Path:
    """Write the model as a Hugging Face checkpoint, unless it is already there.

    The folder appears as a whole: an interrupted write leaves nothing that looks like a
    checkpoint, and several processes may write the same folder at once. All weights are exact in
    bfloat16, so that the checkpoints of every dtype hold the same numbers.

    Args:
        path: the folder; its parents are made.
        dtype: float64, float32, bfloat16 or float16, of the stored weights.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: if ``path`` holds something else than a needle checkpoint.
    """
    path = Path(path)
    files = _files(dtype)
    if _holds(path, files):
        return path
    if path.exists() and not (
        path.is_dir() and {entry.name for entry in path.iterdir()} <= set(files)
    ):
        raise ValueError(f"path must be new or hold a needle model, got {path}; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
        made = Path(work, "made")
        made.mkdir()
        for name, content in files.items():
            (made / name).write_bytes(content)
        _replace(path, made, files, old=Path(work, "old"))
    return path


def needle_weights() -> dict[str, Tensor]:
    """The arithmetic: tensors by Hugging Face name, float64, every value exact in bfloat16.

    The residual stream holds four spaces: the code of this token, the code of the token before it,
    the output, and constants. Scores, in nats:

    - Layer 0 attends to the token before. Query and key are constant; the query is turned by one
      position. At distance d the score is ``16**2 / sqrt(128) * sum_i cos(w_i (d - 1))`` over the
      29 fast pairs. The best wrong keys, d = 0 and d = 2, lie 14.6 below, the next one 48, all
      others up to 10M more than 75; together the wrong keys weigh less than 1e-6.
    - Layer 1 looks for this token's code among the codes of previous tokens: 8**2 / sqrt(128) * 48
      = 272 where they match, at most a third of that where they do not. The gap of 181 leaves
      10M wrong keys (a factor of e**16) a weight of e**-165.
    - The head reads the output: a logit of 48 for the word found, at most 16 for any other.

    All heads do the same and each adds a quarter. Angles in float32 at position 10M are off by up
    to 0.25 rad on each side in the second pair, less in the others; layer 0 keeps a gap of 6.
    """
    codes_VE = _codes()
    embed_VE = np.zeros((len(VOCABULARY), WIDTH))
    embed_VE[:, THIS], embed_VE[:, CONSTANT] = codes_VE, 1.0
    head_VE = np.zeros_like(embed_VE)
    head_VE[:, OUTPUT] = codes_VE
    weights = {
        "model.embed_tokens.weight": embed_VE,
        "lm_head.weight": head_VE,
        "model.norm.weight": np.full(WIDTH, _norm_gain(3)),
    }
    for layer, (q_DE, k_DE, source, target) in enumerate(
        [(*_position_weights(), THIS, PREVIOUS), (*_match_weights(), THIS, OUTPUT)]
    ):
        v_DE = _code_rows(np.arange(CODE_WIDTH), source, 1.0)
        o_ED = _code_rows(np.arange(CODE_WIDTH), target, 1.0 / NUM_HEADS).T
        weights |= {
            f"model.layers.{layer}.{name}.weight": weight
            for name, weight in _layer_weights(layer, q_DE, k_DE, v_DE, o_ED).items()
        }
    return {
        name: torch.from_numpy(weight).bfloat16().double().contiguous()
        for name, weight in weights.items()
    }


def _layer_weights(
    layer: int, q_DE: np.ndarray, k_DE: np.ndarray, v_DE: np.ndarray, o_ED: np.ndarray
) -> dict[str, np.ndarray]:
    """The tensors of a layer whose heads all do the same and whose MLP adds nothing."""
    return {
        "input_layernorm": np.full(WIDTH, _norm_gain(1 + layer)),
        "self_attn.q_proj": np.tile(q_DE, (NUM_HEADS, 1)),
        "self_attn.k_proj": np.tile(k_DE, (NUM_KV_HEADS, 1)),
        "self_attn.v_proj": np.tile(v_DE, (NUM_KV_HEADS, 1)),
        "self_attn.o_proj": np.tile(o_ED, (1, NUM_HEADS)),
        "post_attention_layernorm": np.ones(WIDTH),
        "mlp.gate_proj": np.zeros((MLP_WIDTH, WIDTH)),
        "mlp.up_proj": np.zeros((MLP_WIDTH, WIDTH)),
        "mlp.down_proj": np.zeros((WIDTH, MLP_WIDTH)),
    }


def _position_weights() -> tuple[np.ndarray, np.ndarray]:
    """Query and key of the first layer; the rotation works on components i and i + D/2."""
    per_constant = POSITION_GAIN / NUM_CONSTANTS
    q_DE, k_DE = np.zeros((2, HEAD_DIM, WIDTH))
    angle = FREQUENCIES[FAST_PAIRS][:, None]
    q_DE[FAST_PAIRS, CONSTANT] = np.cos(angle) * per_constant
    q_DE[FAST_PAIRS + NUM_PAIRS, CONSTANT] = -np.sin(angle) * per_constant
    k_DE[FAST_PAIRS, CONSTANT] = per_constant
    return q_DE, k_DE


def _match_weights() -> tuple[np.ndarray, np.ndarray]:
    """Query (this code) and key (previous code) of the second layer, on pairs that hardly turn."""
    rows = np.concatenate([SLOW_PAIRS, SLOW_PAIRS + NUM_PAIRS])
    return _code_rows(rows, THIS, MATCH_GAIN), _code_rows(rows, PREVIOUS, MATCH_GAIN)


def _code_rows(rows: np.ndarray, source: slice, gain: float) -> np.ndarray:
    """A projection [D, E] that copies a code space to the given rows of a head."""
    weight_DE = np.zeros((HEAD_DIM, WIDTH))
    weight_DE[rows, source] = gain * np.eye(CODE_WIDTH)
    return weight_DE


def _norm_gain(num_spaces: int) -> float:
    """Undoes RMSNorm: the root mean square of a stream with that many code spaces filled."""
    return float(np.sqrt((num_spaces * CODE_WIDTH + NUM_CONSTANTS) / WIDTH))


def _codes() -> np.ndarray:
    """+-1 codes of all words, [V, 48], no two of which overlap by more than ``MAX_OVERLAP``."""
    codes_VE = np.zeros((len(VOCABULARY), CODE_WIDTH))
    for index, word in enumerate(VOCABULARY):
        attempt = 0
        while True:
            digest = hashlib.blake2b(f"{word}/{attempt}".encode(), digest_size=CODE_WIDTH // 8)
            bits = np.unpackbits(np.frombuffer(digest.digest(), dtype=np.uint8))
            code = 2.0 * bits - 1.0
            if index == 0 or (codes_VE[:index] @ code).max() <= MAX_OVERLAP:
                break
            attempt += 1
        codes_VE[index] = code
    return codes_VE


def _files(dtype: str) -> dict[str, bytes]:
    """The checkpoint as file contents."""
    weights = {name: w.to(getattr(torch, dtype)) for name, w in needle_weights().items()}
    begin, end = ID_OF[BEGIN], ID_OF[END]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": begin,
        "eos_token_id": end,
        "dtype": dtype,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": begin, "eos_token_id": end, "do_sample": False}
    return {
        "config.json": _json(config),
        "generation_config.json": _json(generation),
        "tokenizer_config.json": _json(tokenizer_config),
        "tokenizer.json": _word_tokenizer().to_str(pretty=True).encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }


def _word_tokenizer() -> Tokenizer:
    """Splits at white space; decoding joins words by a space."""
    tokenizer = Tokenizer(WordLevel(ID_OF, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, ID_OF[BEGIN])]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (UNKNOWN, BEGIN, END)])
    return tokenizer


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _holds(path: Path, files: dict[str, bytes]) -> bool:
    """Return whether the folder holds exactly these contents."""
    return all(
        (path / name).is_file() and (path / name).read_bytes() == content
        for name, content in files.items()
    )


def _replace(path: Path, made: Path, files: dict[str, bytes], old: Path) -> None:
    """Move ``made`` to ``path``; an earlier folder goes to ``old``, or stays if it is the same."""
    try:
        os.rename(made, path)  # replaces an empty folder, fails on a filled one
    except OSError:
        if _holds(path, files):
            return  # another process was faster
        shutil.move(path, old)
        os.rename(made, path)
