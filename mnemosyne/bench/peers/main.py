"""Runs one engine and times it: settings and requests as lines of JSON in, times and ids out.

Usage: python main.py FILE_OF_THE_ENGINE. The first line of input holds the settings, each later
one a list of requests that are served together. Whatever the engine prints goes to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any

Answer = dict[str, Any]


def serve(engine: Any, requests: list[dict[str, Any]]) -> list[Answer]:
    """Serve requests together until the last one has all its tokens; the others are cut off.

    Args:
        engine: as the package of this file describes it.
        requests: of each ``ids``, ``max_tokens``, ``is_filled`` (its cache holds anything instead
            of being computed, up to the last token of the prompt) and ``after``: tokens that those
            before it must have before it comes.

    Returns:
        Of each request: ``added_s``, ``times_s`` of its tokens, in seconds from the beginning,
        and ``token_ids``.
    """
    started_s = time.perf_counter()
    answers: list[Answer] = []
    while not answers or len(answers) < len(requests) or not _is_done(answers[-1], requests[-1]):
        while len(answers) < len(requests) and all(
            len(answer["token_ids"]) >= requests[len(answers)]["after"] for answer in answers
        ):
            added_s = time.perf_counter() - started_s
            engine.add(len(answers), requests[len(answers)])
            answers.append({"added_s": added_s, "times_s": [], "token_ids": []})
        tokens = engine.step()
        now_s = time.perf_counter() - started_s
        for index, token_id in tokens:
            answers[index]["times_s"].append(now_s)
            answers[index]["token_ids"].append(token_id)
    engine.stop()
    return answers


def _is_done(answer: Answer, request: dict[str, Any]) -> bool:
    return len(answer["token_ids"]) >= request["max_tokens"]


def load(path: str) -> Any:
    """The engine's file as a module, wherever it lies."""
    spec = importlib.util.spec_from_file_location("engine_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    # Beside this file stand others whose names an engine may import something else by.
    del sys.path[0]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        if engine is None:
            engine = load(sys.argv[1]).open_engine(message)
            answer = engine.about
        else:
            answer = serve(engine, message)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
