"""Sampling parameters are checked where they are written, before they reach an engine."""

from __future__ import annotations

from array import array
from collections import ChainMap, UserDict, UserList
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne.request import SamplingParams, own_params

NAN, INF = float("nan"), float("inf")


class HostileInt(int):
    """A number that can be neither converted nor shown."""

    def __int__(self) -> int:
        raise KeyError("int")

    def __repr__(self) -> str:
        raise KeyError("repr")


class HostileMapping(UserDict[int, float]):
    def __len__(self) -> int:
        raise KeyError("len")


class Name(str):
    """A text of a class of the client's own."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0; ask for a token"),
        ({"max_tokens": -3}, "max_tokens must be >= 1, got -3"),
        ({"max_tokens": 4.5}, "max_tokens must be a whole number, got 4.5; ask"),
        ({"max_tokens": "8"}, "max_tokens must be a whole number, got '8'"),
        ({"min_tokens": -1}, "min_tokens must be >= 0, got -1"),
        ({"min_tokens": 17}, "min_tokens must lie in [0, max_tokens=16], got 17; lower it"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1; use 0"),
        ({"temperature": NAN}, "temperature must be a finite number >= 0, got nan"),
        ({"temperature": INF}, "temperature must be a finite number >= 0, got inf"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], got 0.0; 1 is off"),
        ({"top_p": 1.1}, "top_p must lie in (0, 1], got 1.1"),
        ({"top_p": NAN}, "top_p must lie in (0, 1], got nan"),
        ({"top_k": -2}, "top_k must be >= 0, got -2; 0 keeps all, and so does -1"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"min_p": 1.5}, "min_p must lie in [0, 1], got 1.5"),
        ({"min_p": NAN}, "min_p must lie in [0, 1], got nan"),
        ({"seed": -1}, "seed must lie in [0, 2**63), got -1"),
        ({"seed": 2**63}, "seed must lie in [0, 2**63), got 9223372036854775808"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must lie in [1e-100, 1e100], got 0.0; 1"),
        ({"repetition_penalty": NAN}, "repetition_penalty must lie in [1e-100, 1e100], got nan"),
        ({"presence_penalty": NAN}, "presence_penalty must lie in [-1e300, 1e300], got nan; 0"),
        ({"frequency_penalty": INF}, "frequency_penalty must lie in [-1e300, 1e300], got inf"),
        ({"logit_bias": {3: NAN}}, "logit_bias[3] must lie in [-1e300, 1e300], got nan; use -100"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must be a whole number, got '3'; encode texts"),
        ({"logit_bias": [3]}, "logit_bias must map token ids to biases, got [3]"),
        ({"logit_bias": {3: "much"}}, "logit_bias[3] must be a number, got 'much'"),
        ({"stop": [""]}, "stop must hold non-empty strings, got ''; drop"),
        ({"stop": [3]}, "stop must hold non-empty strings, got 3"),
        ({"stop": 3}, "stop must be a list of strings, got 3; write"),
        ({"stop_token_ids": ["end"]}, "stop_token_ids must be a whole number, got 'end'; encode"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids, got 3"),
        ({"ignore_eos": "no"}, "ignore_eos must be true or false, got 'no'"),
        ({"n": 0}, "n must lie in [1, 128], got 0; send the prompt again"),
        ({"n": 2.0}, "n must be a whole number, got 2.0"),
        ({"logprobs": -1}, "logprobs must lie in [0, 1000], got -1; use None"),
        ({"logprobs": 1001}, "logprobs must lie in [0, 1000], got 1001"),
        ({"logprobs": True}, "logprobs must be a whole number, got True"),
        ({"priority": 0.5}, "priority must be a whole number, got 0.5"),
        ({"deadline": 0}, "deadline must be a positive time, got 0; write 30ms, 60s or a number"),
        ({"deadline": INF}, "deadline must be a positive time, got inf"),
        ({"deadline": "soon"}, "deadline must be a positive time, got 'soon'"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be a whole number, got 1.5"),
        ({"max_tokens": 2**63}, "max_tokens must be >= 1, got 9223372036854775808"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"max_tokens": HostileInt()}, "max_tokens must be a whole number, got "),
        ({"top_k": 2**70}, "top_k must be >= 0, got 1180591620717411303424"),
        ({"priority": -(2**63) - 1}, "priority must lie in [-2**63, 2**63), got -92233"),
        ({"n": 129}, "n must lie in [1, 128], got 129"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": 10**400}, "temperature must be a finite number >= 0, got 1000"),
        ({"temperature": Decimal("nan")}, "temperature must be a finite number >= 0, got D"),
        ({"presence_penalty": -2e300}, "presence_penalty must lie in [-1e300, 1e300], got -2"),
        ({"logit_bias": {True: 1.0}}, "logit_bias must be a whole number, got True"),
        ({"logit_bias": {2**63: 1.0}}, "logit_bias must hold token ids, got 92233720"),
        ({"logit_bias": {4: 10**301}}, "logit_bias[4] must lie in [-1e300, 1e300], got 1000"),
        ({"logit_bias": dict.fromkeys(range(2**16 + 1), 1.0)}, "logit_bias must hold at most 65,"),
        ({"logit_bias": HostileMapping()}, "logit_bias must map token ids to biases, got "),
        ({"stop": b"end"}, "stop must be a list of strings, got b'end'"),
        ({"stop": ["\udcff"]}, "stop must hold valid Unicode, got '\\udcff'; replace lone"),
        ({"stop": ["a" * 1025]}, "stop must hold strings of at most 1,024 characters, got 'aa"),
        ({"stop": [str(i) for i in range(257)]}, "stop must hold at most 256 strings, got ['0'"),
        ({"stop_token_ids": b"ab"}, "stop_token_ids must be a list of token ids, got b'ab'"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be a whole number, got True"),
        ({"stop_token_ids": range(2**40)}, "stop_token_ids must hold at most 1,024 token ids"),
        ({"stop_token_ids": range(2**70)}, "stop_token_ids must be a list of token ids, got r"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
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


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("max_tokens", np.int8(100), 100),
        ("seed", np.uint64(2**63 - 1), 2**63 - 1),
        ("temperature", Fraction(1, 2), 0.5),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.longdouble(0.5), 0.5),
        ("temperature", Decimal("0.5"), 0.5),
        ("presence_penalty", 1, 1.0),
        ("ignore_eos", np.True_, True),
        ("stop", UserList(["a", "a", Name("b")]), ("a", "b")),
        ("stop_token_ids", range(3), (0, 1, 2)),
        ("stop_token_ids", array("i", [5, 5]), (5,)),
        ("stop_token_ids", np.array([5], dtype=np.uint8), (5,)),
        ("stop_token_ids", {7}, (7,)),
        ("logit_bias", MappingProxyType({4: 1}), {4: 1.0}),
        ("logit_bias", ChainMap({np.int8(4): Fraction(1, 2)}), {4: 0.5}),
        ("deadline", "500ms", 0.5),
        ("deadline", np.float64(0.5), 0.5),
        ("deadline", 1e306, 1e9),
        ("deadline", 1e-300, 1e-9),
    ],
)
def test_values_of_any_library_become_plain_ones(name: str, value: object, plain: object) -> None:
    found = getattr(SamplingParams(**{name: value}), name)

    assert found == plain
    assert type(found) is type(plain)
    items = list(found.items()) if isinstance(found, dict) else [found]
    flat = [part for item in items for part in (item if isinstance(item, tuple) else [item])]
    assert {type(part) for part in flat} <= {int, float, str, bool}


def test_the_spellings_of_off_are_those_of_vllm() -> None:
    names = ["stop", "stop_token_ids", "logit_bias", "min_p", "min_tokens", "n"]
    names += ["presence_penalty", "frequency_penalty"]

    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(max_tokens=None, min_tokens=50).max_tokens is None


def test_a_copy_does_not_change_with_what_the_client_wrote() -> None:
    biases, ends = {4: 1.0}, [5]
    params = SamplingParams(logit_bias=biases, stop_token_ids=ends)
    owned = own_params(params)

    biases[5] = ends[0] = "nonsense"
    params.logit_bias[6] = "nonsense"  # type: ignore[index]

    assert owned.logit_bias == {4: 1.0}
    assert owned.stop_token_ids == (5,)


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_a_field_that_was_changed_is_checked_again(name: str) -> None:
    params = SamplingParams()
    setattr(params, name, object())

    with pytest.raises(ValueError, match=f"^{name} must "):
        own_params(params)


@pytest.mark.parametrize("params", [None, {"max_tokens": 3}, 5])
def test_what_is_no_sampling_params_is_refused(params: object) -> None:
    with pytest.raises(ValueError, match=r"^params must be a SamplingParams, got .*; write"):
        own_params(params)


FLAGS = ("ignore_eos", "skip_special_tokens")  # which None does not turn off: it is refused


@pytest.mark.parametrize(
    "name", [field.name for field in fields(SamplingParams) if field.name not in FLAGS]
)
def test_a_field_that_is_none_is_off_or_means_not_set(name: str) -> None:
    kind = SamplingParams.__dataclass_fields__[name].type

    value = getattr(SamplingParams(**{name: None}), name)

    assert value is not None or "None" in str(kind)


def test_a_value_that_shows_itself_in_lines_is_refused_in_one() -> None:
    with pytest.raises(ValueError, match=r"got tensor\(\[\[1, 1\], \[1, 1\]\]\); use None"):
        SamplingParams(logprobs=torch.ones(2, 2, dtype=torch.int64))
