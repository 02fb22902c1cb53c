"""Tensor parallelism of a decoder, as data: the placement of each module, by its name.

Only for meshes of more than one process: DTensor takes 0.6 s to import.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.layers import Attention, DecoderLayer, Embedding, RMSNorm
from mnemosyne.parallel.mesh import Axis, Mesh, head_mesh
from mnemosyne.parallel.styles import (
    ColumnParallel,
    ExpertsParallel,
    RowParallel,
    ShardedRMSNorm,
    VocabParallelEmbedding,
    gather_words,
)


def layer_plan(mesh: Mesh) -> dict[str, dict[str, ParallelStyle]]:
    """Placement of one decoder layer, by axis of the mesh and name of the module.

    The modules of all families. Norms are held whole by every rank, also those
    of each head of q and k.
    """
    return {
        "tp": {
            "attn.wq": ColumnParallel(),  # [H*D/tp, E]
            "attn.wo": RowParallel(mesh.tp),  # [E, H*D/tp], summed on the way out
            "attn.sinks": ColumnParallel(),  # [H/tp]
        },
        "kv_head": {
            "attn.wk": ColumnParallel(),  # [K*D/tp, E], or one head where tp exceeds them
            "attn.wv": ColumnParallel(),  # likewise
        },
        "ffn": {
            "mlp.gate": ColumnParallel(),  # [F/ffn, E]
            "mlp.up": ColumnParallel(),  # [F/ffn, E]
            "mlp.down": RowParallel(mesh.ffn),  # [E, F/ffn], summed on the way out
            "mlp.experts": ExpertsParallel(mesh.ffn),  # every expert [F/ffn, E], likewise
            "mlp.shared.gate": ColumnParallel(),
            "mlp.shared.up": ColumnParallel(),
            "mlp.shared.down": RowParallel(mesh.ffn),
        },
    }


def _has(layer: nn.Module, name: str) -> bool:
    """Return whether a layer has a module: some have experts, others one MLP."""
    return any(name == own for own, _ in layer.named_modules())


def _shard_row_norms(attention: Attention, tp: Axis, kv_mesh: DeviceMesh | None) -> None:
    """Cut norms over whole rows of q and k as the rows are cut."""
    if tp.device_mesh is None or kv_mesh is None:
        return
    for name, mesh in (("q_norm", tp.device_mesh), ("k_norm", kv_mesh)):
        norm = getattr(attention, name)
        assert isinstance(norm, RMSNorm)
        sharded = ShardedRMSNorm(norm, eps=norm.eps, offset=norm.offset, axis=tp, device_mesh=mesh)
        setattr(attention, name, sharded)


def parallelize(decoder: Decoder, mesh: Mesh) -> None:
    """Cut a decoder for this rank; every rank calls it, before the weights are loaded.

    Loading then reads the slices of this rank alone and leaves plain local tensors. Input and
    output of the decoder stay whole on every rank of tp, its heads are the local ones.

    Args:
        decoder: on the meta device, with the layers of this rank's stage.
        mesh: that ``check_mesh`` found to fit the model.
    """
    spec, tp = decoder.spec, mesh.tp
    kv_mesh = tp.device_mesh
    if tp.degree > spec.num_kv_heads:
        kv_mesh = head_mesh(mesh, spec.num_kv_heads)
    axes = {"tp": tp.device_mesh, "kv_head": kv_mesh, "ffn": mesh.ffn.device_mesh}
    plans = layer_plan(mesh)
    for layer in decoder.layers.values():
        for axis, plan in plans.items():
            if axes[axis] is not None:
                held = {name: style for name, style in plan.items() if _has(layer, name)}
                parallelize_module(layer, axes[axis], held)
        if isinstance(layer, DecoderLayer) and layer.attn.norms_rows:
            _shard_row_norms(layer.attn, mesh.tp, kv_mesh)
    decoder.is_sharded = tp.degree > 1 or mesh.ffn.degree > 1
    if tp.device_mesh is None:
        return
    # A tied head uses the words that the embedding holds.
    if isinstance(decoder.embed, Embedding):
        decoder.embed = VocabParallelEmbedding(decoder.embed, tp, decoder.embed.look_up)
    if decoder.head is not None:
        parallelize_module(decoder.head, tp.device_mesh, ColumnParallel())
    if decoder.is_last:
        gather_words(decoder.unembed, tp, spec.vocab_size)
