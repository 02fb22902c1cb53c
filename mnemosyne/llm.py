"""The offline API: a model in, prompts in, outputs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from mnemosyne.config import (
    CacheConfig,
    EngineConfig,
    MeshConfig,
    MetricsConfig,
    ScheduleConfig,
    SloConfig,
)
from mnemosyne.joining.checkpoint import Progress
from mnemosyne.metrics import StepRecord
from mnemosyne.options import typed
from mnemosyne.request import Piece, RequestOutput, SamplingParams
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.serve.calls import add_call, read_call
from mnemosyne.serve.chat import Message
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.prompts import Prompt, list_conversations
from mnemosyne.serve.tokenizer import Tokenizer
from mnemosyne.session import Session


class LLM:
    """A model ready to generate, exactly, at any length its cache holds.

    Args:
        model: a Hugging Face directory, the id of one that was downloaded to the hub's cache,
            ``"smollm2"``, ``"needle"`` or ``"bench"``.
        dtype: ``"auto"`` (as the checkpoint says), float64, float32, bfloat16 or float16.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        attention: ``"auto"``, ``"reference"``, ``"flex"``, ``"cpu"``, ``"triton"``, or the C++
            kernels of an instruction set: ``"amx"``, ``"avx512"``, ``"avx512f"``, ``"avx2"`` or
            ``"neon"``.
        operators: what computes all but attention: ``"auto"``, ``"torch"`` or an instruction set.
        compile: ``"none"``, or ``"step"``: all but attention is compiled before the first request,
            or decodes are recorded where C++ kernels do everything; ``"auto"``: the latter on one
            rank, else none.
        schedule: a ``ScheduleConfig`` or its fields, e.g. ``{"chunk": 512}``.
        slo: a ``SloConfig`` or its fields, e.g. ``{"ttft_min": 0.5}``.
        cache: a ``CacheConfig`` or its fields, e.g. ``{"max_tokens": "1M"}``.
        mesh: a ``MeshConfig`` or its fields.
        metrics: a ``MetricsConfig`` or its fields, e.g. ``{"path": "steps.jsonl"}``.
        on_step: called with the ``StepRecord`` of each step, until it raises: that is logged,
            and requests go on.
        predictor: step time by step work, in place of the one that is fitted here; an object with
            ``predict(work) -> seconds``, and ``observe(work, seconds)`` if it wants to learn. One
            that fails is logged, and ours takes its place; requests go on.
        progress: called with (bytes done, bytes in all) while weights are fetched and read; what
            it raises ends the start.
        compiling: called with (buckets done, buckets in all) while the model is compiled; likewise.

    Raises:
        ValueError: naming the value, the rule and the remedy, before any weight is read where
            the config alone shows it.

    Example:
        >>> with LLM("needle") as llm:
        ...     output = llm.generate(["the door code is"], SamplingParams(max_tokens=4))[0]
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "auto",
        operators: str = "auto",
        compile: str = "auto",
        schedule: ScheduleConfig | Mapping[str, Any] | None = None,
        slo: SloConfig | Mapping[str, Any] | None = None,
        cache: CacheConfig | Mapping[str, Any] | None = None,
        mesh: MeshConfig | Mapping[str, Any] | None = None,
        metrics: MetricsConfig | Mapping[str, Any] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        predictor: Predictor | None = None,
        progress: Progress | None = None,
        compiling: Progress | None = None,
    ) -> None:
        config = EngineConfig(
            model=str(model),
            dtype=dtype,
            device=device,
            attention=attention,
            operators=operators,
            compile=compile,
            schedule=typed("schedule", ScheduleConfig, schedule),
            slo=typed("slo", SloConfig, slo),
            cache=typed("cache", CacheConfig, cache),
            mesh=typed("mesh", MeshConfig, mesh),
            metrics=typed("metrics", MetricsConfig, metrics),
        )
        self.config = config
        self._session = Session(
            config, on_step=on_step, predictor=predictor, progress=progress, compiling=compiling
        )

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
        predictor: Predictor | None = None,
        progress: Progress | None = None,
        compiling: Progress | None = None,
    ) -> Self:
        """The same from a whole config, as the command line makes it."""
        llm = cls.__new__(cls)
        llm.config = config
        llm._session = Session(
            config, on_step=on_step, predictor=predictor, progress=progress, compiling=compiling
        )
        return llm

    @property
    def is_driver(self) -> bool:
        """Return whether this is rank 0 or the only one: it prints, writes and steps the engine."""
        return self._session.follower is None

    @property
    def engine(self) -> Engine:
        """The engine underneath: ``add``, ``step``, ``cancel``.

        Raises:
            ValueError: after ``close``, and on every rank of a mesh but the first.
        """
        return self._session.engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the checkpoint, None if it has none."""
        return self.engine.intake.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Serve prompts together and wait for all.

        Threads may call it together: on one rank their calls are served one after another, on a
        mesh all but one are refused.

        Args:
            prompts: texts or token ids; a single one counts as a list of one.
            params: one for all, or one per prompt.
            progress: show progress bars on a terminal or in a notebook.

        Returns:
            One output per prompt, in order. A prompt that was refused has ``finish_reason``
            "error" and says why in ``error``; the others are not affected.

        Raises:
            ValueError: if the numbers of prompts and params differ, or the engine is used by a
                stream that is not at its end or an ``AsyncEngine``; in a fork of the process.
        """
        follower = self._session.follower
        if follower is not None:
            with self._session.claim("LLM.generate"):
                return follower.follow_call()
        asked = read_call(self.engine.intake, prompts, params)
        with self._session.idle_engine("LLM.generate") as (engine, _):
            outputs = add_call(engine, asked)
            if progress:
                from mnemosyne.serve.progress import Bars

                with Bars() as bars:
                    bars.expect(engine.unfinished())  # those that were not refused
                    while engine.has_work:
                        for piece in engine.step():
                            bars.update(piece)
            while engine.has_work:
                engine.step()
            self._session.tell_outputs(outputs)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer conversations, as the model's chat template writes them; else ``generate``.

        Args:
            messages: dicts with ``role`` and ``content``, oldest first; of one conversation, or
                a list of several.
            params: one for all, or one per conversation.
            add_generation_prompt: end each with the header of an assistant's message.
            tools: JSON schemas of functions, which the template shows to the model.
            chat_template_kwargs: further names that the template reads, as ``enable_thinking``.
            progress: show progress bars on a terminal or in a notebook.
        """
        conversations = list_conversations(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=chat_template_kwargs,
        )
        return self.generate(conversations, params, progress=progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Piece]]:
        """Serve prompts together and yield what each step brings.

        Args:
            prompts: as for ``generate``.
            params: as for ``generate``.

        Yields:
            ``(index, piece)``: which prompt, and its new tokens and text, or how far its prompt
            is computed. The last piece of a prompt has a ``finish_reason``. Closing the iterator
            early cancels what still runs. On a mesh only rank 0 yields anything.

        Raises:
            ValueError: as ``generate`` does, when the first piece is asked for.
        """
        follower = self._session.follower
        if follower is not None:
            with self._session.claim("LLM.stream"):
                follower.follow_call()
            return
        asked = read_call(self.engine.intake, prompts, params)
        with self._session.idle_engine("LLM.stream", ends_alone=False) as (engine, claim):
            outputs = add_call(engine, asked)
            index_of = {
                sample.request_id: index
                for index, output in enumerate(outputs)
                for sample in (output, *output.samples)
            }
            try:
                for index, output in enumerate(outputs):
                    if output.error is not None:
                        yield index, Piece(None, finish_reason="error", error=output.error)
                        claim.act()  # another thread may have asked for more
                while engine.has_work and not claim.is_revoked:
                    for piece in engine.step():
                        yield index_of[piece.request_id], piece
                        claim.act()
            except GeneratorExit:  # nobody wants the rest, which is no error on any rank
                if self._session.is_here:  # not in a fork, which has a copy of the iterator
                    claim.act()
                    engine.abort("cancelled")
                    self._session.tell_outputs(outputs)
                raise
            self._session.tell_outputs(outputs)

    def clear_cache(self) -> None:
        """Forget the cached prefixes of all prompts so far, those in ``cache.dir`` included."""
        self.engine.clear_cache()

    def follow(self) -> None:
        """On every rank of a mesh but the first: take part until rank 0 closes its LLM.

        For programs in which rank 0 uses ``engine`` itself; ``generate`` needs no such call.
        """
        if self._session.follower is not None:
            self._session.follower.follow_to_the_end()

    def close(self) -> None:
        """Release model and cache; unfinished requests are cancelled.

        A ``generate`` of another thread is waited for; an open stream or ``AsyncEngine`` is cut
        off. On a mesh, rank 0 lets the others go, and they wait for it here. In a fork of the
        process it does nothing.
        """
        self._session.close(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.close(error)
