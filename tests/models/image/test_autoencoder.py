import mlx.core as mx
import numpy as np
import pytest

from models.image import autoencoder as module
from models.image import autoencoder_blocks, gemm
from models.image.autoencoder import Autoencoder, to_pixels
from models.image.autoencoder_blocks import Attention
from models.image.autoencoder_config import AutoencoderConfig
from models.image.tiling import Tiling

CONFIG = AutoencoderConfig(
    block_out_channels=(4, 8),
    decoder_block_out_channels=(8, 4),
    layers_per_block=1,
    latent_channels=3,
    norm_num_groups=2,
    scaling_factor=0.5,
    shift_factor=0.25,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=True,
)


def test_a_picture_is_rounded_to_bytes():
    values = mx.array([[[[-2.0, -1.0, 0.0], [0.003, 1.0, 7.0]]]])
    np.testing.assert_array_equal(to_pixels(values), [[[0, 0, 128], [128, 255, 255]]])


def test_scaling_is_undone():
    made = Autoencoder(CONFIG)
    latents = mx.random.normal((1, 4, 5, 3), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(made.unscaled(latents)), np.array(latents) / 0.5 + 0.25, atol=1e-6)
    np.testing.assert_allclose(np.array(made.scaled(made.unscaled(latents))), np.array(latents), atol=1e-6)


@pytest.mark.parametrize("on_host", [False, True])
def test_a_decode_that_is_given_up_leaves_the_next_one_as_it_was(on_host: bool):
    made = Autoencoder(CONFIG, Tiling(1))
    made.prepare(on_host=on_host)
    latents = mx.random.normal((1, 6, 5, 3), key=mx.random.key(1))
    first = np.array(made.decode(latents))
    steps = made.decode_steps(latents)
    assert next(steps) is None
    assert next(steps) is None
    del steps
    np.testing.assert_array_equal(np.array(made.decode(latents)), first)


def test_without_a_fast_blas_the_graph_computes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "host_gemm", lambda: None)
    made = Autoencoder(CONFIG)
    made.prepare(on_host=True)
    assert not made.on_host
    assert made.decode(mx.zeros((1, 4, 5, 3))).shape == (1, 8, 10, 3)


def test_a_cpu_with_a_fast_blas_computes_on_the_host():
    made = Autoencoder(CONFIG)
    made.prepare()
    assert made.on_host == (mx.default_device() == mx.Device(mx.cpu) and gemm.host_gemm() is not None)


def test_the_hosts_weights_are_held_once():
    made = Autoencoder(CONFIG)
    mx.eval(made.parameters())
    before = sum(array.nbytes for _, array in _arrays(made))
    made.prepare(on_host=True)
    assert before > 0
    assert sum(array.nbytes for _, array in _arrays(made)) < before / 4


def _arrays(model: Autoencoder) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_attention_in_parts_is_attention(monkeypatch: pytest.MonkeyPatch):
    made = Attention(8, 2)
    x = mx.random.normal((1, 5, 4, 8), key=mx.random.key(2))
    whole = np.array(made(x))
    monkeypatch.setattr(autoencoder_blocks, "SCORES", 60)
    np.testing.assert_allclose(np.array(made(x)), whole, atol=1e-5)
