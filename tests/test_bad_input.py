"""Mistakes of users: one clear sentence each, with name, rule, value and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne import cli
from mnemosyne.llm import LLM
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import SamplingParams
from tests.engines import greedy, open_tiny, random_prompts
from tests.model_zoo.tiny import MAX_POSITIONS, VOCAB_SIZE, tiny_checkpoint

CACHE_TOKENS = 512
PROMPTS = random_prompts((20, 5))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return tiny_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tiny_checkpoint(tmp_path_factory.mktemp("bad") / "tiny")
    with open_tiny(path, max_tokens=CACHE_TOKENS) as llm:
        yield llm


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_needle(tmp_path_factory.mktemp("bad") / "needle")


def refusal(model: Path | str, **options: Any) -> str:
    """Open a model, and take the sentence that refuses it."""
    with pytest.raises(ValueError, match="must") as caught:
        LLM(str(model), **{"schedule": {"chunk": 8}, "cache": {"max_tokens": 256}, **options})
    return one_sentence(str(caught.value))


def one_sentence(said: str) -> str:
    assert "\n" not in said
    assert " must " in said
    assert ", got " in said
    assert "; " in said.partition(", got ")[2], "it names no remedy"
    return said


def edit(path: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def nowhere(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (nowhere, ["model must be a path that exists", "model'", "check the spelling"]),
        (empty, ["model must be a Hugging Face checkpoint", "directory with config.json"]),
        (
            lambda path: edit(path, architectures=["MambaForCausalLM"]),
            ["architectures in config.json must be one of Gemma3, ", "Llama, ", "MambaForCausalLM"],
        ),
        (
            lambda path: edit(path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
            ["rope_type in config.json must be default, linear, llama3 or yarn", "'dynamic'"],
        ),
        (
            lambda path: edit(path, partial_rotary_factor=0.5),
            ["partial_rotary_factor in config.json must be 1, got 0.5"],
        ),
        (
            lambda path: edit(path, logit_softcapping=30.0),
            ["logit_softcapping in config.json must be absent or null, got 30.0"],
        ),
        (
            lambda path: edit(path, num_hidden_layers=3),
            ["tensors of", "model.layers.2.mlp.up_proj.weight", "missing"],
        ),
        (
            lambda path: edit(path, intermediate_size=40),
            ["tensors of", "misshapen", "[48, 32] instead of [40, 32]"],
        ),
        (truncate, ["weights file must be whole and safetensors", "model.safetensors", "downlo"]),
        (
            lambda path: (path / "model.safetensors").unlink(),
            ["model must hold model.safetensors", "save the weights as safetensors"],
        ),
        (
            lambda path: (path / "config.json").write_text("{"),
            ["config.json must be valid JSON", "download"],
        ),
        (
            lambda path: (path / "tokenizer.json").write_text("{}"),
            ["tokenizer.json must be a tokenizer of the tokenizers library"],
        ),
        (
            lambda path: (path / "generation_config.json").write_text('{"top_p": 7}'),
            ["top_p in", "must be a number in [0, 1], got 7", "correct the file"],
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    checkpoint: Path, spoil: Callable[[Path], object], parts: list[str]
) -> None:
    spoil(checkpoint)

    said = refusal(checkpoint)

    for part in parts:
        assert part in said


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    assert "which is not a checkpoint" in refusal(checkpoint / "model.safetensors")


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "a\0b", "\x1b[2J\n"])
def test_a_name_that_no_path_has_is_a_path_that_does_not_exist(name: str) -> None:
    said = refusal(name)

    assert "model must be a path that exists" in said
    assert said.isprintable()
    assert len(said) < 1000


def test_a_home_that_does_not_exist_is_a_path_that_does_not_exist() -> None:
    assert "model must be a path that exists" in refusal("~nobody-has-this-name/model")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"dtype": "int8"}, ["dtype must be one of auto, float64", "'int8'"]),
        ({"device": "abacus"}, ["device must be auto, cpu, cuda or cuda:INDEX, got 'abacus'"]),
        (
            {"device": "mps"},
            ["device must be auto, cpu, cuda or cuda:INDEX, got 'mps'", "use auto"],
        ),
        ({"device": "cuda:99"}, ["device must be there, got 'cuda:99'", "GPUs"]),
        ({"attention": "magic"}, ["attention must be one of auto, ", "'magic'"]),
        (
            {"mesh": {"pp": 2, "tp": 2}},
            ["must equal the number of processes", "2 x 1 x 2 = 4"],
        ),
        (
            {"cache": {"max_tokens": 0}},
            ["cache.max_tokens=0 must hold at least one page of 128 tokens", "lower cache.page_s"],
        ),
        (
            {"cache": {"memory_share": 1e-9}},
            ["cache.memory_share=1e-09 must hold at least one page of 128 tokens", "raise it"],
        ),
        (
            {"cache": {"max_tokens": "1000G"}},
            ["cache.max_tokens=1073741824000 must fit the memory of cpu", "GiB; lower it"],
        ),
        ({"schedule": {"policy": "lifo"}}, ["schedule.policy must be one of fcfs, edf, lrs, lars"]),
        ({"metrics": {"path": "/no/such/dir/x"}}, ["metrics.path must be a file that can be wri"]),
    ],
)
def test_an_option_that_cannot_be_met_is_refused(
    checkpoint: Path, options: dict[str, Any], parts: list[str]
) -> None:
    said = refusal(checkpoint, **options)

    for part in parts:
        assert part in said


def test_options_are_refused_before_weights_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyne.joining.checkpoint.load_weights", None)

    assert "must fit the memory of cpu" in refusal(checkpoint, cache={"max_tokens": "1000G"})
    assert "number of processes" in refusal(checkpoint, mesh={"tp": 2})
    assert "absent or null" in (edit(checkpoint, alibi=True) or refusal(checkpoint))


def test_the_cache_must_fit_beside_the_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = (checkpoint / "model.safetensors").stat().st_size
    token_bytes = 2 * 2 * 2 * 8 * 8  # k and v, layers, heads, dim, float64
    monkeypatch.setattr(
        "mnemosyne.cache.capacity.free_memory", lambda device: num_bytes + 300 * token_bytes
    )

    assert "must fit the memory of cpu" in refusal(checkpoint, cache={"max_tokens": 400})
    with LLM(str(checkpoint), schedule={"chunk": 8}, cache={"max_tokens": 256}) as llm:
        assert llm.generate(PROMPTS[1], greedy(2))[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], greedy(2), "prompt must hold at least one token, got none; write something"),
        (np.empty(0, dtype=np.int64), greedy(2), "prompt must hold at least one token, got none"),
        (
            [3, VOCAB_SIZE],
            greedy(2),
            f"prompt ids must lie in [0, {VOCAB_SIZE}), got 96 at index 1",
        ),
        ([-1, 3], greedy(2), f"prompt ids must lie in [0, {VOCAB_SIZE}), got -1 at index 0"),
        ([2**40], greedy(2), f"prompt ids must lie in [0, {VOCAB_SIZE}), got 1099511627776"),
        (
            [0.5, 1.5],
            greedy(2),
            "prompt must be text or a flat list of integer ids, got [0.5, 1.5]",
        ),
        (
            [[1], [2, 3]],
            greedy(2),
            "prompt must be text or a flat list of integer ids, got [[1], [2, 3]]",
        ),
        (
            [True, False],
            greedy(2),
            "prompt must be text or a flat list of integer ids, got [True, False]",
        ),
        (None, greedy(2), "prompt must be text or a flat list of integer ids, got None"),
        (b"text", greedy(2), "prompt must be text or a flat list of integer ids, got b'text'"),
        ("some text", greedy(2), "which has no tokenizer.json, got text 'some text'; add the file"),
        (
            [1] * 1020,
            greedy(5),
            f"must fit the model's {MAX_POSITIONS} positions, got 1020 + 5 = 1025; shorten one",
        ),
        (
            [1] * 500,
            greedy(13),
            f"must fit the cache of {CACHE_TOKENS} tokens, got 500 + 13 = 513; shorten one of them",
        ),
        ([1], greedy(2, stop="x"), "stop must be empty for"),
        ([1], greedy(2, logit_bias={96: 1.0}), "logit_bias must hold ids in [0, 96), got 96; drop"),
        ([1], greedy(2, logit_bias={-1: 1.0}), "logit_bias must hold ids in [0, 96), got -1; drop"),
        (
            [1],
            greedy(2, stop_token_ids=[96]),
            "stop_token_ids must hold ids in [0, 96), got 96; drop",
        ),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_and_spares_the_others(
    llm: LLM, prompt: Any, params: SamplingParams, said: str
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(4))]

    first, refused, last = llm.generate(
        [PROMPTS[0], prompt, PROMPTS[1]], [greedy(4), params, greedy(4)]
    )

    assert refused.finish_reason == "error"
    assert refused.request_id is None
    assert refused.token_ids == []
    assert said in one_sentence(refused.error)
    assert [first.token_ids, last.token_ids] == expected
    assert [first.error, last.error] == [None, None]


def test_a_request_that_may_sample_nothing_ends_with_an_error(llm: LLM) -> None:
    everything = list(range(VOCAB_SIZE))
    params = greedy(4, min_tokens=4, stop_token_ids=everything)

    banned, other = llm.generate(PROMPTS, [params, greedy(4)])

    assert banned.finish_reason == "error"
    assert "sampling must leave a token to choose, got none" in one_sentence(banned.error)
    assert other.finish_reason == "length"


def test_the_largest_request_that_fits_is_served(llm: LLM) -> None:
    (output,) = llm.generate(np.ones(500, dtype=np.int64), greedy(12))

    assert len(output.token_ids) == 12


def test_without_a_tokenizer_ids_still_work(checkpoint: Path) -> None:
    assert not (checkpoint / "tokenizer.json").exists()

    with open_tiny(checkpoint) as llm:
        text, ids = llm.generate(["words", PROMPTS[0]], greedy(4))
        assert llm.tokenizer is None

    assert "prompt must be token ids for" in one_sentence(text.error)
    assert len(ids.token_ids) == 4
    assert ids.text == ""


def test_an_empty_text_is_no_prompt(needle: Path) -> None:
    with LLM(str(needle), schedule={"chunk": 8}, cache={"max_tokens": 256}) as llm:
        empty_text, text = llm.generate(["", "monday tuesday"], greedy(2))

    assert "prompt must hold at least one token" in one_sentence(empty_text.error)
    assert text.finish_reason is not None
    assert text.error is None


def test_half_a_surrogate_pair_is_no_prompt(needle: Path) -> None:
    with LLM(str(needle), schedule={"chunk": 8}, cache={"max_tokens": 256}) as llm:
        (output,) = llm.generate("\ud800", greedy(2))

    assert "prompt must be valid Unicode" in one_sentence(output.error)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_dtype_that_is_named_runs(checkpoint: Path, dtype: str) -> None:
    with LLM(str(checkpoint), dtype=dtype, schedule={"chunk": 8}, cache={"max_tokens": 256}) as llm:
        (output,) = llm.generate(PROMPTS[0], greedy(3))

    assert output.error is None
    assert len(output.token_ids) == 3


def test_a_cache_of_one_page_serves_what_fits(checkpoint: Path) -> None:
    for chunk in (8, "adaptive"):
        with open_tiny(checkpoint, chunk=chunk, max_tokens=1) as llm:
            fits, refused = llm.generate([[1, 2, 3], [1] * 20], greedy(4))
        assert len(fits.token_ids) == 4
        assert "must fit the cache of 16 tokens, got 20 + 4 = 24" in refused.error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=/no/such/model"], "model must be a path that exists, got '/no/such/model'"),
        (["model={empty}"], "model must be a Hugging Face checkpoint"),
        (["model={truncated}"], "weights file must be whole and safetensors"),
        (["model={text}"], "prompt must be token ids for"),
        (["model={text}", "cache.max_tokens=1000G"], "must fit the memory of cpu"),
        (["model={text}", "dtype=int8"], "dtype must be one of"),
    ],
)
def test_the_command_line_says_it_in_one_line_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    truncate(tiny_checkpoint(tmp_path / "truncated"))
    tiny_checkpoint(tmp_path / "text")
    paths = {name: tmp_path / name for name in ("empty", "truncated", "text")}
    capsys.readouterr()

    status = cli.main(
        ["generate", "prompt=hello", "schedule=fixed", "cache.max_tokens=512", "device=cpu"]
        + [word.format(**paths) for word in words]
    )

    errors = capsys.readouterr().err
    assert status == cli.FAILED
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in one_sentence(lines[0])
    assert "Traceback" not in errors


def test_names_of_gpus_are_refused_where_there_are_none(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    assert "device must be there, got 'cuda'" in refusal(checkpoint, device="cuda")
