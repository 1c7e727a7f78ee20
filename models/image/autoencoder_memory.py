"""What encoding or decoding a picture takes beyond the weights, told from sizes alone. Touches no MLX."""

from collections.abc import Iterator
from dataclasses import dataclass

from models.image.autoencoder_config import AutoencoderConfig
from models.image.tiling import STRIP_FLOATS_PER_LATENT, Tiling

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2

HOST_PLANES = 136
"""Of a kernel for upsampling and one of the usual kind, as they are multiplied on the host: matrices of inputs by
outputs, where the checkpoint has 9."""

HOST_WORKSPACE = 2 * 2 * 100 * 64
"""Numbers for each channel that threads on the host work in: two threads, two buffers, 100 planes of 64 tiles."""

GRAPH_COPIES = 3
"""Copies of what a convolution reads that MLX's graph holds at once: normalised, activated, padded."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """The widest moment of one level: a map is resized, or goes through a residual block."""

    pixels: int
    inputs: int
    outputs: int
    large: bool
    """Whether the level is among those that are taken in strips."""


def peak_bytes(config: AutoencoderConfig, tiling: Tiling, height: int, width: int, *, on_host: bool) -> int:
    """The peak of encoding or decoding so many pixels. Thread: any."""
    scale = config.downscale
    strips = tiling.applies(height // scale, width // scale)
    stages = [
        *_stages(config.decoder_block_out_channels, height * width),
        *_stages(config.block_out_channels, height * width),
    ]
    places = height * width // scale**2
    attention = FLOAT32_BYTES * 5 * places * config.block_out_channels[-1]
    # An eighth more than is counted, for what the allocator cannot use again: as was measured at 256 and 512 pixels.
    return 9 * max(attention, *(_stage_bytes(stage, tiling, strips=strips, on_host=on_host) for stage in stages)) // 8


def _stages(channels: tuple[int, ...], pixels: int) -> Iterator[_Stage]:
    """From the full size down, whichever way the maps go."""
    for level, outputs in enumerate(channels):
        inputs = channels[min(level + 1, len(channels) - 1)]
        yield _Stage(pixels >> 2 * level, inputs, outputs, large=level < len(channels) - len(channels) // 2)


def _stage_bytes(stage: _Stage, tiling: Tiling, *, strips: bool, on_host: bool) -> int:
    kernels = (HOST_PLANES * stage.outputs + HOST_WORKSPACE) * stage.inputs * FLOAT32_BYTES if on_host else 0
    if strips and stage.large:
        # What comes in is a quarter as many pixels; a block's middle and result; a strip, and what is made of it.
        held = stage.pixels * (FLOAT32_BYTES * stage.inputs // 4 + BFLOAT16_BYTES * 2 * stage.outputs)
        strip = FLOAT32_BYTES * min(tiling.side**2 * STRIP_FLOATS_PER_LATENT, stage.pixels * stage.inputs)
        return held + (3 if on_host else 2 + GRAPH_COPIES) * strip + kernels
    copies = 0 if on_host else GRAPH_COPIES
    return FLOAT32_BYTES * stage.pixels * ((1 + copies) * stage.inputs + 2 * stage.outputs) + kernels
