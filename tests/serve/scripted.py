"""An engine without a model: its tokens are written down beforehand, so text alone is tested."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from mnemosyne.request import Piece, RequestOutput, Sampled, SamplingParams
from mnemosyne.schedule.plan import Plan, StepResult
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.intake import Intake, Prompt
from mnemosyne.serve.tokenizer import Tokenizer
from tests.schedule.clocked import make_scheduler


class ScriptedExecutor:
    """Samples the ids of a script, one after the other, for a single request."""

    depth = 1

    def __init__(self, script: Sequence[int]) -> None:
        self._script = list(script)
        self._plan: Plan | None = None

    def submit(self, plan: Plan) -> None:
        self._plan = plan

    def collect(self) -> StepResult:
        plan, self._plan = self._plan, None
        assert plan is not None, "a result is collected once"
        ids = {c.request_id: Sampled(self._script.pop(0)) for c in plan.chunks if c.samples}
        return StepResult(plan.index, ids)


def say(
    backend: tokenizers.Tokenizer,
    prompt: Prompt,
    script: Sequence[int],
    *,
    end_token_ids: tuple[int, ...] = (),
    known: Sequence[int] = (),
    pieces: list[Piece] | None = None,
    **params: object,
) -> RequestOutput:
    """The output of a request whose sampled tokens are those of the script.

    Args:
        backend: tokenizer of the model that is played.
        prompt: text or ids.
        script: ids, as many as the request may sample.
        end_token_ids: of the model.
        known: tokens that the request has already.
        pieces: takes what the steps bring.
        params: fields of ``SamplingParams``; ``max_tokens`` is the length of the script.
    """
    intake = Intake(
        vocab_size=backend.get_vocab_size(),
        max_positions=1024,
        defaults=GenerationDefaults(end_token_ids=end_token_ids),
        tokenizer=Tokenizer(backend),
        model="a script",
    )
    engine = Engine(make_scheduler(), ScriptedExecutor(script), intake)
    fields = {"max_tokens": len(script), **params}
    (output,) = engine.add(prompt, SamplingParams(**fields), [known])
    pieces, had = [] if pieces is None else pieces, output.text
    while engine.has_work:
        pieces += engine.step()
    assert had + "".join(piece.text for piece in pieces) == output.text
    return output
