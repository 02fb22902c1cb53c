"""Fields about streaming that both dialects of OpenAI read alike."""

from __future__ import annotations

from typing import Any

from mnemosyne.server.fields import Fields


def read_streaming(fields: Fields) -> dict[str, Any]:
    """The fields of an inquiry that say how the answer is sent."""
    options = fields.mapping("stream_options")
    stream = fields.flag("stream")
    continuous = stream and bool(options.get("continuous_usage_stats"))
    return {
        "stream": stream,
        "include_usage": continuous or (stream and bool(options.get("include_usage"))),
        "continuous_usage": continuous,
        "return_progress": fields.flag("return_progress"),
        "return_token_ids": fields.flag("return_token_ids"),
    }
