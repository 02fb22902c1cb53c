"""The device, and the two peaks that all speeds are held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tools.gpu.setting import Entry, Setting


def machine(setting: Setting) -> Iterator[Entry]:
    """A copy (GB/s read and written together) and a bfloat16 matmul, measured.

    The copy is the faster of the driver's and a kernel's: a graph's copies may take engines that
    move less than the processors do.
    """
    device, smoke, size = setting.device, setting.smoke, 256 if setting.smoke else 8192
    name = "cpu" if smoke else torch.cuda.get_device_name()
    capability = None if smoke else ".".join(map(str, torch.cuda.get_device_capability()))
    yield "device", {"name": name, "capability": capability, "cuda": torch.version.cuda}
    source = torch.randn(2**18 if smoke else 2**29, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / 1e9
    ways = {
        "driver": setting.timed(lambda: target.copy_(source), "GB_s", moved),
        "kernel": setting.timed(lambda: torch.neg(source, out=target), "GB_s", moved),
    }
    way = max(ways, key=lambda name: ways[name]["GB_s"])
    yield "copy", ways[way] | {"by": way}
    a, b = torch.randn(2, size, size, device=device).bfloat16()  # zeros would run faster
    yield "matmul", setting.timed(lambda: a @ b, "TFLOP_s", 2 * size**3 / 1e12)
