"""LLaVA 1.5, and Pixtral as transformers has it: a tower, and two matrices behind it.

Source: LLaVA 1.5 (arXiv 2310.03744); transformers v5.24 `modeling_llava` and `processing_llava`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.arch import build_model
from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops.vision import TowerOps
from models.vision import clip, llava_gguf, pixtral
from models.vision.base import Encode, Family, Files, Pixels, Prepared, Tower, Vision
from models.vision.projector import (
    Projector,
    feature_layers,
    projected,
    projector,
    side_by_side,
    unused_layers,
    working_bytes,
)

_PREFIXES = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    tower: clip.Weights | pixtral.Weights
    projector: Projector


@dataclass(frozen=True, slots=True)
class _Settings:
    """What both kinds read of config.json."""

    whole: ConfigReader
    vision: ConfigReader
    width: int
    """The decoder's."""
    with_class: bool
    """All tokens of the tower count; else the first, the class token, does not."""


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    text = build_model(files.config).config
    strategy = whole.text("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(f"vision_feature_select_strategy {strategy!r} is not supported", file=FILE)
    vision = whole.section("vision_config") or ConfigReader({})
    settings = _Settings(whole, vision, text.hidden_size, strategy == "full")
    match kind := vision.text("model_type", "clip_vision_model"):
        case "clip_vision_model":
            tower, prepare = _with_clip(files, settings)
        case "pixtral":
            tower, prepare = _with_pixtral(files, encode, settings)
        case _:
            raise CheckpointError(f"a vision tower of type {kind!r} is not supported", file=FILE)
    filler = whole.integer("image_token_index", whole.integer("image_token_id", 32000))
    return Vision(tower, prepare, filler if 0 <= filler < text.vocab_size else 0)


def _with_clip(files: Files, settings: _Settings) -> tuple[Tower, Callable[[Pixels], Prepared]]:
    shape = clip.read_shape(settings.vision)
    wanted = feature_layers(settings.whole, shape.sizes.num_layers, -2)
    used = max(wanted)
    behind = projector(settings.whole, shape.sizes.width * len(wanted), settings.width, bias=True)
    weights = clip.weights(shape, used)

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = side_by_side(ops, clip.states(ops, weights, shape), wanted)
        return (projected(ops, x if settings.with_class else clip.without_class(ops, x), behind),)

    tower = Tower(
        Weights(weights, behind),
        forward,
        settings.width,
        used,
        _PREFIXES,
        working_bytes(shape.sizes.width, shape.sizes.inner, shape.sizes.heads),
        stacks=clip.STACKS,
        other_parts=(*clip.UNUSED, *unused_layers(clip.LAYERS, used, shape.sizes.num_layers)),
    )
    return tower, clip.read_preparation(files, shape, with_class=settings.with_class)


def _with_pixtral(files: Files, encode: Encode, settings: _Settings) -> tuple[Tower, Callable[[Pixels], Prepared]]:
    if not settings.with_class:
        raise CheckpointError("vision_feature_select_strategy must be full: the tower has no class token", file=FILE)
    shape = pixtral.read_shape(settings.vision)
    wanted = feature_layers(settings.whole, shape.num_layers, -2)
    used = max(wanted)
    behind = projector(settings.whole, shape.width * len(wanted), settings.width, bias=True)
    weights = pixtral.weights(settings.vision, shape, used)

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        return (projected(ops, side_by_side(ops, pixtral.states(ops, weights, shape), wanted), behind),)

    tower = Tower(
        Weights(weights, behind),
        forward,
        settings.width,
        used,
        _PREFIXES,
        working_bytes(shape.width, shape.inner, shape.heads),
        stacks=pixtral.STACKS,
        other_parts=unused_layers(pixtral.LAYERS, used, shape.num_layers),
    )
    return tower, pixtral.read_preparation(files, encode, shape, 1)


FAMILY = Family(hf=("LlavaForConditionalGeneration",), build=build, gguf=llava_gguf.LAYOUTS)
