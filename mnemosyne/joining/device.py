"""The device by its name, or the one that there is."""

from __future__ import annotations

import torch


def choose_device(name: str, num_processes: int = 1) -> torch.device:
    """The device by name; ``"auto"`` is cuda where there is one, else cpu.

    Args:
        name: as the user wrote it.
        num_processes: of this run; of several, each takes a GPU by its rank on the host.

    Raises:
        ValueError: if the name is no device, or the device is not there, or not for all processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}; use auto"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}; use auto")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device must be there, got {name!r} where torch sees {count} GPUs; use device=cpu"
        )
    if device.type == "cuda" and device.index is not None and num_processes > 1:
        raise ValueError(
            f"device must not be one GPU for {num_processes} processes, got {name!r}; use "
            "device=cuda, and each takes the GPU of its LOCAL_RANK"
        )
    return device
