"""vLLM, in this process: its engine is stepped by hand, which gives the time of each token."""

from __future__ import annotations

import math
import os
from typing import Any

FILLED = "filled-"  # begins the id of a request whose prompt is not computed
SLACK = 64  # positions beyond the longest request


class Vllm:
    """vLLM's engine (see the package)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ.update(_environment(settings))
        # After the environment, which is read on import.
        import vllm
        from vllm.config import KVTransferConfig

        self._vllm = vllm
        options: dict[str, Any] = {}
        if settings["fills"]:
            # vLLM's own way to measure decodes without the prefill before them.
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="DecodeBenchConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"fill_mean": 0.0, "fill_std": 1.0},
            )
            _fill_only_marked()
        self._engine = vllm.LLM(
            settings["model"],
            dtype=settings["dtype"],
            skip_tokenizer_init=True,
            max_model_len=settings["max_length"] + SLACK,
            max_num_batched_tokens=settings["chunk"],
            max_num_seqs=max(16, settings["max_requests"]),
            # The same ids come in every run.
            enable_prefix_caching=False,
            **options,
        ).llm_engine
        self._counts: dict[str, int] = {}  # tokens seen of each request
        self.about = {"version": f"vllm {vllm.__version__}", "fills": True, "batches": True}

    def add(self, index: int, request: dict[str, Any]) -> None:
        name = f"{FILLED if request['is_filled'] else ''}{index}"
        params = self._vllm.SamplingParams(
            max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": request["ids"]}, params)
        self._counts[name] = 0

    def step(self) -> list[tuple[int, int]]:
        found = []
        for output in self._engine.step():
            token_ids = output.outputs[0].token_ids
            index = int(output.request_id.removeprefix(FILLED))
            found += [(index, t) for t in token_ids[self._counts[output.request_id] :]]
            self._counts[output.request_id] = len(token_ids)
        return found

    def stop(self) -> None:
        self._engine.abort_request(list(self._counts))
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._counts.clear()


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    """A setting that lets vLLM use every core: by default it keeps one of two for itself."""
    cache_gib = settings["max_tokens"] * settings["token_bytes"] / 2**30
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(1.1 * cache_gib) or 1),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(settings["threads"]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _fill_only_marked() -> None:
    """Have the connector pass over requests that are to be computed."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import decode_bench_connector

    scheduler = decode_bench_connector.DecodeBenchConnectorScheduler
    matched = scheduler.get_num_new_matched_tokens

    def only_marked(self: Any, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if not request.request_id.startswith(FILLED):
            return 0, False
        return matched(self, request, num_computed_tokens)

    scheduler.get_num_new_matched_tokens = only_marked


def open_engine(settings: dict[str, Any]) -> Vllm:
    """See the package."""
    return Vllm(settings)
