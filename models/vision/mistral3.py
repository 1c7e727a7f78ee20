"""Mistral 3 (Mistral Small 3.1 and later, Ministral 3): Pixtral's tower, squares of patches merged by a matrix.

Source: transformers v5.24 `modeling_mistral3`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.arch import build_model
from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Linear, Norm
from models.ops.vision import TowerOps
from models.vision import pixtral, pixtral_gguf
from models.vision.base import Encode, Family, Files, Tower, Vision
from models.vision.projector import (
    Projector,
    feature_layers,
    projected,
    projector,
    unused_layers,
    working_bytes,
)

_PREFIX = "multi_modal_projector."


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    tower: pixtral.Weights
    norm: Norm
    merger: Linear
    projector: Projector


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    vision = whole.section("vision_config") or ConfigReader({})
    if (kind := vision.text("model_type", "pixtral")) != "pixtral":
        raise CheckpointError(f"a vision tower of type {kind!r} is not supported", file=FILE)
    shape, merge = pixtral.read_shape(vision), whole.size("spatial_merge_size", 2)
    text = build_model(files.config).config
    layers = feature_layers(whole, shape.num_layers, -1)
    if len(layers) > 1:
        raise CheckpointError("vision_feature_layer of several layers is not supported", file=FILE)
    used = layers[0]
    weights = Weights(
        pixtral.weights(vision, shape, used),
        Norm(f"{_PREFIX}norm", shape.width, _eps(whole)),
        Linear(f"{_PREFIX}patch_merger.merging_layer", shape.width * merge**2, shape.width),
        projector(whole, shape.width, text.hidden_size, bias=False),
    )

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = ops.rms_norm(pixtral.states(ops, weights.tower, shape)[used], weights.norm)
        x = ops.linear(ops.fold(x, merge**2, interleaved=True), weights.merger)
        return (projected(ops, x, weights.projector),)

    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        used,
        (pixtral.PREFIX, _PREFIX),
        working_bytes(shape.width, shape.inner, shape.heads),
        stacks=pixtral.STACKS,
        other_parts=unused_layers(pixtral.LAYERS, used, shape.num_layers),
    )
    filler = whole.integer("image_token_index", whole.integer("image_token_id", 10))
    prepare = pixtral.read_preparation(files, encode, shape, merge)
    return Vision(tower, prepare, filler if 0 <= filler < text.vocab_size else 0)


def _eps(whole: ConfigReader) -> float:
    """That of the text model's norms."""
    text = whole.section("text_config") or ConfigReader({})
    default = 1e-5 if text.text("model_type", "mistral") == "ministral3" else 1e-6
    return text.number("rms_norm_eps", default)


FAMILY = Family(hf=("Mistral3ForConditionalGeneration",), build=build, gguf=pixtral_gguf.MISTRAL3)
