"""Gemma 4 of the kind without a tower: what a square of pixels says is a product and three norms.

Where a text model's pictures look both ways they do so in all of its layers. (Where a picture is longer than a window,
transformers masks it in one way for a static cache and in another for all else; here the window is kept.)

Source: transformers v5.24 `modeling_gemma4_unified` and `image_processing_gemma4_unified`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.arch import build_model
from models.arch.base import Stack, Tensor
from models.arch.encoder_blocks import FILE
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Embedding, LayerNorm, Linear, Norm
from models.ops.vision import TowerOps
from models.vision import gemma4, processing
from models.vision.base import PLACE, Encode, Family, Files, Given, PictureError, Pixels, Prepared, Tower, Vision
from models.vision.processing import PixelRules
from models.vision.projector import working_bytes

_PREFIX, _BEHIND = "vision_embedder.", "embed_vision."
_STACKS = (
    # As transformers names its modules, which published checkpoints do not.
    Stack(rf"(.*){_BEHIND}multimodal_embedder\.(.*)", (_BEHIND + "{1}",), whole=True),
    Stack(r"(.*)\.pos_embedding", (f"{_PREFIX}pos_embedding.weight",), flat=True, whole=True),
    Stack(rf"(.*){_BEHIND}((?:patch_|pos_norm).*)", (_PREFIX + "{1}",), whole=True),
)
_PATCHES, _COLUMNS, _ROWS = "patches", "columns", "rows"
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Weights:
    """All of it."""

    norm_before: LayerNorm
    patches: Linear
    norm_behind: LayerNorm
    positions: Embedding
    """Of each number the row of a column, and behind it that of a row."""
    norm: LayerNorm
    norm_of_rows: Norm
    projection: Linear


@dataclass(frozen=True, slots=True)
class Preparation:
    """How pictures are made ready. Thread: any."""

    rules: PixelRules
    side: int
    """Pixels of a place's side."""
    positions: int
    budget: int
    """Rows that a picture has at most."""
    begin: int
    end: int
    """The tokens around."""

    def __call__(self, pixels: Pixels) -> Prepared:
        """See `Vision.prepare`."""
        height, width = pixels.shape[:2]
        rows, columns = gemma4.places_within(self.budget, self.side, height, width)
        if max(rows, columns) > self.positions:
            raise PictureError("the picture is too long for its width: the model has no positions for it")
        values = self.rules.values(self.rules.resized(pixels, rows * self.side, columns * self.side))
        places = processing.places_of(rows, columns)
        given: Given = {
            _PATCHES: processing.in_patches(values, self.side, channels_last=True),
            _COLUMNS: 2 * places[:, 1],
            _ROWS: 2 * places[:, 0] + 1,
        }
        count = rows * columns
        return Prepared((given,), count, (self.begin, *(PLACE,) * count, self.end))


def build(files: Files, encode: Encode) -> Vision:  # noqa: ARG001 - config.json has all tokens
    """See `Family.build`."""
    whole = ConfigReader(files.config)
    vision = whole.section("vision_config") or ConfigReader({})
    decoder = whole.section("text_config") or ConfigReader({})
    text = build_model(files.config).config
    patch, window = vision.size("patch_size", 16), vision.size("pooling_kernel_size", 3)
    weights = _weights(vision, patch * window, text.hidden_size)

    def forward(ops: TowerOps[Tensor]) -> Sequence[Tensor]:
        x = ops.layer_norm(ops.given(_PATCHES, weights.patches.inputs), weights.norm_before)
        x = ops.layer_norm(ops.linear(x, weights.patches), weights.norm_behind)
        places = ops.add(ops.look_up(weights.positions, _COLUMNS), ops.look_up(weights.positions, _ROWS))
        x = ops.rms_norm(ops.layer_norm(ops.add(x, places), weights.norm), weights.norm_of_rows)
        # The decoder multiplies embeddings by this, and pictures' rows not.
        return (ops.scale(ops.linear(x, weights.projection), text.hidden_size**-0.5),)

    width = weights.patches.outputs
    tower = Tower(
        weights,
        forward,
        text.hidden_size,
        1,
        (_PREFIX, _BEHIND),
        working_bytes(max(width, weights.patches.inputs), 0, 0),
        stacks=_STACKS,
    )
    images = processing.image_settings(files)
    budget = gemma4.read_budget(images, patch, window)
    rules, around = gemma4.read_bytes(images), gemma4.tokens_around(whole)
    prepare = Preparation(rules, patch * window, weights.positions.rows // 2, budget, *around)
    both_ways = decoder.text("use_bidirectional_attention", "") == "vision"
    return Vision(tower, prepare, decoder.integer("pad_token_id", 0), budget if both_ways else None)


def _weights(vision: ConfigReader, side: int, decoder: int) -> Weights:
    width, inputs = vision.size("mm_embed_dim", 3840), 3 * side**2
    if (said := vision.size("output_proj_dims", 3840)) != width:
        raise CheckpointError(f"output_proj_dims {said} is not the width {width} of what it is made of", file=FILE)
    return Weights(
        LayerNorm(f"{_PREFIX}patch_ln1", inputs, _EPS),
        Linear(f"{_PREFIX}patch_dense", inputs, width, bias=True),
        LayerNorm(f"{_PREFIX}patch_ln2", width, _EPS),
        Embedding(f"{_PREFIX}pos_embedding", 2 * vision.size("mm_posemb_size", 1120), width),
        LayerNorm(f"{_PREFIX}pos_norm", width, _EPS),
        Norm("", width, vision.number("rms_norm_eps", 1e-6)),
        Linear(f"{_BEHIND}embedding_projection", width, decoder),
    )


FAMILY = Family(hf=("Gemma4UnifiedForConditionalGeneration",), build=build)
