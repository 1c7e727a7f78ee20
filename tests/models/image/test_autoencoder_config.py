import pytest

from models.config_reader import ConfigReader
from models.errors import CheckpointError, UnsupportedArchitecture
from models.image.autoencoder_config import read_autoencoder_config

FLUX = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def test_a_published_configuration_is_read():
    config = read_autoencoder_config(ConfigReader(FLUX | {"down_block_types": ["DownEncoderBlock2D"] * 4}))
    assert config.block_out_channels == config.decoder_block_out_channels == (128, 256, 512, 512)
    assert (config.downscale, config.latent_channels, config.layers_per_block) == (8, 16, 2)
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    assert not config.use_quant_conv
    assert config.mid_block_add_attention


def test_what_is_not_said_is_as_in_diffusers():
    config = read_autoencoder_config(ConfigReader({"shift_factor": None, "block_out_channels": [64]}))
    assert (config.latent_channels, config.norm_num_groups, config.layers_per_block) == (4, 32, 1)
    assert (config.scaling_factor, config.shift_factor) == (0.18215, 0.0)
    assert config.use_quant_conv
    assert config.use_post_quant_conv


def test_a_decoder_may_have_widths_of_its_own():
    config = read_autoencoder_config(ConfigReader(FLUX | {"decoder_block_out_channels": [96, 192, 384, 384]}))
    assert config.decoder_block_out_channels == (96, 192, 384, 384)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D", "SkipUpBlock2D"]}, "SkipUpBlock2D"),
        ({"act_fn": "mish"}, "mish"),
    ],
)
def test_another_kind_of_block_is_refused_by_name(change: dict[str, object], named: str):
    with pytest.raises(UnsupportedArchitecture, match=named):
        read_autoencoder_config(ConfigReader(FLUX | change))


@pytest.mark.parametrize(
    "change",
    [
        {"norm_num_groups": 48},
        {"block_out_channels": [128, 0]},
        {"block_out_channels": 128},
        {"layers_per_block": "two"},
        {"scaling_factor": "big"},
    ],
)
def test_a_value_that_cannot_be_is_refused(change: dict[str, object]):
    with pytest.raises(CheckpointError):
        read_autoencoder_config(ConfigReader(FLUX | change))
