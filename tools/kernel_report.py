"""Compile every Triton kernel ahead of time, without a GPU, and print what it uses.

    python tools/kernel_report.py                       # all kernels, configs and architectures
    python tools/kernel_report.py 'sm_90.*decode'       # those whose names match
    python tools/kernel_report.py used                  # without the candidates of the GPU suite

One line per kernel: registers of a thread, shared memory of a block, bytes of stack (spills).
Exits with status 1 if anything spills or asks for more shared memory than the GPU has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from mnemosyne.kernels.configs import configs_for
from mnemosyne.kernels.hopper_chunk import BUFFERS, GLUON_DTYPES, LAUNCH, hopper_chunk_kernel
from mnemosyne.kernels.merge_partials import MOST_PARTIALS, merge_kernel
from mnemosyne.kernels.paged_chunk import chunk_kernel
from mnemosyne.kernels.paged_decode import decode_kernel
from mnemosyne.kernels.tile import TileConfig, block_sizes

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # a block's most, of A100, H100 and B200
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel as some launch would build it."""

    name: str
    kernel: Any
    arch: int  # 90 is sm_90
    types: dict[str, str]  # of the arguments; what is missing is int32, constants apart
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"sm_{self.arch} {self.name}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Demands of a compiled kernel on the GPU."""

    registers: int  # per thread
    shared_bytes: int  # per block
    stack_bytes: int  # per thread; spilled registers live there

    def complaint(self, arch: int) -> str | None:
        """Why it must not ship, or None."""
        if self.stack_bytes:
            return f"spills {self.stack_bytes} bytes"
        if self.shared_bytes > SHARED_BYTES[arch]:
            return f"asks for more than {SHARED_BYTES[arch]} bytes of shared memory"
        return None


def builds() -> Iterator[Build]:
    """Every kernel with every config that it may run with."""
    for arch in SHARED_BYTES:
        for dtype, head_dim, page_size in (
            *((torch.bfloat16, head_dim, 128) for head_dim in (64, 128, 256)),
            (torch.bfloat16, 128, 16),  # a block spans pages
            (torch.float16, 128, 128),
            (torch.float32, 128, 128),
            (torch.float64, 64, 128),
        ):
            for kind in ("decode", "chunk"):
                configs = configs_for(kind, dtype, head_dim, page_size, arch // 10)
                for config in configs:
                    build = attention_build(kind, arch, dtype, head_dim, page_size, config)
                    role = "used" if config == configs[0] else "candidate"
                    yield replace(build, name=f"{role} {build.name}")
                    if config.specialized:
                        build = hopper_build(arch, dtype, head_dim, page_size, config)
                        yield replace(build, name=f"{role} {build.name}")
        yield merge_build(arch, "bf16", "fp32", 128)


def attention_build(
    kind: str,
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    config: TileConfig,
    group: int = 4,
    window: int | None = None,
) -> Build:
    """The decode or the chunk kernel for a pool of bfloat16 to float64."""
    short = TYPES[str(dtype).removeprefix("torch.")]
    wide = "fp64" if short == "fp64" else "fp32"
    blocks = block_sizes(config, head_dim, group)
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{short}")
    types |= dict.fromkeys(("lse", "partial_out", "partial_lse"), f"*{wide}")
    types |= {"items": "*i64", "pages": "*i32"}
    constants: dict[str, object] = {"SCALE": 0.088, "PAGE_SIZE": page_size, "GROUP": group}
    constants |= {"HEAD_DIM": head_dim, **blocks}
    if kind == "chunk":
        constants["WINDOW"] = window
    else:
        constants["EARLY"] = arch >= 90
    for name in ("k_descriptor", "v_descriptor"):
        if config.descriptor and page_size % config.block_n == 0:
            types[name] = f"tensordesc<{short}[1, {config.block_n}, {head_dim}]>"
        else:
            constants[name] = None
    tiles = f"{blocks['BLOCK_M']}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    name = f"paged_{kind} {short} D{head_dim} N{page_size} {tiles}"
    name += " descriptor" * any(t.startswith("tensordesc") for t in types.values())
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = decode_kernel if kind == "decode" else chunk_kernel
    return Build(name, kernel, arch, types, constants, options)


def hopper_build(
    arch: int, dtype: torch.dtype, head_dim: int, page_size: int, config: TileConfig, group: int = 4
) -> Build:
    """The kernel of specialized warps, for whole blocks."""
    short = TYPES[str(dtype).removeprefix("torch.")]
    layout = gl.NVMMASharedLayout.get_default_for([config.block_n, head_dim], GLUON_DTYPES[dtype])
    descriptor = f"tensordesc<{short}[{config.block_n}, {head_dim}],{layout!r}>"
    types = dict.fromkeys(("q", "out"), f"*{short}")
    types |= dict.fromkeys(("k_descriptor", "v_descriptor"), descriptor)
    types |= dict.fromkeys(("lse", "partial_out", "partial_lse"), "*fp32")
    types |= {"items": "*i64", "pages": "*i32"}
    constants: dict[str, object] = {"SCALE": 0.088, "PAGE_SIZE": page_size, "GROUP": group}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_N": config.block_n, "STAGES": BUFFERS}
    name = f"hopper_chunk {short} D{head_dim} N{page_size} 128x{config.block_n} s{BUFFERS}"
    return Build(name, hopper_chunk_kernel, arch, types, constants, LAUNCH)


def merge_build(arch: int, dtype: str, wide: str, head_dim: int) -> Build:
    """The ragged merge."""
    types = {"partial_out": f"*{wide}", "partial_lse": f"*{wide}", "lse": f"*{wide}"}
    types |= {"out": f"*{dtype}", "merges": "*i64"}
    constants: dict[str, object] = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim}
    constants |= {"BLOCK_P": MOST_PARTIALS, "EARLY": arch >= 90}
    name = f"used merge_partials {dtype} D{head_dim}"
    return Build(name, merge_kernel, arch, types, constants)


def compile_build(build: Build) -> Usage:
    """Compile to a cubin and read its resources."""
    names = build.kernel.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "i32")
        for name in names
    }
    # What a launch finds out by looking: pointers and strides are multiples of 16.
    divisible = [["tt.divisibility", 16]]
    attrs = {
        (index,): divisible
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source_of = GluonASTSource if isinstance(build.kernel, GluonJITFunction) else ASTSource
    source = source_of(build.kernel, signature, constexprs=build.constants, attrs=attrs)
    target = GPUTarget("cuda", build.arch, 32)
    compiled = triton.compile(source, target=target, options=build.options)
    return read_usage(compiled.asm["cubin"], compiled.metadata.shared)


def read_usage(cubin: bytes, shared_bytes: int) -> Usage:
    """Registers and stack from the cubin; shared memory is asked for at launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", text)[0]) for key in ("REG", "STACK"))
    return Usage(registers, shared_bytes, stack)


def main(pattern: str) -> int:
    failed = 0
    print(f"triton {triton.__version__}")
    print(f"{'kernel':70} {'registers':>9} {'shared':>8} {'spilled':>8} {'seconds':>8}")
    for build in builds():
        if not re.search(pattern, build.label):
            continue
        started_s = time.perf_counter()
        usage = compile_build(build)
        seconds = time.perf_counter() - started_s
        complaint = usage.complaint(build.arch)
        failed += complaint is not None
        print(
            f"{build.label:70} {usage.registers:9} {usage.shared_bytes:8} {usage.stack_bytes:8} "
            f"{seconds:8.1f} {complaint or ''}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main("|".join(sys.argv[1:])))
