"""The shape of a model by its name: a file of conf/shape, or the config.json of a checkpoint."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from omegaconf import OmegaConf

from mnemosyne.cli.arguments import nearest
from mnemosyne.config_simulate import ShapeConfig


def shape_names() -> list[str]:
    """Names of the shapes that come with the package."""
    folder = resources.files("mnemosyne.conf") / "shape"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def find_shape(model: str) -> ShapeConfig:
    """The shape that ``model=`` names; a folder is a checkpoint, of which only config.json is read.

    Raises:
        ValueError: naming the nearest shape if it is neither; for a checkpoint that is refused.
    """
    names = shape_names()
    if model in names:
        text = (resources.files("mnemosyne.conf") / "shape" / f"{model}.yaml").read_text("utf-8")
        shape = OmegaConf.merge(OmegaConf.structured(ShapeConfig), OmegaConf.create(text))
        found = OmegaConf.to_object(shape)
        assert isinstance(found, ShapeConfig), "merged into its dataclass"
        return found
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"model must be one of {', '.join(names)} or a Hugging Face directory, got {model!r}; "
            f"did you mean {nearest(model, names)}?"
        )
    # Imported late: it comes with torch.
    from mnemosyne.build_simulated import shape_of_checkpoint

    return shape_of_checkpoint(path)
