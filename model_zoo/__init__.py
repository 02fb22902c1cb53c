"""Dense decoders in the Hugging Face format: specifications, layers, and names of weights."""

from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec, read_spec

__all__ = ["Decoder", "ModelSpec", "RopeSpec", "read_spec"]
