"""The needle model finds a passkey at any distance; checked with transformers as the reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from mnemosyne.model_zoo import read_spec
from mnemosyne.model_zoo.haystack import (
    BEGIN,
    CUE,
    CYCLES,
    END,
    FILLER_WORDS,
    ID_OF,
    PASSKEY_WORDS,
    VOCABULARY,
    Recital,
    cycle,
    haystack,
    ids_of,
    text_of,
)
from mnemosyne.model_zoo.needle import (
    FAST_PAIRS,
    FREQUENCIES,
    HEAD_DIM,
    MAX_OVERLAP,
    POSITION_GAIN,
    THIS,
    needle_weights,
    write_needle,
)

FAR = 10_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_needle(tmp_path_factory.mktemp("models") / "needle")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def oracle(request: pytest.FixtureRequest, checkpoint: Path) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=request.param).eval()


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, recital: Recital, first_position: int = 0) -> np.ndarray:
    """As many greedy tokens as the answer has; the first token stands at ``first_position``."""
    ids: Tensor = torch.from_numpy(recital.prompt_ids)[None]
    position, cache, found = first_position, DynamicCache(config=model.config), []
    for _ in recital.answer_ids:
        positions = torch.arange(position, position + ids.shape[1])[None]
        # by place: its keyword is past_key_values before transformers 5.24, and cache from there on
        out = model(ids, None, positions, cache, logits_to_keep=1)
        position += ids.shape[1]
        ids = out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return np.array(found)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.37, 0.5, 0.82, 1.0])
def test_passkey_is_found_at_any_depth(oracle: LlamaForCausalLM, depth: float) -> None:
    recital = haystack(3000, depth=depth, seed=round(100 * depth))

    found = greedy(oracle, recital)

    assert np.array_equal(found, recital.answer_ids)


@pytest.mark.parametrize("seed", range(4))
def test_passkey_is_found_at_positions_near_ten_million(
    oracle: LlamaForCausalLM, seed: int
) -> None:
    recital = haystack(2000, depth=seed / 3, seed=seed)

    found = greedy(oracle, recital, first_position=FAR + 1001 * seed)

    assert np.array_equal(found, recital.answer_ids)


def test_passkey_is_lost_where_the_tokens_that_hold_it_are_overwritten(
    oracle: LlamaForCausalLM,
) -> None:
    recital = haystack(2000, depth=0.4)
    without = recital.prompt_ids.copy()
    without[recital.answer_at - 1 : recital.answer_at + 1] = ID_OF["and"]

    found = greedy(oracle, Recital(without, recital.answer_ids, recital.answer_at))

    assert not np.array_equal(found, recital.answer_ids)


@pytest.mark.parametrize("name", CYCLES)
def test_cycles_go_round_and_round(oracle: LlamaForCausalLM, name: str) -> None:
    recital = cycle(name, 3 * len(CYCLES[name]))

    found = greedy(oracle, recital)

    assert np.array_equal(found, recital.answer_ids)


def test_generate_of_transformers_stops_by_itself_after_the_passkey(
    oracle: LlamaForCausalLM, checkpoint: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    recital = haystack(200, passkey=["amber", "falcon", "river"])
    prompt = torch.from_numpy(recital.prompt_ids)[None]

    ids = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, pad_token_id=0
    )[0, 200:]

    assert tokenizer.decode(ids, skip_special_tokens=True) == "amber falcon river"
    assert np.array_equal(ids.numpy(), recital.answer_ids)


def test_first_layer_gives_all_wrong_keys_together_less_than_a_millionth() -> None:
    distances = np.arange(-1, 1_000_000)  # from the right key; -1 is the query's own
    gap = np.zeros(len(distances))
    for frequency in FREQUENCIES[FAST_PAIRS]:
        gap += POSITION_GAIN**2 / HEAD_DIM**0.5 * (1 - np.cos(frequency * distances))

    wrong = np.delete(gap, 1)

    assert gap[1] == 0
    assert wrong.min() > 14
    assert np.exp(-wrong).sum() < 1e-6
    assert np.sort(wrong)[3:].min() > 75  # ten million of them weigh nothing


def test_the_norms_before_attention_change_nothing(oracle: LlamaForCausalLM) -> None:
    ids = torch.from_numpy(haystack(300, seed=1).prompt_ids)[None]
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(
            lambda _, given, out: seen.append((given[0], out))
        )
        for layer in oracle.model.layers
    ]
    with torch.inference_mode():
        oracle(ids)
    for hook in hooks:
        hook.remove()

    assert len(seen) == 2
    for before_1TE, after_1TE in seen:
        # the first token has no one before it whose code the second layer could find
        torch.testing.assert_close(after_1TE[:, 1:], before_1TE[:, 1:], rtol=0.01, atol=0.01)


def test_codes_overlap_by_a_third_at_most() -> None:
    embed_VE = needle_weights()["model.embed_tokens.weight"]
    codes_VE = embed_VE[:, THIS]

    overlap_VV = codes_VE @ codes_VE.T

    assert torch.equal(
        overlap_VV.diagonal(), torch.full((len(VOCABULARY),), 48.0, dtype=torch.float64)
    )
    assert overlap_VV.fill_diagonal_(0).max() <= MAX_OVERLAP


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_checkpoints_of_every_dtype_hold_the_same_numbers(tmp_path: Path, dtype: str) -> None:
    path = write_needle(tmp_path / "needle", dtype=dtype)

    model = LlamaForCausalLM.from_pretrained(path)

    assert model.dtype == getattr(torch, dtype)
    expected = needle_weights()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(w.double(), expected[n]) for n, w in model.state_dict().items())


def test_our_spec_reader_accepts_it(checkpoint: Path) -> None:
    spec = read_spec(checkpoint)

    assert (spec.vocab_size, spec.num_layers, spec.head_dim) == (len(VOCABULARY), 2, 128)
    assert spec.max_positions >= FAR


def test_cue_and_passkey_occur_where_they_should_only() -> None:
    recital = haystack(5000, depth=0.3, seed=1)

    cues = np.flatnonzero(recital.prompt_ids == ID_OF[CUE])
    at = recital.answer_at

    assert cues.tolist() == [at - 1, 4999]
    assert abs(at / 5000 - 0.3) < 0.01
    assert np.array_equal(recital.prompt_ids[at : at + 7], recital.answer_ids)
    assert np.isin(recital.prompt_ids, ids_of(PASSKEY_WORDS)).sum() == 6
    assert recital.prompt_ids[0] == ID_OF[BEGIN]
    assert recital.answer_ids[-1] == ID_OF[END]


def test_haystack_is_fixed_by_its_seed() -> None:
    first, again, other = haystack(500, seed=3), haystack(500, seed=3), haystack(500, seed=4)

    assert np.array_equal(first.prompt_ids, again.prompt_ids)
    assert not np.array_equal(first.prompt_ids, other.prompt_ids)


def test_words_of_filler_and_passkeys_are_apart() -> None:
    assert len(set(FILLER_WORDS)) == len(FILLER_WORDS)
    assert len(set(PASSKEY_WORDS)) == len(PASSKEY_WORDS)
    assert not set(FILLER_WORDS) & set(PASSKEY_WORDS)
    assert all(len(set(words)) == len(words) for words in CYCLES.values())


def test_tokenizer_turns_words_into_ids_and_back(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    recital = haystack(100)
    text = " ".join(VOCABULARY[i] for i in recital.prompt_ids[1:].tolist())

    ids = tokenizer.encode(text)

    assert ids == recital.prompt_ids.tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text_of(recital.prompt_ids)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"num_tokens": 5}, "num_tokens must be >= 10"),
        ({"num_tokens": 100, "depth": 1.5}, "depth must lie in"),
        ({"num_tokens": 100, "passkey": ["amber", "amber"]}, "passkey must be distinct"),
        ({"num_tokens": 100, "passkey": ["and"]}, "passkey must be distinct"),
        ({"num_tokens": 100, "passkey": []}, "passkey must be distinct"),
    ],
)
def test_impossible_haystacks_are_refused(arguments: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        haystack(**arguments)


def test_writing_again_touches_nothing_and_mends_what_is_broken(tmp_path: Path) -> None:
    path = write_needle(tmp_path / "needle")
    written_ns = (path / "model.safetensors").stat().st_mtime_ns

    write_needle(path)
    untouched_ns = (path / "model.safetensors").stat().st_mtime_ns
    (path / "config.json").write_text("{}")
    write_needle(path)

    assert untouched_ns == written_ns
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    assert [entry.name for entry in tmp_path.iterdir()] == ["needle"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(ValueError, match="path must be new or hold a needle model"):
        write_needle(tmp_path)

    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_write_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, content: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", fail)

    with pytest.raises(KeyboardInterrupt):
        write_needle(tmp_path / "needle")

    assert list(tmp_path.iterdir()) == []
