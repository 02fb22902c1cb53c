"""Sampling parameters are checked where they are written, before they reach an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mnemosyne.request import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0; ask for a token"),
        ({"max_tokens": -3}, "max_tokens must be >= 1, got -3"),
        ({"max_tokens": 4.5}, "max_tokens must be int, got 4.5"),
        ({"max_tokens": "8"}, "max_tokens must be int, got '8'"),
        ({"min_tokens": -1}, "min_tokens must lie in [0, max_tokens=16], got -1"),
        ({"min_tokens": 17}, "min_tokens must lie in [0, max_tokens=16], got 17; lower it"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1; use 0"),
        ({"temperature": NAN}, "temperature must be a finite number >= 0, got nan"),
        ({"temperature": INF}, "temperature must be a finite number >= 0, got inf"),
        ({"temperature": "hot"}, "temperature must be float or None, got 'hot'"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], got 0.0; 1 is off"),
        ({"top_p": 1.1}, "top_p must lie in (0, 1], got 1.1"),
        ({"top_p": NAN}, "top_p must lie in (0, 1], got nan"),
        ({"top_k": -1}, "top_k must be >= 0, got -1; 0 keeps all"),
        ({"top_k": 1.5}, "top_k must be int or None, got 1.5"),
        ({"min_p": 1.5}, "min_p must lie in [0, 1], got 1.5"),
        ({"min_p": NAN}, "min_p must lie in [0, 1], got nan"),
        ({"seed": -1}, "seed must lie in [0, 2**63), got -1"),
        ({"seed": 2**63}, "seed must lie in [0, 2**63), got 9223372036854775808"),
        ({"seed": 1.5}, "seed must be int or None, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number > 0, got 0.0"),
        ({"repetition_penalty": NAN}, "repetition_penalty must be a finite number > 0, got nan"),
        ({"presence_penalty": NAN}, "presence_penalty must be finite, got nan"),
        ({"frequency_penalty": INF}, "frequency_penalty must be finite, got inf"),
        ({"logit_bias": {3: NAN}}, "logit_bias[3] must be finite, got nan; use -100 to ban"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must hold token ids, got {'3': 1.0}"),
        ({"logit_bias": [3]}, "logit_bias must be Mapping, got [3]"),
        ({"logit_bias": {3: "much"}}, "logit_bias[3] must be finite, got 'much'"),
        ({"stop": [""]}, "stop must hold non-empty strings, got ['']"),
        ({"stop": [3]}, "stop must hold non-empty strings, got [3]"),
        ({"stop": 3}, "stop must be Sequence, got 3"),
        ({"stop_token_ids": ["end"]}, "stop_token_ids must hold token ids, got ['end']"),
        ({"stop_token_ids": 3}, "stop_token_ids must be Sequence, got 3"),
        ({"ignore_eos": "no"}, "ignore_eos must be bool, got 'no'"),
        ({"n": 0}, "n must be >= 1, got 0; ask for one sample"),
        ({"n": 2.0}, "n must be int, got 2.0"),
        ({"logprobs": -1}, "logprobs must lie in [0, 1000], got -1; use None"),
        ({"logprobs": 1001}, "logprobs must lie in [0, 1000], got 1001"),
        ({"logprobs": True}, "logprobs must be int or None, got True"),
        ({"priority": 0.5}, "priority must be int, got 0.5"),
        ({"deadline": 0}, "deadline must be a positive time, got 0; write 30ms, 60s or a number"),
        ({"deadline": INF}, "deadline must be a positive time, got inf"),
        ({"deadline": "soon"}, "deadline must be a positive time, got 'soon'"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be int or None, got 1.5"),
    ],
)
def test_a_value_outside_its_rule_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="must") as refusal:
        SamplingParams(**fields)

    assert str(refusal.value).startswith(said)
    assert "; " in str(refusal.value)


def test_one_stop_string_counts_as_a_list_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_limits_themselves_are_allowed() -> None:
    params = SamplingParams(
        max_tokens=np.int64(1),
        min_tokens=1,
        temperature=0,
        top_p=1,
        top_k=0,
        min_p=1,
        seed=2**63 - 1,
        logprobs=0,
        prompt_logprobs=1000,
        logit_bias={np.int64(3): -100},
    )

    assert params.max_tokens == 1
