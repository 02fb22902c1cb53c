"""A request between acceptance and its last token."""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.request import Logprobs, Piece, Request, RequestOutput
from mnemosyne.serve.stream import TextStream


@dataclass(slots=True, eq=False)
class Active:
    """A request between acceptance and its last token."""

    request: Request
    output: RequestOutput
    text: TextStream | None
    last_token_s: float | None = None
    prefilled: int = 0

    def finish_reason(self, token_id: int) -> str | None:
        """What its newest token ends it with, None if it goes on."""
        request, num_output = self.request, len(self.output.token_ids)
        params = request.params
        is_end = token_id in params.stop_token_ids or (
            not params.ignore_eos and token_id in request.end_token_ids
        )
        if is_end and num_output >= params.min_tokens:
            return "stop"
        is_full = request.num_prompt_tokens + num_output >= request.max_tokens
        return "length" if is_full else None

    def piece(
        self,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[Logprobs, ...] = (),
    ) -> Piece:
        """What a step brought for it, as streams yield it."""
        output, request = self.output, self.request
        return Piece(
            request.request_id,
            token_ids,
            text,
            logprobs,
            output.finish_reason,
            output.error,
            self.prefilled,
            len(request.prompt_ids),
        )
