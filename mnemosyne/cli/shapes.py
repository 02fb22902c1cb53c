"""The subject of a simulation: a shape of conf/shape or a checkpoint, fitted to a record or not."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from mnemosyne.cli.arguments import nearest
from mnemosyne.config_simulate import PlanConfig, SimulateConfig
from mnemosyne.metrics import read_steps
from mnemosyne.shape import ModelShape
from mnemosyne.simulate.fit import fit_efficiency

Config = TypeVar("Config", SimulateConfig, PlanConfig)


def shape_names() -> list[str]:
    """Names of the shapes that come with the package."""
    folder = resources.files("mnemosyne.conf") / "shape"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def find_shape(model: str) -> ModelShape:
    """The shape that ``model=`` names; a folder is a checkpoint, of which only config.json is read.

    Raises:
        ValueError: naming the nearest shape if it is neither; for a checkpoint that is refused.
    """
    names = shape_names()
    if model in names:
        text = (resources.files("mnemosyne.conf") / "shape" / f"{model}.yaml").read_text("utf-8")
        sizes: Any = OmegaConf.to_container(OmegaConf.create(text))
        return _shape(sizes)
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"model must be one of {', '.join(names)} or a Hugging Face directory, got {model!r}; "
            f"did you mean {nearest(model, names)}?"
        )
    # Imported lazily: it comes with torch.
    from mnemosyne.model_zoo.spec import read_spec

    return read_spec(path)


def _shape(sizes: dict[str, Any]) -> ModelShape:
    """A shape of a file, whose windows are those of its first layers, over and over."""
    windows = sizes.pop("windows", [])
    if windows:
        sizes["windows"] = tuple(islice(cycle(windows), sizes["num_layers"]))
    dense_layers = tuple(sizes.pop("dense_layers", ()))
    return ModelShape(**sizes, dense_layers=dense_layers)


def calibrated(config: Config, shape: ModelShape) -> Config:
    """The config with its efficiencies fitted to the record that it names, if it names one.

    The result goes to standard error, as keys that another command takes.

    Raises:
        ValueError: if the record cannot be read or is too short.
    """
    if config.calibration is None:
        return config
    try:
        records = read_steps(config.calibration)
    except OSError as error:
        raise ValueError(
            f"calibration must be a file that metrics.path wrote, got {config.calibration!r} "
            f"({error.strerror}); check the path"
        ) from error
    fit = fit_efficiency(records, shape, config.hardware, config.efficiency)
    found = fit.efficiency
    keys = (f"efficiency.{name}={getattr(found, name):.3g}" for name in found.__dataclass_fields__)
    print(
        f"fitted to {len(records)} steps, errors p50 {fit.error_p50:.1%} and p95 "
        f"{fit.error_p95:.1%}: {' '.join(keys)}",
        file=sys.stderr,
    )
    return replace(config, efficiency=found)
