"""The program of a rank in tests of the front: a tiny model, and a prompt that ends the process.

python -m tests.server.engine_main LINK CHECKPOINT AXIS DEGREE
"""

from __future__ import annotations

import os
import signal
import sys

from mnemosyne.llm import LLM
from mnemosyne.parallel.start import started_rank
from mnemosyne.schedule.plan import Plan
from mnemosyne.server.engine_process import Connection, EngineProcess
from tests.engines import PAGE_SIZE, WrappedExecutor
from tests.server.telling import TellingBackend

POISON = 7  # a prompt that begins with this id ends the engine at its third output token


def main() -> int:
    link, checkpoint, axis, degree = sys.argv[1:]
    rank = int(os.environ["RANK"])
    share = {"max_tokens_per_group": 128} if axis == "kvp" else {}  # so that requests are shared
    with (
        started_rank(rank),
        LLM(
            checkpoint,
            dtype="float64",
            device="cpu",
            schedule={"chunk": 16},
            cache={"max_tokens": 8192, "page_size": PAGE_SIZE, **share},
            mesh={axis: int(degree)},
        ) as llm,
    ):
        if not llm.is_driver:
            llm.follow()
            return 0
        lengths: dict[int, int] = {}

        def fail(plan: Plan) -> None:
            for admission in plan.admitted:
                if admission.prompt_ids[0] == POISON:
                    lengths[admission.request_id] = len(admission.prompt_ids) - admission.num_given
            for chunk in plan.chunks:
                if chunk.stop > lengths.get(chunk.request_id, chunk.stop) + 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        WrappedExecutor(llm.engine, before=fail)
        process = EngineProcess(llm.engine, TellingBackend, Connection(link))
        return process.run()


if __name__ == "__main__":
    sys.exit(main())
