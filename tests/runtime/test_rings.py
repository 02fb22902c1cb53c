"""The rows of a step in layers that forget."""

from __future__ import annotations

import numpy as np
import torch

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.pages import PagePool
from mnemosyne.runtime.rings import RingChunk, enter_rings, ring_rows
from mnemosyne.schedule.plan import Chunk

CPU = torch.device("cpu")
PAGE_SIZE, LONG = 4, 4096


def test_page_ids_of_long_chunks_last_for_a_step_however_many_requests_run() -> None:
    windows, num_requests = [2, 2], 90
    kinds = PageKinds.of(windows, PAGE_SIZE)
    need = kinds.pages(LONG)
    pool = PagePool(
        num_pages=num_requests * need,
        page_size=PAGE_SIZE,
        num_layers=2,
        num_kv_heads=1,
        head_dim=2,
        dtype=torch.float32,
        device=CPU,
        kinds=kinds,
        windows=windows,
        max_rows=LONG,
    )
    (page_ids,) = pool.ring_ids

    for request_id in range(num_requests):
        ring = request_id * need + np.arange(need, dtype=np.int64)[None]
        enter_rings(pool, request_id, (ring,))
        chunk = RingChunk(Chunk(request_id, 0, LONG, samples=False), 0, (ring,))
        (rows,) = ring_rows(pool, [chunk], LONG, None, CPU)

    (segment,) = rows.batch.segments
    stop = segment.first_page + LONG // PAGE_SIZE
    seen = page_ids.tensor[segment.first_page : stop]
    assert torch.equal(seen, torch.from_numpy(segment.pages))
    assert seen[:need].tolist() == ring[0].tolist()
    assert len(set(seen.tolist())) == LONG // PAGE_SIZE
