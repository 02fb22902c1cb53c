"""Parts of an answer that both dialects of OpenAI write alike."""

from __future__ import annotations

from typing import Any

from mnemosyne.server.answer import Answer, Part


def envelope(answer: Answer, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Put choices into an object of some kind, as a chunk or as the whole answer."""
    return {
        "id": answer.id,
        "object": kind,
        "created": answer.created_s,
        "model": answer.inquiry.model,
        "choices": choices,
    }


def extras(answer: Answer, part: Part) -> dict[str, Any]:
    """Write the fields of a choice beyond OpenAI's: the stop at its end, ids where asked for."""
    made: dict[str, Any] = {}
    if part.finish_reason is not None:
        made["stop_reason"] = part.stop_reason
    if answer.inquiry.return_token_ids:
        made["token_ids"] = part.token_ids
    return made
