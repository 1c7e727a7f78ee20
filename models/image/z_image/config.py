"""A Z-Image pipeline's configuration files, read into records."""

from dataclasses import dataclass

from models.checkpoint import Checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, UnsupportedArchitecture
from models.image.autoencoder_config import read_autoencoder_config
from models.image.base import Abilities
from models.image.loading import component_config
from models.image.schedulers import read_scheduler
from models.sources.hf import parse_config

PATCH = 2
"""Latents of a token's side. Checkpoints could carry other embedders; none does."""

TURBO_SHIFT = 3.0
"""The static shift that tells Z-Image-Turbo from Z-Image (6.0), whose files differ in nothing else."""

_FILE = "transformer/config.json"


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """A transformer/config.json."""

    channels: int
    """Of the latents."""
    dim: int
    num_layers: int
    num_refiner_layers: int
    num_heads: int
    norm_eps: float
    qk_norm: bool
    caption_dim: int
    """Of the text encoder's embeddings."""
    theta: float
    time_scale: float
    axes_dims: tuple[int, ...]
    """How many of a head's dimensions turn with each axis: place in the text, row, column."""

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.dim // self.num_heads

    @property
    def time_dim(self) -> int:
        """The width of the time's embedding."""
        return min(self.dim, 256)

    @property
    def mlp_dim(self) -> int:
        """The width of a feed-forward layer."""
        return int(self.dim / 3 * 8)


def read_transformer_config(reader: ConfigReader) -> TransformerConfig:
    """Read transformer/config.json, with diffusers' defaults (ZImageTransformer2DModel, v0.42.1). Thread: any.

    Raises:
        CheckpointError: a value is of the wrong kind or impossible.
        UnsupportedArchitecture: it is another member of the family.
    """
    patches = (reader.sizes("all_patch_size") or (PATCH,), reader.sizes("all_f_patch_size") or (1,))
    if patches != ((PATCH,), (1,)):
        raise UnsupportedArchitecture(f"Z-Image with patches of {patches} is not supported, only of {PATCH} by 1")
    if reader.integer("siglip_feat_dim", 0):
        raise UnsupportedArchitecture("Z-Image Omni (siglip_feat_dim) is not supported")
    dim, heads = reader.size("dim", 3840), reader.size("n_heads", 30)
    if reader.size("n_kv_heads", heads) != heads or dim % heads:
        raise CheckpointError("n_kv_heads must be n_heads, and n_heads divide dim", file=_FILE)
    axes = reader.sizes("axes_dims") or (32, 48, 48)
    if len(axes) != 3 or sum(axes) != dim // heads or any(dims % 2 for dims in axes):
        raise CheckpointError(
            f"axes_dims {list(axes)} must be three even numbers that add up to {dim // heads}", file=_FILE
        )
    return TransformerConfig(
        channels=reader.size("in_channels", 16),
        dim=dim,
        num_layers=reader.size("n_layers", 30),
        num_refiner_layers=reader.size("n_refiner_layers", 2),
        num_heads=heads,
        norm_eps=reader.number("norm_eps", 1e-5),
        qk_norm=reader.flag("qk_norm", default=True),
        caption_dim=reader.size("cap_feat_dim", 2560),
        theta=reader.number("rope_theta", 256.0),
        time_scale=reader.number("t_scale", 1000.0),
        axes_dims=axes,
    )


def size_multiple(checkpoint: Checkpoint) -> int:
    """Pixels to a token's side. Thread: any. Raises CheckpointError."""
    return PATCH * read_autoencoder_config(component_config(checkpoint, "vae")).downscale


def is_turbo(checkpoint: Checkpoint) -> bool:
    """Whether the model was distilled to few steps without guidance. Thread: any. Raises CheckpointError.

    A checkpoint says so nowhere in words, but its scheduler's shift tells; `is_distilled` in model_index.json, where
    there is one, goes before that.
    """
    scheduler = read_scheduler(component_config(checkpoint, "scheduler", "scheduler_config.json"))
    index = ConfigReader(checkpoint.config, "model_index.json")
    return index.flag("is_distilled", default=not scheduler.dynamic and scheduler.shift == TURBO_SHIFT)


def read_abilities(checkpoint: Checkpoint) -> Abilities:
    """What a checkpoint's pipeline does, and its defaults. Thread: any. Raises CheckpointError.

    Both kinds take guidance and a negative prompt, for the arithmetic is the same; with turbo it does no good, so its
    default is none. A generation_config.json beside model_index.json may name other defaults, by diffusers' names.
    """
    turbo, multiple = is_turbo(checkpoint), size_multiple(checkpoint)
    defaults = _generation_config(checkpoint)
    side = component_config(checkpoint, "vae").size("sample_size", 1024)
    return Abilities(
        steps=defaults.size("num_inference_steps", 9 if turbo else 50),
        guidance=defaults.number("guidance_scale", 0.0 if turbo else 5.0),
        takes_guidance=True,
        takes_negative_prompt=True,
        takes_strength=True,
        max_images=1,
        size_multiple=multiple,
        width=_rounded(defaults.size("width", side), multiple),
        height=_rounded(defaults.size("height", side), multiple),
        strength=defaults.number("strength", 0.6),
    )


def _generation_config(checkpoint: Checkpoint) -> ConfigReader:
    raw = checkpoint.read("generation_config.json")
    return ConfigReader({} if raw is None else parse_config(raw, "generation_config.json"), "generation_config.json")


def _rounded(pixels: int, multiple: int) -> int:
    return max(multiple, pixels // multiple * multiple)
