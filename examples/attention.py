"""Use the attention alone: one request's keys on two groups, and the exact merge of both parts.

python examples/attention.py
"""

import numpy as np
import torch

from mnemosyne.attention import AttentionBatch, Segment, choose_backend, merge_partials

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 64
CPU = torch.device("cpu")


def main() -> None:
    torch.manual_seed(0)
    # a pool of 8 pages; the request's keys lie in pages 5, 1, 6 and 2, in this order
    k_KSD, v_KSD = torch.randn(2, KV_HEADS, 8 * PAGE_SIZE, HEAD_DIM)
    q_THD = torch.randn(1, HEADS, HEAD_DIM)  # one decode, which sees 60 keys
    backend = choose_backend("auto", device=CPU, dtype=torch.float32, head_dim=HEAD_DIM)

    def attend(
        pages: list[int], first_key: int, num_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        segment = Segment(
            first_row=0,
            num_rows=1,
            first_position=59,
            num_keys=num_keys,
            pages=np.array(pages),
            first_key=first_key,
        )
        batch = AttentionBatch(segments=(segment,), num_rows=1, page_size=PAGE_SIZE)
        prepared = backend.prepare(batch, None, CPU)
        out_THD, lse_TH = backend.attend(
            q_THD, k_KSD, v_KSD, prepared, scale=HEAD_DIM**-0.5, return_lse=True
        )
        assert lse_TH is not None
        return out_THD, lse_TH

    whole_THD, _ = attend([5, 1, 6, 2], 0, 60)
    parts = [attend([5, 1], 0, 32), attend([6, 2], 32, 28)]
    merged_THD, _ = merge_partials(*map(torch.stack, zip(*parts, strict=True)))
    print(
        f"{backend.name}: parts differ from the whole by {(merged_THD - whole_THD).abs().max():.1e}"
    )


if __name__ == "__main__":
    main()
