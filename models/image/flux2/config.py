"""A FLUX.2 klein pipeline's configuration files, read into records."""

from dataclasses import dataclass

from models.checkpoint import Checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, UnsupportedArchitecture
from models.image.loading import component_config

_FILE = "transformer/config.json"


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """A transformer/config.json."""

    channels: int
    """Of a token: the latents' channels times the four latents of a patch."""
    num_double_layers: int
    num_single_layers: int
    num_heads: int
    head_dim: int
    text_dim: int
    """Of a text embedding: the hidden sizes of all layers it is made of."""
    time_dim: int
    mlp_dim: int
    axes_dims: tuple[int, ...]
    """How many of a head's dimensions turn with each axis: reference, row, column, place in the text."""
    theta: float
    eps: float

    @property
    def dim(self) -> int:
        """The width of the residual streams."""
        return self.num_heads * self.head_dim


def read_transformer_config(reader: ConfigReader) -> TransformerConfig:
    """Read transformer/config.json, with diffusers' defaults (Flux2Transformer2DModel, v0.42.1). Thread: any.

    Raises:
        CheckpointError: a value is of the wrong kind or impossible.
        UnsupportedArchitecture: it is another member of the FLUX.2 family.
    """
    if reader.flag("guidance_embeds", default=True):
        raise UnsupportedArchitecture("a FLUX.2 transformer with guidance_embeds is not klein, and is not supported")
    if reader.size("patch_size", 1) != 1:
        raise UnsupportedArchitecture("FLUX.2 is supported with patch_size 1 only: its autoencoder makes the patches")
    heads, head_dim, channels = (
        reader.size("num_attention_heads", 48),
        reader.size("attention_head_dim", 128),
        reader.size("in_channels", 128),
    )
    if reader.size("out_channels", channels) != channels:
        raise UnsupportedArchitecture("FLUX.2 with out_channels other than in_channels is not supported")
    axes = reader.sizes("axes_dims_rope") or (32, 32, 32, 32)
    if len(axes) != 4 or sum(axes) != head_dim or any(dims % 2 for dims in axes):
        raise CheckpointError(
            f"axes_dims_rope {list(axes)} must be four even numbers that add up to {head_dim}", file=_FILE
        )
    time_dim = reader.size("timestep_guidance_channels", 256)
    if time_dim % 2:
        raise CheckpointError(f"timestep_guidance_channels must be even, not {time_dim}", file=_FILE)
    return TransformerConfig(
        channels=channels,
        num_double_layers=reader.size("num_layers", 8),
        num_single_layers=reader.size("num_single_layers", 48),
        num_heads=heads,
        head_dim=head_dim,
        text_dim=reader.size("joint_attention_dim", 15360),
        time_dim=time_dim,
        mlp_dim=int(heads * head_dim * reader.number("mlp_ratio", 3.0)),
        axes_dims=axes,
        theta=reader.number("rope_theta", 2000.0),
        eps=reader.number("eps", 1e-6),
    )


def is_distilled(checkpoint: Checkpoint) -> bool:
    """Whether the model was distilled to few steps without guidance. Thread: any.

    Ollama's manifests keep no `is_distilled`, and its library has the distilled models alone; in a diffusers folder an
    absent value means the base model.

    Raises:
        CheckpointError: the value is neither true nor false.
    """
    reader = ConfigReader(checkpoint.config, "model_index.json")
    return reader.flag("is_distilled", default=not reader.text("_class_name", ""))


def transformer_config(checkpoint: Checkpoint) -> TransformerConfig:
    """The transformer's configuration of a pipeline. Thread: any. Raises as `read_transformer_config`."""
    return read_transformer_config(component_config(checkpoint, "transformer"))
