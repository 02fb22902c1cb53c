"""Logits to tokens. A request draws by its seed and its own tokens, never by its company."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor

from mnemosyne.request import Logprobs, Sampled, SamplingParams
from mnemosyne.runtime.truncation import largest, truncation_mask

log = logging.getLogger(__name__)

GROUP_SIZE = 128  # columns whose largest value is found first
BLOCK_ELEMENTS = 2**20  # logits in a block of rows that are sampled together, which bounds memory
NOT_FINITE = "logits must be finite, got nan or inf; check the weights or use a wider dtype"
CANNOT_SAMPLE = "sampling must work with the request's parameters, got"
NOTHING_LEFT = (
    "sampling must leave a token to choose, got none; relax stop_token_ids under min_tokens, "
    "logit_bias or penalties"
)


class SamplerState:
    """The state of one request that sampling needs.

    Args:
        params: sampling values that are None count as off, and the temperature as 0.
        prompt_ids: int64.
        end_token_ids: the model's own end tokens.
        seed: in [0, 2**63).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: np.ndarray,
        end_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self.temperature = params.temperature or 0.0
        # The most likely token, the lowest id of several, which is the one that top_k=1 keeps.
        self.top_k = (params.top_k or 0) if self.temperature else 1
        self.top_p = params.top_p or 1.0
        self.min_p = params.min_p
        self.logprobs = params.logprobs
        self.seed = seed
        self.num_output = 0
        self._repetition = params.repetition_penalty or 1.0
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._bias = dict(params.logit_bias)
        self._bias_ids: Tensor | None = None  # made once, on the device of the logits
        self._bias_values: Tensor | None = None
        ends = () if params.ignore_eos else tuple(end_token_ids)
        self._banned = sorted({*ends, *params.stop_token_ids})
        self._min_tokens = params.min_tokens
        self._counts_output = bool(self._presence or self._frequency)
        penalised = self._repetition != 1 or self._counts_output
        self._always_adjusts = penalised or bool(self._bias)
        self._may_adjust = self._always_adjusts or bool(self._min_tokens and self._banned)
        self.error: str | None = None  # why its rows cannot be sampled, if they cannot
        self._unseen: list[np.ndarray] = [prompt_ids] if self._repetition != 1 else []
        self._uncounted: list[int] = []
        self._seen_V: Tensor | None = None
        self._count_V: Tensor | None = None

    @property
    def adjusts(self) -> bool:
        """Return whether the next token is chosen from other logits than the model's."""
        return self._always_adjusts or self._bans_end

    @property
    def is_plain(self) -> bool:
        """Return whether the next token is simply the argmax of the model's logits."""
        return not self.temperature and not (self._may_adjust and self.adjusts)

    def append(self, token_id: int) -> None:
        """Enter an output token."""
        self.num_output += 1
        if self._repetition != 1:
            self._unseen.append(np.array([token_id]))
        if self._counts_output:
            self._uncounted.append(token_id)

    def adjust(self, logits_V: Tensor) -> None:
        """Apply penalties, then the bias, then the ban on end tokens, to float64 logits in place.

        Repetition divides positive logits of tokens of prompt and output and multiplies negative
        ones (Keskar et al. 2019, arXiv:1909.05858); presence and frequency are subtracted for
        tokens of the output.
        """
        if self._repetition != 1:
            pushed_V = torch.where(
                logits_V > 0, logits_V / self._repetition, logits_V * self._repetition
            )
            logits_V.copy_(torch.where(self._seen(logits_V), pushed_V, logits_V))
        if self._counts_output:
            count_V = self._count(logits_V)
            # in the dtype of the logits: true times a number would be float32, and may be inf
            occurs_V = (count_V > 0).to(logits_V.dtype)
            logits_V.sub_(count_V * self._frequency + occurs_V * self._presence)
        if self._bias:
            self._add_bias(logits_V)
        if self._bans_end:
            banned = [token_id for token_id in self._banned if token_id < len(logits_V)]
            logits_V[torch.tensor(banned, dtype=torch.int64, device=logits_V.device)] = -inf

    def _add_bias(self, logits_V: Tensor) -> None:
        if self._bias_ids is None or self._bias_values is None:
            device = logits_V.device
            self._bias_ids = torch.tensor(list(self._bias), device=device)
            biases = list(self._bias.values())
            self._bias_values = torch.tensor(biases, dtype=logits_V.dtype, device=device)
        logits_V[self._bias_ids] += self._bias_values

    def uniform(self) -> float:
        """The random number in [0, 1) of the next output token.

        It is computed from seed and index alone, so that a request that was interrupted goes on
        with the numbers it would have had.

        Source: Philox, Salmon et al. 2011, doi:10.1145/2063384.2063405.
        """
        bits = np.random.Philox(key=self.seed, counter=self.num_output).random_raw()
        return (int(bits) >> 11) * 2.0**-53

    @property
    def _bans_end(self) -> bool:
        return self.num_output < self._min_tokens and bool(self._banned)

    def _seen(self, logits_V: Tensor) -> Tensor:
        """The tokens that occur in prompt or output, bool."""
        if self._seen_V is None:
            self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
        if self._unseen:
            ids = torch.from_numpy(np.concatenate(self._unseen)).to(logits_V.device)
            self._seen_V[ids] = True
            self._unseen.clear()
        return self._seen_V

    def _count(self, logits_V: Tensor) -> Tensor:
        """The count of each token in the output, in the dtype of the logits."""
        if self._count_V is None:
            self._count_V = torch.zeros_like(logits_V)
        if self._uncounted:
            ids = torch.tensor(self._uncounted, device=logits_V.device)
            self._count_V.index_add_(0, ids, torch.ones_like(ids).to(self._count_V))
            self._uncounted.clear()
        return self._count_V


@torch.inference_mode()
def sample(logits_BV: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """Choose the next token of each row.

    Log-probabilities are those of the model's own logits: before penalties and temperature.

    Args:
        logits_BV: float32 or float64; not changed.
        states: of each row; the caller appends the tokens to them.

    Returns:
        One entry per row. A row that is not finite, or has no token left, has ``error`` set; the
        others do not notice.
    """
    # A sum is finite only if every term is; looking at each costs several times more.
    is_finite_B = logits_BV.sum(-1).isfinite()
    ids_B = first_largest(logits_BV)
    has_choice_B = torch.ones_like(is_finite_B)
    for rows in _blocks([i for i, s in enumerate(states) if not s.is_plain], logits_BV.shape[-1]):
        ids_B[rows], has_choice_B[rows] = _draw(logits_BV[rows], [states[i] for i in rows])
    found: list[Logprobs | None] = [None] * len(states)
    wanted = [i for i, state in enumerate(states) if state.logprobs is not None]
    if wanted:
        num_top = [states[i].logprobs or 0 for i in wanted]
        entries = token_logprobs(logits_BV[wanted], ids_B[wanted], max(num_top))
        for i, k, entry in zip(wanted, num_top, entries, strict=True):
            found[i] = Logprobs(entry.token_id, entry.logprob, entry.rank, entry.top[:k])
    table = torch.stack([ids_B, is_finite_B.long(), has_choice_B.long()]).tolist()
    return [
        Sampled(token_id, logprobs)
        if is_finite and has_choice and state.error is None
        else Sampled(0, error=state.error or (NOTHING_LEFT if is_finite else NOT_FINITE))
        for token_id, is_finite, has_choice, logprobs, state in zip(
            *table, found, states, strict=True
        )
    ]


def first_largest(x_BV: Tensor) -> Tensor:
    """``x_BV.argmax(-1)``: of equal values the first one, and nan before all.

    On a CPU argmax takes several times as long as the largest value alone. So the largest of each
    few columns are compared, then those of the first few that hold it.
    """
    num_rows, size = x_BV.shape
    num_groups, rest = divmod(size, GROUP_SIZE)
    if x_BV.device.type != "cpu" or rest or num_groups < 2:
        return x_BV.argmax(-1)
    x_BGS = x_BV.unflatten(1, (num_groups, GROUP_SIZE))
    group_B = x_BGS.amax(-1).argmax(-1)
    x_BS = x_BGS[torch.arange(num_rows), group_B]
    return group_B * GROUP_SIZE + x_BS.argmax(-1)


@torch.inference_mode()
def token_logprobs(logits_BV: Tensor, next_ids_B: Tensor, k: int) -> list[Logprobs]:
    """Log-probabilities of given tokens, as for the tokens of a prompt.

    Args:
        logits_BV: float32 or float64.
        next_ids_B: int64, the token whose log-probability each row gives.
        k: how many of the most likely tokens to add to each; equal ones in order of their ids.

    Returns:
        One entry per row, nan where a row is not finite.
    """
    results = []
    for rows in _blocks(range(len(logits_BV)), logits_BV.shape[-1]):
        ids_R1 = next_ids_B[rows, None]
        values_RV = logits_BV[rows].nan_to_num(nan=-inf, posinf=inf, neginf=-inf)
        norm_R1 = logits_BV[rows].logsumexp(-1, keepdim=True)
        chosen_R1 = values_RV.gather(-1, ids_R1)
        vocabulary_V = torch.arange(values_RV.shape[-1], device=values_RV.device)
        ahead_RV = (values_RV == chosen_R1) & (vocabulary_V < ids_R1)
        ahead_RV |= values_RV > chosen_R1
        top_values_RK, top_ids_RK = largest(values_RV, k)
        columns = zip(
            ids_R1[:, 0].tolist(),
            (chosen_R1 - norm_R1)[:, 0].tolist(),
            (ahead_RV.sum(-1) + 1).tolist(),
            top_ids_RK.tolist(),
            (top_values_RK - norm_R1).tolist(),
            strict=True,
        )
        results += [
            Logprobs(token_id, logprob, rank, tuple(zip(ids, logprobs, strict=True)))
            for token_id, logprob, rank, ids, logprobs in columns
        ]
    return results


@torch.inference_mode()
def probabilities(logits_BV: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Distributions to draw from: temperature, then top-k, top-p and min-p, over adjusted logits.

    Each cut sees the tokens that the one before it kept; of equally likely ones the lower id first.

    Args:
        logits_BV: float32 or float64; not changed.
        states: of each row.

    Returns:
        float64 [B, V], zero for tokens that were cut.
    """
    # float64 also because the order of a sum may change with the number of rows: a row in a batch
    # must draw what it draws alone.
    logits_BV = logits_BV.to(torch.float64, copy=True)
    for row_V, state in zip(logits_BV, states, strict=True):
        if state.adjusts:
            _adjust(row_V, state)
    temperature_B1 = _column([state.temperature or 1.0 for state in states], logits_BV)
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B1
    kept_BV = truncation_mask(
        scaled_BV,
        top_k=[state.top_k for state in states],
        top_p=[state.top_p for state in states],
        min_p=[state.min_p for state in states],
    )
    weight_BV = scaled_BV.exp().masked_fill_(~kept_BV, 0.0)
    return weight_BV / weight_BV.sum(-1, keepdim=True)


def _adjust(logits_V: Tensor, state: SamplerState) -> None:
    """Adjust one row; a failure there ends its request alone."""
    try:
        state.adjust(logits_V)
    except Exception as error:  # one request's own work
        log.exception("a row cannot be sampled")
        state.error = f"{CANNOT_SAMPLE} {type(error).__name__}: {error}; change its parameters"


def _draw(logits_RV: Tensor, states: Sequence[SamplerState]) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution, in order of ids.

    Returns:
        Ids, and whether there was a token to choose.
    """
    cumulative_RV = probabilities(logits_RV, states).cumsum(-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    target_R1 = _column([state.uniform() for state in states], total_R1) * total_R1
    ids_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    # Rounding may lift the target to the total, past the last token that was kept.
    last_R1 = torch.searchsorted(cumulative_RV, total_R1)
    ids_R1 = torch.minimum(ids_R1, last_R1).clamp_(max=logits_RV.shape[-1] - 1)
    return ids_R1[:, 0], total_R1[:, 0].isfinite()


def _blocks(rows: Sequence[int], vocab_size: int) -> Iterator[list[int]]:
    size = max(1, BLOCK_ELEMENTS // vocab_size)
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value per row, [R, 1], float64."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
