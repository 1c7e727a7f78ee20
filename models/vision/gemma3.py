"""Gemma 3: SigLIP on pictures of one size, its patches averaged by windows, and a matrix behind a norm.

Source: Gemma 3 (arXiv 2503.19786); transformers v5.24 `modeling_gemma3`, `processing_gemma3` and
`image_processing_pil_gemma3`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from models.arch import build_model
from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Linear, Norm
from models.ops.vision import TowerOps
from models.vision import gemma3_gguf, processing, siglip
from models.vision.base import PLACE, Encode, Family, Files, Pixels, Prepared, Tower, Vision
from models.vision.processing import PixelRules
from models.vision.projector import working_bytes

_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."
_STACKS = (
    *siglip.stacks(_TOWER),
    # Stored as (inputs, outputs), under a name of its own.
    Stack(
        r"(.*)multi_modal_projector\.mm_input_projection_weight",
        (f"{_PROJECTOR}mm_input_projection.weight",),
        whole=True,
        transposed=True,
    ),
)
_STANDARD = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    tower: siglip.Weights
    norm: Norm
    projection: Linear


@dataclass(frozen=True, slots=True)
class PanAndScan:
    """When a long picture is looked at in parts as well, and in how many. Thread: any."""

    least_side: int
    """Pixels of a part's shorter side, at least."""
    most: int
    least_ratio: float
    """Of the longer side to the shorter one."""

    def parts(self, pixels: Pixels) -> list[Pixels]:
        """The parts along the longer side, none of a picture that is not long. Shapes: uint8 (H, W, 3) each."""
        height, width = pixels.shape[:2]
        longer, shorter = max(height, width), min(height, width)
        if longer / shorter < self.least_ratio:
            return []
        count = min(longer // self.least_side, math.floor(longer / shorter + 0.5))
        count = min(max(count, 2), self.most)
        size = math.ceil(longer / count)
        if min(size, shorter) < self.least_side:
            return []
        spans = pairwise(size * number for number in range(count + 1))
        return [pixels[:, a:b] if width >= height else pixels[a:b] for a, b in spans]


@dataclass(frozen=True, slots=True)
class Expansion:
    """The tokens around places."""

    begin: int
    end: int
    places: int
    lines: tuple[int, ...]
    """An empty line, in front and behind."""
    encode: Encode

    def tokens(self, crops: int) -> tuple[int, ...]:
        """All tokens of a picture with so many parts."""
        words = "Here is the original image ", " and here are some crops to help you see better "
        if not crops:
            return (*self.lines, *self._whole(), *self.lines)
        made = [*self.encode(f"{words[0]}\n\n"), *self._whole()]
        for between in (f"\n\n{words[1]}\n\n", *["\n\n \n\n"] * (crops - 1)):
            made += [*self.encode(between), *self._whole()]
        return (*made, *self.lines)

    def _whole(self) -> list[int]:
        return [self.begin, *[PLACE] * self.places, self.end]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    side: int
    patch: int
    window: int
    """Rows of patches, and columns, that are averaged."""
    scan: PanAndScan | None
    expansion: Expansion

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        crops = self.scan.parts(pixels) if self.scan is not None else []
        per_side = self.side // self.patch
        places = processing.places_of(per_side, per_side, self.window) @ (per_side, 1)
        passes = []
        for each in (pixels, *crops):
            values = self.rules.values(self.rules.resized(each, self.side, self.side))
            passes.append(
                {
                    siglip.PATCHES: processing.in_patches(values, self.patch, self.window),
                    siglip.POSITIONS: places,
                }
            )
        return Prepared(tuple(passes), len(places), self.expansion.tokens(len(crops)))


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    text = build_model(files.config).config
    vision = whole.section("vision_config") or ConfigReader({})
    if (kind := vision.text("model_type", "siglip_vision_model")) != "siglip_vision_model":
        raise CheckpointError(f"a vision tower of type {kind!r} is not supported", file=FILE)
    shape = siglip.read_shape(vision)
    sizes = shape.sizes
    places = whole.size("mm_tokens_per_image", 256)
    rows = math.isqrt(places)
    if rows * rows != places or not rows or sizes.patches_per_side % rows:
        per_side = sizes.patches_per_side
        reason = f"mm_tokens_per_image {places} does not divide {per_side} x {per_side} patches"
        raise CheckpointError(reason, file=FILE)
    window = sizes.patches_per_side // rows
    weights = Weights(
        siglip.weights(shape, _TOWER),
        Norm(f"{_PROJECTOR}mm_soft_emb_norm", sizes.width, sizes.eps, offset=1.0),
        Linear(f"{_PROJECTOR}mm_input_projection", sizes.width, text.hidden_size),
    )
    tower = Tower(
        weights,
        _forward(weights, shape, window, text.hidden_size),
        text.hidden_size,
        sizes.num_layers,
        (_TOWER, _PROJECTOR),
        working_bytes(sizes.width, sizes.inner, sizes.heads),
        stacks=_STACKS,
        other_parts=(f"{_TOWER}head.",),
    )
    expansion = Expansion(
        whole.integer("boi_token_index", 255999),
        whole.integer("eoi_token_index", 256000),
        places,
        tuple(encode("\n\n")),
        encode,
    )
    filler = whole.integer("image_token_index", 262144)
    prepare = _preparation(files, sizes.side, sizes.patch, window, expansion)
    return Vision(tower, prepare, filler if 0 <= filler < text.vocab_size else 0, longest_run=places)


def _forward(
    weights: Weights, shape: siglip.Shape, window: int, width: int
) -> Callable[[TowerOps[Tensor]], Sequence[Tensor]]:
    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = ops.pool(siglip.forward(ops, weights.tower, shape), window * window)
        x = ops.linear(ops.rms_norm(x, weights.norm), weights.projection)
        # The decoder multiplies what it looks up.
        return (ops.scale(x, width**-0.5),)

    return forward


def _preparation(files: Files, side: int, patch: int, window: int, expansion: Expansion) -> Preparation:
    """How a checkpoint's processor makes pictures ready. Raises CheckpointError."""
    images = processing.image_settings(files)
    if processing.read_square(images, "size", 224) != side:
        raise CheckpointError(f"pictures of a size other than {side} are not supported", file=images.file)
    rules = processing.read_rules(images, resample=Image.Resampling.BILINEAR, mean=_STANDARD, std=_STANDARD)
    scan = PanAndScan(
        images.size("pan_and_scan_min_crop_size", 256),
        images.size("pan_and_scan_max_num_crops", 4),
        images.number("pan_and_scan_min_ratio_to_activate", 1.2),
    )
    scans = images.flag("do_pan_and_scan", default=False)
    return Preparation(rules, side, patch, window, scan if scans else None, expansion)


FAMILY = Family(hf=("Gemma3ForConditionalGeneration",), build=build, gguf=gemma3_gguf.LAYOUTS)
