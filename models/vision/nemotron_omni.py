"""The eyes of Nemotron 3 Nano Omni: C-RADIO's tower with tokens of its own in front, squares merged, two matrices.

Source: C-RADIO (arXiv 2312.06709); transformers v5.24 `modeling_radio`, `modeling_nemotron_h_omni` and
`image_processing_nemotron_h_omni` (resizing with Pillow instead, in float32 as well).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.arch import build_model
from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Activation, Attention, Embedding, LayerNorm, Linear, Norm
from models.ops.vision import TowerOps
from models.vision import corners, processing, vit
from models.vision.base import PLACE, Encode, Family, Files, Given, Pixels, Prepared, Tower, Vision
from models.vision.processing import Floats, PixelRules
from models.vision.projector import working_bytes

_PREFIX = "vision_model.radio_model.model."
_GENERATOR = f"{_PREFIX}patch_generator."
_STACKS = (
    Stack(r"(?:model\.)?(.*)\.pos_embed", ("{0}.pos_embed.weight",), flat=True, whole=True),
    Stack(r"(?:model\.)?(.*)\.cls_token\.token", ("{0}.cls_token.weight",), whole=True),
)
_OTHERS = (
    "vision_model.radio_model.input_conditioner.",
    "vision_model.radio_model.summary_idxs",
    f"{_GENERATOR}video_embedder.",
)
"""What films need, and what the processor does."""
_PATCHES, _OWN, _IS_OWN, _KEPT = "patches", "own", "is_own", "kept"
_NAMES = vit.Names(("norm1", "norm2"), ("attn.qkv",), "attn.proj", ("mlp.fc1", "mlp.fc2"))
_EPS = 1e-5
_RESERVED = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the tower and of what is behind it."""

    patches: Linear
    own: Embedding
    """Tokens in front of the patches."""
    positions: Embedding
    """A square of them, row by row."""
    layers: tuple[vit.Layer, ...]
    norm_behind: LayerNorm | None
    norm: Norm
    linear_1: Linear
    linear_2: Linear


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a tower."""

    width: int
    inner: int
    heads: int
    num_layers: int
    patch: int
    side: int
    """Of the square of positions."""
    own: int
    """Tokens in front of the patches."""
    merge: int
    """Patches along the side of what becomes one row."""
    eps: float
    activation: Activation

    @property
    def attention(self) -> Attention:
        """Of every layer."""
        return vit.attention_of(self.width, self.heads)


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    shape = _read_shape(whole)
    text = build_model(files.config).config
    decoder = whole.section("text_config") or whole.section("llm_config") or ConfigReader({})
    normed = decoder.integer("num_nextn_predict_layers", 0) > 0
    weights = _weights(whole, shape, text.hidden_size, normed=normed)

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = _tower(ops, weights, shape)
        if weights.norm_behind is not None:
            x = ops.layer_norm(x, weights.norm_behind)
        x = ops.rms_norm(ops.fold(x, shape.merge**2), weights.norm)
        return (ops.linear(ops.activate(ops.linear(x, weights.linear_1), "relu2"), weights.linear_2),)

    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        shape.num_layers,
        ("vision_model.", "mlp1.", "vision_projector."),
        working_bytes(shape.width, shape.inner, shape.heads),
        stacks=_STACKS,
        other_parts=_OTHERS,
    )
    prepare = _read_preparation(files, encode, shape)
    filler = whole.integer("image_token_id", whole.integer("img_context_token_id", 0))
    return Vision(tower, prepare, filler if 0 <= filler < text.vocab_size else 0)


def _read_shape(whole: ConfigReader) -> Shape:
    vision = whole.section("vision_config") or ConfigReader({})
    if vision.flag("use_swiglu_ffn", default=False) or not vision.flag("qkv_bias", default=True):
        raise CheckpointError("use_swiglu_ffn and qkv_bias other than the usual are not supported", file=FILE)
    if vision.number("layerscale_value", 1.0) != 1.0:
        raise CheckpointError("layerscale_value other than 1 is not supported", file=FILE)
    width, patch = vision.size("hidden_size", 1280), vision.size("patch_size", 16)
    shape = Shape(
        width=width,
        inner=int(width * vision.number("mlp_ratio", 4.0)),
        heads=vision.size("num_attention_heads", 16),
        num_layers=vision.size("num_hidden_layers", 32),
        patch=patch,
        side=vision.size("max_img_size", 2048) // patch,
        own=vision.size("num_cls_tokens", 3) + vision.integer("num_registers", 7),
        merge=round(1 / whole.number("downsample_ratio", 0.5)),
        eps=vision.number("layer_norm_eps", 1e-6),
        activation=read_activation(vision, "hidden_act"),
    )
    if shape.width % shape.heads:
        raise CheckpointError(f"a width of {shape.width} has no {shape.heads} heads", file=FILE)
    if (said := whole.size("vision_hidden_size", whole.size("vit_hidden_size", 1280))) != width:
        raise CheckpointError(f"vision_hidden_size is {said}, and the tower is {width} wide", file=FILE)
    return shape


def _weights(whole: ConfigReader, shape: Shape, decoder: int, *, normed: bool) -> Weights:
    width = shape.width
    merged, between = width * shape.merge**2, whole.size("projector_hidden_size", 4096)
    return Weights(
        Linear(f"{_GENERATOR}embedder", 3 * shape.patch**2, width),
        Embedding(f"{_GENERATOR}cls_token", shape.own, width),
        Embedding(f"{_GENERATOR}pos_embed", shape.side**2, width),
        tuple(
            vit.layer(f"{_PREFIX}blocks.{number}", _NAMES, width, shape.inner, shape.eps)
            for number in range(shape.num_layers)
        ),
        LayerNorm("vision_projector.vision_final_layernorm", width, shape.eps) if normed else None,
        Norm("mlp1.0", merged, _EPS),
        Linear("mlp1.1", merged, between),
        Linear("mlp1.3", between, decoder),
    )


def _tower(ops: TowerOps[Tensor], w: Weights, shape: Shape) -> Tensor:
    """What the tower makes of a picture's patches. Shapes: returns (T, width)."""
    # The patches of the tokens in front are all zeros, and so are the shares that positions have in them.
    x = ops.linear(ops.given(_PATCHES, w.patches.inputs), w.patches)
    x = ops.add(x, ops.mul(ops.look_up(w.own, _OWN), ops.given(_IS_OWN, 1)))
    x = corners.added(ops, x, w.positions)
    for layer in w.layers:
        x = vit.block(ops, x, layer, shape.attention, shape.activation)
    return ops.take(x, _KEPT)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    shape: Shape
    least: int
    """Patches that a picture has at least,"""
    most: int
    """and at most."""
    begin: int
    end: int
    """The tokens around."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        patch, merge, own = self.shape.patch, self.shape.merge, self.shape.own
        height, width = pixels.shape[:2]
        rows, columns = grid(height, width, self)
        values = self.rules.values(_resized(pixels, rows * patch, columns * patch, self.rules.resample))
        patches = processing.in_patches(values, patch, merge)
        count = len(patches)
        given: Given = {
            _PATCHES: _behind(own, patches),
            _OWN: np.concatenate([np.arange(own), np.zeros(count, np.int64)]),
            _IS_OWN: np.concatenate([np.ones((own, 1), np.float32), np.zeros((count, 1), np.float32)]),
            _KEPT: np.arange(own, own + count),
            **{name: _behind(own, value) for name, value in self._corners(rows, columns).items()},
        }
        places = count // merge**2
        return Prepared((given,), own + count, (self.begin, *(PLACE,) * places, self.end))

    def _corners(self, rows: int, columns: int) -> Given:
        """The four learned positions around each patch, and their shares.

        The square is stretched or shrunk to the longer side; of the other one what is too long is not used. Shapes:
        int64 (T,), float32 (T, 1) each.
        """
        side = self.shape.side
        scale = np.float32(side / max(rows, columns))
        places = processing.places_of(rows, columns, self.shape.merge).astype(np.float32)
        exact = np.maximum((places + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
        return corners.between(exact, side)


def grid(height: int, width: int, rules: Preparation) -> tuple[int, int]:
    """Rows and columns of patches, whole squares of them: the picture's own as far as the limits allow."""
    merge, most, least = rules.shape.merge, rules.most, rules.least
    rows, columns = (round(length / rules.shape.patch + 0.5) for length in (height, width))
    shrunk = min(math.sqrt(most / (rows * columns)), 1.0)
    rows, columns = (math.floor(shrunk * count) for count in (rows, columns))
    if not rows or not columns:
        # A line of pixels, which transformers leaves nothing of.
        rows, columns = (min(max(count, merge), most // merge) for count in (rows, columns))
    if most > least and rows * columns < least:
        grown = math.sqrt(least / (rows * columns))
        rows, columns = math.ceil(grown * rows), math.ceil(grown * columns)
    rows = _whole(rows, columns, merge, most)
    return rows, _whole(columns, rows, merge, most)


def _whole(count: int, other: int, merge: int, most: int) -> int:
    """Patches along one side, made whole squares: more of them if there is room, else fewer."""
    left = count % merge
    if not left:
        return count
    more = count + merge - left
    return more if more * other <= most else max(merge, count - left)


def _resized(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Floats:
    """In float32, so that what overshoots stays. Shapes: uint8 (H, W, 3); returns (height, width, 3)."""
    values = pixels.astype(np.float32)
    if values.shape[:2] == (height, width):
        return values
    channels = [Image.fromarray(np.ascontiguousarray(values[..., channel])) for channel in range(3)]
    return np.stack([np.asarray(each.resize((width, height), resample)) for each in channels], axis=-1)


def _behind(own: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """So many rows of zeros in front. Shapes: values (T, …); returns (own + T, …)."""
    return np.concatenate([np.zeros((own, *values.shape[1:]), values.dtype), values])


def _read_preparation(files: Files, encode: Encode, shape: Shape) -> Preparation:
    images = processing.image_settings(files)
    said = (images.size("patch_size", 16), round(1 / images.number("downsample_ratio", 0.5)))
    if said != (shape.patch, shape.merge):
        raise CheckpointError(f"patch_size and downsample_ratio of {said} are not config.json's", file=images.file)
    least, most = images.size("min_num_patches", 1024), images.integer("max_num_patches", 13312)
    budget = max((images.size("max_model_len", 16384) - _RESERVED) * shape.merge**2, least)
    budget = max(min(budget, most) if most else budget, least)
    # Published files say these in words of their own.
    mean = images.numbers("norm_mean") if images.value("norm_mean") else processing.CLIP_MEAN
    std = images.numbers("norm_std") if images.value("norm_std") else processing.CLIP_STD
    rules = processing.read_rules(images, mean=mean, std=std)
    none = ConfigReader({}, "tokenizer.json")
    begin, end = (processing.one_token(encode, none, name, name) for name in ("<img>", "</img>"))
    return Preparation(rules, shape, least, budget, begin, end)


FAMILY = Family(hf=("NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3"), build=build)
