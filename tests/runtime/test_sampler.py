"""Draws follow the stated distribution, depend on seed and own tokens only, and survive a nan."""

from __future__ import annotations

import itertools
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mnemosyne.request import SamplingParams
from mnemosyne.runtime.sampler import (
    SamplerState,
    first_largest,
    probabilities,
    sample,
    token_logprobs,
)
from mnemosyne.runtime.truncation import NUCLEUS_DEPTH

VOCAB_SIZE = 97
PROMPT = np.array([3, 5, 5, 8], dtype=np.int64)
ENDS = (2, 7)


def make_logits(num_rows: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)


def make_state(seed: int = 0, output: tuple[int, ...] = (), **params: Any) -> SamplerState:
    params = {"max_tokens": 64, "temperature": 1.0} | params
    state = SamplerState(SamplingParams(**params), PROMPT, ENDS, seed)
    for token_id in output:
        state.append(token_id)
    return state


def draw(logits_BV: Tensor, states: list[SamplerState]) -> list[int]:
    return [entry.token_id for entry in sample(logits_BV, states)]


MIXED_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_p": 0.8},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 0.3},
    {"frequency_penalty": 0.5, "logit_bias": {4: 3.0, 11: -100.0}},
    {"min_tokens": 5, "logprobs": 3},
]


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": 1000}, [TopKLogitsWarper(1000)]),
        ({"top_p": 0.55}, [TopPLogitsWarper(0.55)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"min_p": 0.08}, [MinPLogitsWarper(0.08)]),
        ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
        ({"min_tokens": 4}, [MinNewTokensLengthLogitsProcessor(4, 4, list(ENDS))]),
        (
            {
                "repetition_penalty": 1.2,
                "temperature": 1.5,
                "top_k": 30,
                "top_p": 0.8,
                "min_p": 0.05,
            },
            [
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(30),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_distributions_are_those_of_transformers(
    params: dict[str, Any], processors: list[Any]
) -> None:
    logits_BV, output = make_logits(6, seed=1), (8, 9, 60)
    ids = torch.tensor([[*PROMPT.tolist(), *output]]).expand(6, -1)

    probs_BV = probabilities(logits_BV, [make_state(output=output, **params)] * 6)

    scores_BV = LogitsProcessorList(processors)(ids, logits_BV.clone())
    torch.testing.assert_close(probs_BV, scores_BV.softmax(-1), rtol=0, atol=1e-14)
    assert torch.equal(probs_BV > 0, scores_BV > -torch.inf)


def test_penalties_and_bias_move_logits_by_what_they_say() -> None:
    logits_BV = make_logits(1, seed=2)
    state = make_state(
        output=(4, 4, 9),
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={9: 2.0, 20: -1.0},
    )

    probs_BV = probabilities(logits_BV, [state])

    expected_BV = logits_BV.clone()
    expected_BV[0, 4] -= 2 * 0.25 + 0.5
    expected_BV[0, 9] += 2.0 - 0.25 - 0.5
    expected_BV[0, 20] -= 1.0
    torch.testing.assert_close(probs_BV, expected_BV.softmax(-1), rtol=0, atol=1e-14)


def test_tokens_that_come_between_steps_are_counted() -> None:
    logits_BV = make_logits(1, seed=3)
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.7}
    step_by_step = make_state(**params)

    for token_id in (4, 90, 4):
        sample(logits_BV, [step_by_step])
        step_by_step.append(token_id)

    at_once = make_state(output=(4, 90, 4), **params)
    expected_BV = probabilities(logits_BV, [at_once])
    assert torch.equal(probabilities(logits_BV, [step_by_step]), expected_BV)


def test_end_tokens_wait_for_min_tokens_and_ignored_ones_are_not_banned() -> None:
    logits_BV = torch.zeros(1, VOCAB_SIZE)
    params = {"min_tokens": 2, "stop_token_ids": (30, 10_000)}

    early_V = probabilities(logits_BV, [make_state(output=(1,), **params)])[0]
    late_V = probabilities(logits_BV, [make_state(output=(1, 1), **params)])[0]
    ignoring_V = probabilities(logits_BV, [make_state(ignore_eos=True, **params)])[0]

    assert (early_V == 0).nonzero()[:, 0].tolist() == [2, 7, 30]
    assert (late_V > 0).all()
    assert (ignoring_V == 0).nonzero()[:, 0].tolist() == [30]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 4}, [0, 1, 2, 5]),
        ({"top_p": 0.35}, [0, 1]),
        ({"temperature": 0.0, "logit_bias": {3: -1.0}}, [0]),
        ({"min_p": 1.0}, [0, 1, 2]),
    ],
)
def test_of_equal_logits_the_lower_ids_are_kept(params: dict[str, Any], kept: list[int]) -> None:
    logits_BV = torch.tensor([[2.0, 2.0, 2.0, 0.0, 0.0, 1.0]])

    probs_BV = probabilities(logits_BV, [make_state(**params)])

    assert probs_BV[0].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_takes_the_lowest_id_of_the_largest_logits(dtype: torch.dtype) -> None:
    logits_BV = torch.zeros(2, VOCAB_SIZE, dtype=dtype)
    logits_BV[0, [9, 40, 80]] = 1.0

    tokens = draw(logits_BV, [make_state(temperature=0.0)] * 2)

    assert tokens == [9, 0]


def test_wide_nuclei_are_found_beyond_the_first_look() -> None:
    logits_BV = torch.zeros(2, 4 * NUCLEUS_DEPTH)
    logits_BV[1, 0] = 20.0
    states = [make_state(top_p=0.5), make_state(top_p=0.5)]

    probs_BV = probabilities(logits_BV, states)

    assert (probs_BV > 0).sum(-1).tolist() == [2 * NUCLEUS_DEPTH, 1]


def test_draws_follow_the_distribution() -> None:
    num_draws, params = 20_000, {"temperature": 0.9, "top_p": 0.95}
    logits_V = make_logits(1, seed=5, vocab_size=24)[0]
    states = [make_state(seed=seed, **params) for seed in range(num_draws)]

    tokens = draw(logits_V.expand(num_draws, -1), states)

    expected = (num_draws * probabilities(logits_V[None], states[:1])[0]).numpy()
    count = np.bincount(tokens, minlength=24)
    kept = expected > 0
    chi2 = ((count - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert count[~kept].sum() == 0
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations


def test_successive_numbers_of_a_request_are_uniform_and_uncorrelated() -> None:
    state = make_state(seed=11)
    numbers = []

    for _ in range(4000):
        numbers.append(state.uniform())
        state.append(1)

    mean_error = abs(np.mean(numbers) - 0.5) * np.sqrt(12 * 4000)
    correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1] * np.sqrt(4000)
    assert 0 <= min(numbers) < max(numbers) < 1
    assert mean_error < 4
    assert abs(correlation) < 4


def test_the_stream_of_a_seed_is_pinned() -> None:
    state = make_state(seed=2**63 - 1)
    numbers = [state.uniform()]
    state.append(0)
    numbers.append(state.uniform())

    # A change would give users other answers for the same seed.
    assert numbers == [0.9258067163090251, 0.8877243906103941]


def test_company_in_the_batch_changes_nothing() -> None:
    logits_BV = make_logits(len(MIXED_PARAMS), seed=6)
    states = [
        make_state(seed=i, output=(4, 5, 4), **params) for i, params in enumerate(MIXED_PARAMS)
    ]

    together = sample(logits_BV, states)

    alone = [sample(logits_BV[i : i + 1], [state])[0] for i, state in enumerate(states)]
    reversed_rows = sample(logits_BV.flip(0), states[::-1])[::-1]
    assert together == alone == reversed_rows


def test_each_row_of_a_batch_keeps_the_tokens_that_it_keeps_alone() -> None:
    logits_BV = make_logits(6, seed=6)
    states = [make_state(top_k=k, top_p=p) for k in (2, 7, 0) for p in (1.0, 0.9)]

    probs_BV = probabilities(logits_BV, states)

    assert ((probs_BV[:4:2] > 0).sum(-1)).tolist() == [2, 7]
    for row, state in enumerate(states):
        alone_1V = probabilities(logits_BV[row : row + 1], [state])
        assert torch.equal(probs_BV[row : row + 1], alone_1V), row


def test_a_restarted_request_draws_the_same_tokens() -> None:
    logits_TV = make_logits(12, seed=7)
    params = {"temperature": 1.2, "repetition_penalty": 1.1}
    state, tokens = make_state(seed=4, **params), []
    for row_V in logits_TV:
        tokens += draw(row_V[None], [state])
        state.append(tokens[-1])

    restarted = make_state(seed=4, output=tuple(tokens[:7]), **params)

    assert draw(logits_TV[7:8], [restarted]) == tokens[7:8]


def test_seeds_give_different_tokens() -> None:
    logits_BV = torch.zeros(50, VOCAB_SIZE)

    tokens = draw(logits_BV, [make_state(seed=seed) for seed in range(50)])

    assert len(set(tokens)) > 30


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", MIXED_PARAMS, ids=lambda params: "-".join(params))
def test_a_row_that_is_not_finite_fails_alone(wrong: float, params: dict[str, Any]) -> None:
    logits_BV = make_logits(3, seed=8)
    expected = sample(logits_BV, [make_state(**params) for _ in range(3)])
    logits_BV[1, 20] = wrong

    found = sample(logits_BV, [make_state(**params) for _ in range(3)])

    assert found[1].error is not None
    assert "logits must be finite" in found[1].error
    assert (found[0], found[2]) == (expected[0], expected[2])


def test_a_row_of_nan_only_fails_alone() -> None:
    logits_BV = make_logits(2, seed=9)
    logits_BV[0] = torch.nan

    found = sample(logits_BV, [make_state(top_p=0.5, logprobs=2), make_state(logprobs=2)])

    assert found[0].error is not None
    assert found[1].error is None


def test_a_bias_beyond_float32_is_finite() -> None:
    (row,) = sample(make_logits(1, seed=0), [make_state(logit_bias={11: 1e300})])

    assert (row.token_id, row.error) == (11, None)


def test_a_row_without_a_token_left_fails_alone() -> None:
    nothing_left = make_state(min_tokens=1, stop_token_ids=list(range(VOCAB_SIZE)))
    logits_BV = make_logits(3, seed=1)

    first, failed, last = sample(logits_BV, [make_state(1), nothing_left, make_state(2)])

    assert "must leave a token to choose, got none" in failed.error
    assert [first.token_id, last.token_id] == draw(
        logits_BV[[0, 2]], [make_state(1), make_state(2)]
    )


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits_BV = make_logits(1, seed=10)
    state = make_state(temperature=0.1, top_k=3, logit_bias={50: 100.0}, logprobs=4)

    found = sample(logits_BV, [state])[0]

    logprob_V = logits_BV[0].log_softmax(-1)
    best = logprob_V.topk(4)
    assert found.token_id == 50
    assert found.logprobs is not None
    assert found.logprobs.logprob == pytest.approx(logprob_V[50].item(), abs=1e-14)
    assert found.logprobs.rank == 1 + int((logprob_V > logprob_V[50]).sum())
    assert [token_id for token_id, _ in found.logprobs.top] == best.indices.tolist()
    assert [p for _, p in found.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-14)


@pytest.mark.parametrize("k", [0, 1, 3, 6, 100])
def test_rank_is_the_place_in_the_list_of_the_most_likely(k: int) -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0]]).expand(6, -1)

    found = token_logprobs(logits_BV, torch.arange(6), k)

    order = [1, 2, 4, 0, 5, 3]
    assert [entry.rank for entry in found] == [order.index(i) + 1 for i in range(6)]
    assert all([i for i, _ in entry.top] == order[:k] for entry in found)
    listed = [entry for entry in found if entry.rank <= k]
    assert all(entry.top[entry.rank - 1] == (entry.token_id, entry.logprob) for entry in listed)


def test_prompt_logprobs_of_many_rows_are_those_of_each() -> None:
    logits_BV = make_logits(40, seed=12, vocab_size=2**17)
    ids_B = torch.arange(40) * 1000

    found = token_logprobs(logits_BV, ids_B, 2)

    expected_B = logits_BV.log_softmax(-1).gather(-1, ids_B[:, None])[:, 0]
    assert [entry.token_id for entry in found] == ids_B.tolist()
    assert [entry.logprob for entry in found] == pytest.approx(expected_B.tolist(), abs=1e-13)


def test_each_row_reports_as_many_logprobs_as_it_asked_for() -> None:
    logits_BV = make_logits(4, seed=13)
    asked = [None, 0, 2, 5]

    found = sample(logits_BV, [make_state(logprobs=k) for k in asked])

    assert [entry.logprobs and len(entry.logprobs.top) for entry in found] == [None, 0, 2, 5]


def test_values_that_are_not_set_count_as_off() -> None:
    logits_BV = make_logits(1, seed=14)
    state = SamplerState(SamplingParams(max_tokens=2), PROMPT, ENDS, seed=0)

    assert state.is_plain
    assert draw(logits_BV, [state]) == [int(logits_BV.argmax())]


def test_logits_are_not_changed() -> None:
    logits_BV = make_logits(len(MIXED_PARAMS), seed=15)
    before_BV = logits_BV.clone()

    sample(logits_BV, [make_state(output=(1, 2), **params) for params in MIXED_PARAMS])

    assert torch.equal(logits_BV, before_BV)


@pytest.mark.parametrize("size", [1, 128, 256, 1000, 1024])
def test_the_first_of_the_largest_is_that_of_argmax(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(-3, 3, (40, size)).float()  # many equal ones
    x[5:10] = -inf
    x[10:20, torch.randint(size, (10,))] = inf
    x[20:30, torch.randint(size, (10,))] = nan

    assert torch.equal(first_largest(x), x.argmax(-1))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(first_largest(strided), x.argmax(-1))


@pytest.mark.gpu
def test_cuda_draws_what_the_cpu_draws() -> None:
    logits_BV = make_logits(4 * len(MIXED_PARAMS), seed=16, vocab_size=50_000)
    params = list(itertools.chain.from_iterable([MIXED_PARAMS] * 4))

    on_cpu = sample(logits_BV, [make_state(i, (1, 2), **p) for i, p in enumerate(params)])
    on_cuda = sample(logits_BV.cuda(), [make_state(i, (1, 2), **p) for i, p in enumerate(params)])

    assert [entry.token_id for entry in on_cuda] == [entry.token_id for entry in on_cpu]


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1e39},
        {"presence_penalty": -1e300, "frequency_penalty": 1e300, "logit_bias": {4: 1e300}},
        {"repetition_penalty": 1e100, "temperature": 1e-300},
        {"repetition_penalty": 1e-100, "logit_bias": {3: -1e300}},
        {"temperature": 5e-324, "top_k": 2**63 - 1, "top_p": 5e-324, "min_p": 1.0},
        {"temperature": 1.7e308, "min_p": 5e-324},
        {"logprobs": 1000},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_at_their_limits_leave_a_token(
    params: dict[str, Any], dtype: torch.dtype
) -> None:
    states = [make_state(output=(4, 5, 4), **params), make_state(output=(4,), temperature=0.0)]

    drawn, plain = sample(make_logits(2, seed=1).to(dtype), states)

    assert drawn.error is None
    assert plain.error is None


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    logits_BV = make_logits(2, seed=3)
    states = [make_state(logit_bias={4: 1.0}), make_state(logit_bias={VOCAB_SIZE + 5: 1.0})]
    alone = draw(logits_BV[:1], [make_state(logit_bias={4: 1.0})])

    good, bad = sample(logits_BV, states)

    assert [good.token_id] == alone
    assert good.error is None
    assert bad.error is not None
    assert bad.error.startswith("sampling must work with the request's parameters, got IndexError")
