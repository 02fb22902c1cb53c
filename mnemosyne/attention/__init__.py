"""Exact attention over a paged cache: backends of one contract, and the log-sum-exp merge.

>>> import numpy as np, torch
>>> device, page_size = torch.device("cpu"), 16
>>> k_KSD, v_KSD = torch.randn(2, 2, 8 * page_size, 64)  # a pool of 8 pages, 2 KV heads
>>> pages = np.array([5, 1])
>>> decode = Segment(first_row=0, num_rows=1, first_position=29, num_keys=30, pages=pages)
>>> pages = np.array([3])
>>> chunk = Segment(first_row=1, num_rows=4, first_position=10, num_keys=14, pages=pages)
>>> batch = AttentionBatch(segments=(decode, chunk), num_rows=5, page_size=page_size)
>>> backend = choose_backend("auto", device=device, dtype=torch.float32, head_dim=64)
>>> prepared = backend.prepare(batch, None, device)  # once per step, for all layers
>>> q_THD = torch.randn(5, 8, 64)  # 8 query heads
>>> out_THD, lse_TH = backend.attend(
...     q_THD, k_KSD, v_KSD, prepared, scale=64**-0.5, return_lse=True
... )
>>> out_THD.shape, lse_TH.shape
(torch.Size([5, 8, 64]), torch.Size([5, 8]))
"""

from __future__ import annotations

import logging
import platform
from difflib import get_close_matches
from importlib.util import find_spec

import torch

from mnemosyne.attention.by_kind import ByKind
from mnemosyne.attention.cpu import CPU_DTYPES, CpuBackend
from mnemosyne.attention.flex import FLEX_DTYPES, FlexBackend
from mnemosyne.attention.lse import merge_partials
from mnemosyne.attention.measured import measured_on, usual_on_gpu
from mnemosyne.attention.native import NativeBackend, why_not_native
from mnemosyne.attention.reference import ReferenceBackend
from mnemosyne.attention.segments import Attend, AttentionBackend, AttentionBatch, Segment
from mnemosyne.config import ATTENTION_BACKENDS
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS, InstructionSet

__all__ = [
    "Attend",
    "AttentionBackend",
    "AttentionBatch",
    "ByKind",
    "CpuBackend",
    "FlexBackend",
    "NativeBackend",
    "ReferenceBackend",
    "Segment",
    "choose_backend",
    "merge_partials",
]

log = logging.getLogger(__name__)


def choose_backend(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """A backend by name; one that cannot run there is refused, never replaced.

    Args:
        name: an instruction set of the C++ kernels (see ``kernels.cpu.processor``), ``cpu``,
            ``flex``, ``reference``, ``triton``, or ``auto``: on CPU the fastest set that runs
            here, else ``cpu``; on a GPU ``triton``, and ``flex`` for decodes or chunks where the
            GPU suite measured that to be the faster.
        device: where q, k and v are.
        dtype: of q, k and v.
        head_dim: of q, k and v.

    Raises:
        ValueError: if there is no such backend, or it does not run on the device, dtype, head dim
            or processor.
    """
    if name not in ATTENTION_BACKENDS:
        close = get_close_matches(name, ATTENTION_BACKENDS, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "auto picks by device"
        names = ", ".join(ATTENTION_BACKENDS)
        raise ValueError(f"attention must be one of {names}, got {name!r}; {remedy}")
    if name == "auto":
        return _usual(device, dtype, head_dim)
    if name == "reference":
        _require(name, "dtype", dtype.is_floating_point, "a floating one", dtype)
        return ReferenceBackend()
    for instructions in INSTRUCTION_SETS:
        if name == instructions.name:
            return _native_backend(instructions, device, dtype, head_dim)
    if name == "cpu":
        _require(name, "device", device.type == "cpu", "cpu", device)
        _require(name, "dtype", dtype in CPU_DTYPES, f"one of {CPU_DTYPES}", dtype)
        return CpuBackend()
    if name == "triton":
        return _triton_backend(device, dtype, head_dim)
    _require(name, "device", device.type in ("cpu", "cuda"), "cpu or cuda", device)
    _require(name, "dtype", dtype in FLEX_DTYPES, f"one of {FLEX_DTYPES}", dtype)
    return FlexBackend()


def _usual(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """The backend that ``auto`` takes."""
    if device.type == "cpu":
        name = _usual_on_cpu(dtype, head_dim)
        return choose_backend(name, device=device, dtype=dtype, head_dim=head_dim)
    _require("auto", "device", device.type == "cuda", "cpu or cuda", device)
    kinds, why = usual_on_gpu(measured_on(device), dtype)
    if "triton" in kinds.values() and (head_dim > 256 or find_spec("triton") is None):
        kinds, why = dict.fromkeys(kinds, "flex"), "triton is missing or lacks this head dim"
    log.info("attention is %s for decodes, %s for chunks: %s", *kinds.values(), why)
    decode, chunk = (
        choose_backend(name, device=device, dtype=dtype, head_dim=head_dim)
        for name in kinds.values()
    )
    return decode if decode.name == chunk.name else ByKind(decode, chunk)


def _usual_on_cpu(dtype: torch.dtype, head_dim: int) -> str:
    why_not, passed_over = None, ""
    native = [each for each in INSTRUCTION_SETS if each.machine == platform.machine()]
    for instructions in native:
        why_not = why_not_native(instructions, dtype, head_dim)
        if why_not is None:
            log.info("attention is %s%s", instructions.name, passed_over)
            return instructions.name
        passed_over = f", not {instructions.name}: {why_not}"
    if native and dtype in native[-1].dtypes:
        log.warning("attention is cpu, not the faster %s: %s", native[-1].name, why_not)
    return "cpu"


def _native_backend(
    instructions: InstructionSet, device: torch.device, dtype: torch.dtype, head_dim: int
) -> NativeBackend:
    name = instructions.name
    _require(name, "device", device.type == "cpu", "cpu", device)
    if (why_not := why_not_native(instructions, dtype, head_dim)) is not None:
        raise ValueError(f"attention={name} must be able to run, but {why_not}; use attention=cpu")
    return NativeBackend(instructions, head_dim, dtype)


def _triton_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    if find_spec("triton") is None:
        raise ValueError(
            "triton must be installed for attention=triton, got none; "
            "pip install triton or choose another attention backend"
        )
    # Not at the top: the package works where triton is missing.
    from mnemosyne.attention.triton import TRITON_DTYPES, TritonBackend
    from mnemosyne.kernels.configs import is_interpreted
    from mnemosyne.kernels.tile import TileConfig

    runs = device.type == "cuda" or (device.type == "cpu" and is_interpreted())
    _require("triton", "device", runs, "cuda (or cpu under TRITON_INTERPRET=1)", device)
    _require("triton", "dtype", dtype in TRITON_DTYPES, f"one of {TRITON_DTYPES}", dtype)
    _require("triton", "head_dim", head_dim <= 256, "<= 256", head_dim)
    measured = (measured_on(device) or {}).get("configs", {})
    return TritonBackend({shape: TileConfig(**fields) for shape, fields in measured.items()})


def _require(backend: str, name: str, holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(
            f"{name} must be {rule} for attention={backend}, got {value}; "
            "choose another attention backend or change it"
        )
