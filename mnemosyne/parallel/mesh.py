"""One mesh of ranks, pp x kvp x tp: its numbers checked, its axes handed out."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mnemosyne.config import MeshConfig
from mnemosyne.parallel.board import Board, open_board
from mnemosyne.parallel.rendezvous import join_processes
from mnemosyne.shape import ModelShape

AXES = ("pp", "kvp", "tp")  # outermost first


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """This rank's place on one axis of the mesh. An axis of degree 1 has no group."""

    name: str
    degree: int = 1
    index: int = 0
    group: ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None  # of this axis alone; DTensors are laid out by it
    board: Board | None = None  # for small messages, where all its ranks are on one host


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """The axes of the mesh as one rank sees them."""

    pp: Axis  # pipeline stages
    kvp: Axis  # groups of the KV cache
    tp: Axis  # shards of heads and vocabulary
    ffn: Axis  # shards of the MLP: tp, or kvp and tp flattened
    rank: int = 0
    world_size: int = 1
    device_mesh: DeviceMesh | None = None

    @property
    def is_wide(self) -> bool:
        """Return whether the MLP is sharded over the groups as well."""
        return self.ffn.degree > self.tp.degree

    @property
    def label(self) -> str:
        """The name of this rank in logs and errors."""
        return "/".join(f"{axis.name}{axis.index}" for axis in (self.pp, self.kvp, self.tp))


def single_mesh() -> Mesh:
    """The mesh of one process; torch.distributed is not touched."""
    return Mesh(pp=Axis("pp"), kvp=Axis("kvp"), tp=Axis("tp"), ffn=Axis("ffn"))


def init_mesh(config: MeshConfig, device_type: str) -> Mesh:
    """Join the mesh whose launcher set RANK and WORLD_SIZE.

    Every rank calls it with the same config. torch.distributed is initialised from the
    environment unless it is already; for one process it is left alone.

    Args:
        config: degrees and the layout of the MLP.
        device_type: ``"cpu"`` takes gloo, ``"cuda"`` nccl and the GPU of LOCAL_RANK.

    Raises:
        ValueError: if the degrees do not make up the processes, or a rank has no GPU.
    """
    world_size = count_processes()
    check_world_size(config, world_size)
    if world_size == 1:
        return single_mesh()
    if device_type == "cuda":
        _take_gpu()
    if not dist.is_initialized():
        # Named, because torch takes both where it sees a GPU, also for ranks that use none.
        backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:nccl"
        join_processes(backend)
    degrees = (config.pp, config.kvp, config.tp)
    device_mesh = init_device_mesh(device_type, degrees, mesh_dim_names=AXES)
    pp = axis_of(device_mesh["pp"])
    kvp, tp = (_with_board(axis_of(device_mesh[name]), device_type) for name in ("kvp", "tp"))
    ffn = replace(tp, name="ffn")
    if config.ffn == "wide" and config.kvp > 1:
        flat = (config.pp, config.kvp * config.tp)
        flat_mesh = init_device_mesh(device_type, flat, mesh_dim_names=("pp", "ffn"))
        ffn = _with_board(axis_of(flat_mesh["ffn"]), device_type)
    return Mesh(
        pp=pp,
        kvp=kvp,
        tp=tp,
        ffn=ffn,
        rank=dist.get_rank(),
        world_size=world_size,
        device_mesh=device_mesh,
    )


def axis_of(device_mesh: DeviceMesh) -> Axis:
    """This rank's place on a mesh of one dim."""
    assert device_mesh.mesh_dim_names is not None
    (name,), degree = device_mesh.mesh_dim_names, device_mesh.size()
    if degree == 1:
        return Axis(name)
    return Axis(name, degree, device_mesh.get_local_rank(), device_mesh.get_group(), device_mesh)


def _with_board(axis: Axis, device_type: str) -> Axis:
    if axis.group is None or device_type != "cpu":
        return axis
    return replace(
        axis, board=open_board(axis.group, axis=axis.name, ranks_on_host=ranks_on_host())
    )


def head_mesh(mesh: Mesh, num_kv_heads: int) -> DeviceMesh:
    """An axis of KV heads, for more ranks of tp than heads; all ranks call it together.

    Neighbouring ranks share a head: index t of tp holds head ``t // (tp / num_kv_heads)``.
    """
    assert mesh.device_mesh is not None
    tp = mesh.tp.degree
    return init_device_mesh(
        mesh.device_mesh.device_type,
        (mesh.world_size // tp, num_kv_heads, tp // num_kv_heads),
        mesh_dim_names=("outer", "kv_head", "copy"),
    )["kv_head"]


def count_processes() -> int:
    """Processes of this run: those of torch.distributed or of the launcher's WORLD_SIZE, or 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_on_host() -> int:
    """Processes of this run on this host, as the launcher says; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def check_world_size(config: MeshConfig, world_size: int) -> None:
    """Refuse a mesh that the processes do not fill.

    Raises:
        ValueError: with the degrees and the number of processes.
    """
    if config.world_size != world_size:
        raise ValueError(
            f"mesh.pp x mesh.kvp x mesh.tp must equal the number of processes, {world_size}, "
            f"got {config.pp} x {config.kvp} x {config.tp} = {config.world_size}; start "
            f"{config.world_size} with torchrun --nproc-per-node, or change the degrees"
        )


def check_mesh(config: MeshConfig, shape: ModelShape) -> None:
    """Refuse degrees that a model cannot be cut by; nothing is loaded for it.

    Heads and the MLP are cut into equal shards. Shards of the vocabulary are of
    ``ceil(vocab_size / tp)`` words, the last one shorter.

    Raises:
        ValueError: naming the degree and the number that it does not fit.
    """
    pp, tp = config.pp, config.tp
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    if pp > shape.num_layers:
        raise ValueError(
            f"mesh.pp must be at most the number of layers, {shape.num_layers}, got {pp}; "
            "a stage without a layer has nothing to do"
        )
    if num_heads % tp or (num_kv_heads % tp and tp % num_kv_heads):
        fitting = [
            str(n)
            for n in range(1, num_heads + 1)
            if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
        ]
        raise ValueError(
            f"mesh.tp must divide the {num_heads} query heads, and divide the {num_kv_heads} KV "
            f"heads or be a multiple of them, got {tp}; use one of {', '.join(fitting)}"
        )
    axes, degree = "mesh.tp" if config.ffn == "tp" else "kvp x tp", config.ffn_degree
    for width in (shape.mlp_width, shape.dense_width, shape.shared_width):
        if width % degree:
            raise ValueError(
                f"{axes} must divide the MLP width, {width}, with mesh.ffn={config.ffn}, "
                f"got {degree}; lower the degrees"
            )
    if (tp - 1) * shape.local(config).vocab_size >= shape.vocab_size:
        raise ValueError(
            f"mesh.tp must leave every rank some of the {shape.vocab_size} words of the "
            f"vocabulary, got {tp}; lower it"
        )


def _take_gpu() -> None:
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(
            f"every rank of a host must have a GPU of its own, got LOCAL_RANK {local_rank} and "
            f"{num_gpus} GPUs; start fewer ranks per host or use device=cpu"
        )
    torch.cuda.set_device(local_rank)
