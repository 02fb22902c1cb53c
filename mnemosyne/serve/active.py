"""A request between acceptance and its last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mnemosyne.request import Logprobs, Piece, Request, RequestMetrics, RequestOutput
from mnemosyne.schedule.plan import Chunk
from mnemosyne.serve.stream import TextStream
from mnemosyne.serve.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Active:
    """A request between acceptance and its last token."""

    request: Request
    output: RequestOutput
    text: TextStream | None
    last_token_s: float | None = None
    prefilled: int = 0
    chunk_step: int | None = None  # of the last chunk of its prompt

    @classmethod
    def start(cls, request: Request, tokenizer: Tokenizer | None) -> Self:
        """A request that was accepted, with the output it has already.

        Its text goes on as if it had never been interrupted, inside a character as well as inside
        what may be the beginning of a stop string.

        Raises:
            ValueError: if a token follows one that ends the request.
        """
        params = request.params
        output = RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.own_prompt_ids,
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            metrics=RequestMetrics(arrival_s=request.arrival_s),
        )
        text = None
        if tokenizer is not None:
            text = TextStream(
                tokenizer,
                prompt_ids=request.own_prompt_ids,
                stop=params.stop,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
        active = cls(request, output, text)
        for token_id in request.given_ids:
            if output.finish_reason is not None:
                raise ValueError(
                    f"given must end where the request ends, got {token_id} after its end by "
                    f"{output.finish_reason!r}; drop what follows"
                )
            _, output.finish_reason = active.enter(token_id)
        return active

    def note_prefill(self, chunk: Chunk, step: int) -> None:
        """Take note that a chunk of the prompt, or a slice of one, was computed in a step."""
        done, metrics = min(chunk.stop, len(self.output.prompt_token_ids)), self.output.metrics
        self.prefilled = max(self.prefilled, done)  # less if it was set back
        if self.chunk_step != step:
            metrics.chunks.append(0)
            metrics.groups.append(0)
        metrics.chunks[-1] += chunk.num_tokens
        metrics.groups[-1] += 1
        self.chunk_step = step

    def enter(self, token_id: int) -> tuple[str, str | None]:
        """Add a token to the output.

        Returns:
            The text that it makes certain, and what it ends the request with, None if it goes on.
        """
        output = self.output
        output.token_ids.append(token_id)
        reason = self._finish_reason(token_id)
        text = ""
        if self.text is not None:
            # the token that ends a request is no part of its text
            text = self.text.push(() if reason == "stop" else (token_id,))
            if reason is not None:
                text += self.text.close()
            if self.text.matched is not None:
                reason, output.stop_reason = "stop", self.text.matched
            output.text += text
        if reason == "stop" and output.stop_reason is None:
            output.stop_reason = token_id
        return text, reason

    def _finish_reason(self, token_id: int) -> str | None:
        request, num_output = self.request, len(self.output.token_ids)
        params = request.params
        is_end = token_id in params.stop_token_ids or (
            not params.ignore_eos and token_id in request.end_token_ids
        )
        if is_end and num_output >= params.min_tokens:
            return "stop"
        assert params.max_tokens is not None, "the intake resolves it"
        return "length" if num_output >= params.max_tokens else None

    def note_restored(self, num_tokens: int) -> None:
        """Take note of how many tokens of the prompt came from the disk so far."""
        metrics = self.output.metrics
        metrics.num_cached += num_tokens - metrics.num_restored
        metrics.num_restored = num_tokens
        self.prefilled = max(self.prefilled, metrics.num_cached)

    def piece(
        self,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[Logprobs, ...] = (),
    ) -> Piece:
        """The addition of a step, as streams yield it."""
        output, request = self.output, self.request
        return Piece(
            request.request_id,
            token_ids,
            text,
            logprobs,
            output.finish_reason,
            output.error,
            self.prefilled,
            len(output.prompt_token_ids),
            request.sample,
            output.stop_reason,
            None,
            output.metrics.num_cached,
        )
