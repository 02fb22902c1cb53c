"""``mnemosyne generate``: prompts in, tokens out; finished work is printed even after a signal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from mnemosyne.cli import FAILED, OK
from mnemosyne.cli.answers import Answer, open_output, print_answers, summary, write_answers
from mnemosyne.config_generate import GenerateConfig
from mnemosyne.llm import LLM
from mnemosyne.process import INTERRUPTED, flush_output, say, sigterm_ignored
from mnemosyne.request import Piece, SamplingParams
from mnemosyne.serve.progress import Bars
from mnemosyne.serve.prompts import Conversation

Prompt = str | list[int]


def generate(config: GenerateConfig) -> int:
    """Serve the prompts of a config and print their tokens.

    Args:
        config: an engine, prompts, sampling parameters.

    Returns:
        0; 2 if a prompt was refused or ended in an error; 130 after Ctrl-C or SIGTERM.

    Raises:
        ValueError: if there is no prompt, or something in the config cannot be used.
    """
    prompts, params = read_prompts(config), sampling_params(config)
    with (
        open_output(config.output) as file,
        Bars() as bars,
        LLM.from_config(config, progress=bars.read_weights, compiling=bars.compile) as llm,
    ):
        has_text = llm.tokenizer is not None
        is_streamed = config.stream and len(prompts) == params.n == 1 and has_text
        answers = [
            accept(llm, number, prompt, params, is_chat=config.chat)
            for number, prompt in enumerate(prompts, start=1)
        ]
        bars.expect([sample for answer in answers for sample in answer.samples])
        started_s = time.perf_counter()
        is_interrupted = serve(llm, printer(bars) if is_streamed else bars.update)
        seconds = time.perf_counter() - started_s
        error = llm.engine.prediction_error()
        bars.stop()
        with sigterm_ignored():
            if file is not None:
                write_answers(answers, file)
            if is_streamed:
                print()  # ends the line of the streamed text
            else:
                print_answers(answers, has_text=has_text)
            flush_output()
    errors = [error for answer in answers for error in answer.errors]
    say("\n".join((*(f"error: {error}" for error in errors), summary(answers, seconds, error))))
    if is_interrupted:
        return INTERRUPTED
    return FAILED if errors else OK


def read_prompts(config: GenerateConfig) -> list[Prompt]:
    """All prompts of a config: the text, the list, the file, the ids.

    Raises:
        ValueError: if there is none, or the file cannot be read.
    """
    prompts: list[Prompt] = [] if config.prompt is None else [config.prompt]
    prompts += config.prompts
    if config.prompt_file is not None:
        prompts.append(_read_text(config.prompt_file))
    ids = config.token_ids
    prompts += [ids] if ids and all(isinstance(item, int) for item in ids) else ids
    if not prompts:
        raise ValueError(
            "prompt must be given, got none; add prompt=TEXT, prompt_file=FILE or token_ids=[1,2,3]"
        )
    return prompts


def sampling_params(config: GenerateConfig) -> SamplingParams:
    """The sampling parameters among the keys of a config."""
    names = {entry.name for entry in fields(SamplingParams)} & {f.name for f in fields(config)}
    return SamplingParams(**{name: getattr(config, name) for name in names})


def accept(
    llm: LLM, number: int, prompt: Prompt, params: SamplingParams, *, is_chat: bool
) -> Answer:
    """Hand a prompt to the engine; a prompt that is refused does not affect the others."""
    try:
        ready = conversation(llm, prompt) if is_chat else prompt
        return Answer(number=number, samples=llm.engine.add(ready, params))
    except ValueError as error:
        return Answer(number=number, refusal=str(error))


def conversation(llm: LLM, prompt: Prompt) -> Conversation:
    """A text as a user message.

    Raises:
        ValueError: if the prompt is no text, or the model has no tokenizer.
    """
    if not isinstance(prompt, str) or llm.tokenizer is None:
        raise ValueError(
            "chat must be false for token ids and for models without a tokenizer, got true; drop it"
        )
    return Conversation(messages=[{"role": "user", "content": prompt}])


def serve(llm: LLM, show: Callable[[Piece], None]) -> bool:
    """Step until nothing is left.

    Args:
        llm: with requests accepted.
        show: called with what each step brings.

    Returns:
        Whether Ctrl-C or SIGTERM ended it; what was finished by then stays.
    """
    try:
        while llm.engine.has_work:
            for piece in llm.engine.step():
                show(piece)
    except KeyboardInterrupt:
        llm.engine.abort("cancelled")
        return True
    return False


def printer(bars: Bars) -> Callable[[Piece], None]:
    """Show the prefill as a bar, then the text as it comes."""

    def show(piece: Piece) -> None:
        bars.update(piece)
        if piece.text:
            bars.stop()
            print(piece.text, end="", flush=True)

    return show


def _read_text(path: str) -> str:
    """A file, or standard input for ``-``, less the newline that ends it."""
    if path == "-" and sys.stdin is None:
        raise ValueError(
            "prompt_file must be open when it is standard input, got one that was closed; "
            "name a file"
        )
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise ValueError(
            f"prompt_file must be a readable UTF-8 file, got {path!r} ({reason}); "
            "use - for standard input"
        ) from error
    return text.removesuffix("\n")
