"""What tells one autoencoder from another, read from its config.json."""

from dataclasses import dataclass

from models.config_reader import ConfigReader
from models.errors import CheckpointError, UnsupportedArchitecture


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """Everything that tells one of these autoencoders from another."""

    block_out_channels: tuple[int, ...]
    """The encoder's channels, from the full size down; every block but the last halves width and height."""
    decoder_block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @property
    def downscale(self) -> int:
        """Pixels of a side to one of the encoder's output."""
        return 1 << (len(self.block_out_channels) - 1)


def read_autoencoder_config(reader: ConfigReader) -> AutoencoderConfig:
    """Read vae/config.json, with diffusers' defaults. Thread: any.

    Raises:
        CheckpointError: a value is missing or impossible.
        UnsupportedArchitecture: blocks or an activation that these autoencoders do not have.
    """
    known = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, name in known.items():
        for kind in reader.texts(key) or ():
            if kind != name:
                raise UnsupportedArchitecture(f"the autoencoder has a block {kind!r} in {key}; only {name} is known")
    if (activation := reader.text("act_fn", "silu")) not in {"silu", "swish"}:
        raise UnsupportedArchitecture(f"the autoencoder's activation is {activation!r}; only silu is known")
    channels = reader.sizes("block_out_channels") or (64,)
    config = AutoencoderConfig(
        block_out_channels=channels,
        decoder_block_out_channels=reader.sizes("decoder_block_out_channels") or channels,
        layers_per_block=reader.size("layers_per_block", 1),
        latent_channels=reader.size("latent_channels", 4),
        norm_num_groups=reader.size("norm_num_groups", 32),
        scaling_factor=reader.number("scaling_factor", 0.18215),
        shift_factor=reader.number("shift_factor", 0.0),
        use_quant_conv=reader.flag("use_quant_conv", default=True),
        use_post_quant_conv=reader.flag("use_post_quant_conv", default=True),
        mid_block_add_attention=reader.flag("mid_block_add_attention", default=True),
    )
    for width in config.block_out_channels + config.decoder_block_out_channels:
        if width % config.norm_num_groups:
            raise CheckpointError(
                f"{width} channels cannot be split into {config.norm_num_groups} groups (norm_num_groups)",
                file="vae/config.json",
            )
    return config
