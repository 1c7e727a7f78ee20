from dataclasses import replace

import pytest

from models.image.autoencoder_config import AutoencoderConfig
from models.image.autoencoder_memory import peak_bytes
from models.image.tiling import Tiling

WIDTHS = (128, 256, 512, 512)
FLUX = AutoencoderConfig(
    block_out_channels=WIDTHS,
    decoder_block_out_channels=WIDTHS,
    layers_per_block=2,
    latent_channels=16,
    norm_num_groups=32,
    scaling_factor=1.0,
    shift_factor=0.0,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=True,
)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("side", "pixels", "measured"),
    [(0, 256, 194), (0, 512, 585), (32, 512, 311), (64, 1024, 970)],
)
def test_the_prediction_is_near_what_a_process_was_measured_to_take(side: int, pixels: int, measured: int):
    """MiB of resident memory beyond that after loading, two threads on the host."""
    predicted = peak_bytes(FLUX, Tiling(side), pixels, pixels, on_host=True) / MIB
    assert measured <= predicted < 1.25 * measured


@pytest.mark.parametrize("on_host", [False, True])
def test_strips_take_less_than_half(on_host: bool):
    whole, cut = (peak_bytes(FLUX, Tiling(side), 1024, 1024, on_host=on_host) for side in (0, 64))
    assert cut < 0.55 * whole


def test_a_wider_decoder_counts():
    wide = replace(FLUX, decoder_block_out_channels=tuple(2 * width for width in WIDTHS))
    assert peak_bytes(wide, Tiling(0), 512, 512, on_host=True) > 1.9 * peak_bytes(
        FLUX, Tiling(0), 512, 512, on_host=True
    )


def test_a_large_picture_with_few_channels_is_led_by_attention():
    deep = replace(FLUX, block_out_channels=(1, 1, 1, 4096), decoder_block_out_channels=(1, 1, 1, 1))
    assert peak_bytes(deep, Tiling(0), 512, 512, on_host=False) >= 4 * 5 * 64 * 64 * 4096
