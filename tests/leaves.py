"""Small leaves for tests, random ones, and what an engine has done with its folder."""

from __future__ import annotations

import numpy as np

from mnemosyne.cache.chain import ID_DTYPE, Chain, seed_of
from mnemosyne.cache.leaf_file import Layout, Leaf, Part, Span
from mnemosyne.cache.leaf_folder import LeafCounts
from mnemosyne.llm import LLM

LAYOUT = Layout("ab" * 32, "tiny", "float32", head_dim=4, num_layers=3, num_heads=2, leaf_tokens=8)
WHOLE = Part(Span(0, 3), Span(0, 2), Span(0, 8))


def counts_of(llm: LLM) -> LeafCounts:
    """Counts of what rank 0 has done with its folder."""
    leaves = llm._session._leaves
    assert leaves is not None
    return leaves.folder.counts


def chain_of_leaves(count: int, seed: int = 0) -> list[Leaf]:
    """Neighbouring leaves of ``LAYOUT`` with random tokens."""
    size = LAYOUT.leaf_tokens
    ids = np.random.default_rng(seed).integers(0, 1000, count * size)
    chain = Chain(seed_of(b"tiny", None), ids, size)
    return [
        Leaf(
            chain.digests[index],
            chain.before(index),
            index * size,
            ids[index * size : (index + 1) * size].astype(ID_DTYPE).tobytes(),
        )
        for index in range(count)
    ]


def pieces_of(part: Part, seed: int = 0) -> list[memoryview]:
    """Random keys and values of a part, as ``encode`` takes them."""
    rng = np.random.default_rng(seed)
    shape = (2 * part.layers.size, part.heads.size * part.tokens.size * LAYOUT.head_dim)
    numbers = rng.standard_normal(shape).astype(np.float32)
    return [row.view(np.uint8).data for row in numbers]
