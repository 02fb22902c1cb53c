"""Work of ranks: a stage of a model, cut by the mesh, on rows that every group computes whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mnemosyne.config import MeshConfig
from mnemosyne.model_zoo.bench import init_random
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.parallelize import parallelize
from mnemosyne.model_zoo.spec import ModelSpec, read_spec
from mnemosyne.model_zoo.stages import cut_stages
from mnemosyne.parallel.mesh import Mesh, init_mesh
from mnemosyne.runtime.weights import load_weights
from tests.model_zoo.dense import dense_context


@dataclass(frozen=True, slots=True)
class Seen:
    """Findings of one rank."""

    logits_TV: Tensor | None  # on the last stage
    num_bytes: int  # read of the files
    parameters: dict[str, Tensor]
    layers: range


def run_checkpoints(cases: list[tuple[Path, MeshConfig]], token_ids: list[int]) -> list[Seen]:
    """Each checkpoint in float64 on its mesh; all meshes are of as many ranks."""
    return [_run(read_spec(path), path, config, token_ids) for path, config in cases]


def run_random(spec: ModelSpec, config: MeshConfig, token_ids: list[int]) -> Seen:
    """As ``run_checkpoints``, with weights from a seed."""
    return _run(spec, None, config, token_ids)


def _run(spec: ModelSpec, path: Path | None, config: MeshConfig, token_ids: list[int]) -> Seen:
    mesh = init_mesh(config, "cpu")
    layers = cut_stages(spec, config.pp)[mesh.pp.index]
    decoder = Decoder(spec, layers=layers, dtype=torch.float64, device="meta")
    parallelize(decoder, mesh)
    num_bytes = 0
    if path is None:
        init_random(decoder, seed=0)
    else:
        num_bytes = load_weights(decoder, path)
    parameters = dict(decoder.named_parameters())
    return Seen(
        logits_TV=_logits(decoder, mesh, layers, token_ids),
        num_bytes=num_bytes,
        parameters={name: parameter.detach() for name, parameter in parameters.items()},
        layers=layers,
    )


@torch.inference_mode()
def _logits(decoder: Decoder, mesh: Mesh, layers: range, token_ids: list[int]) -> Tensor | None:
    x, positions_T = torch.tensor(token_ids), torch.arange(len(token_ids))
    if not decoder.is_first:
        x = torch.empty(len(token_ids), decoder.spec.width, dtype=torch.float64)
        dist.recv(x, group=mesh.pp.group, group_src=mesh.pp.index - 1)
    windows = decoder.spec.windows[layers.start : layers.stop]
    hidden_TE = decoder(x, positions_T, dense_context(windows))
    if decoder.is_last:
        return decoder.logits(hidden_TE)
    dist.send(hidden_TE, group=mesh.pp.group, group_dst=mesh.pp.index + 1)
    return None
