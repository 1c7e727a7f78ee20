"""The two forms of the transformer beside each other, where the parity tests' configuration does not lead."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map_with_path

from models.image.z_image.config import TransformerConfig
from models.image.z_image.host_blocks import HostStack
from models.image.z_image.transformer import Side, Transformer

CONFIG = TransformerConfig(
    channels=4,
    dim=96,
    num_layers=2,
    num_refiner_layers=1,
    num_heads=3,
    norm_eps=1e-5,
    qk_norm=True,
    caption_dim=24,
    theta=256.0,
    time_scale=1000.0,
    axes_dims=(8, 12, 12),
)


def transformer(config: TransformerConfig = CONFIG, gain: float = 1.0) -> Transformer:
    """The same random weights for the same configuration."""
    rng = np.random.default_rng(5)

    def random(path: str, old: mx.array) -> mx.array:
        centre, spread = (1.0, 0.3) if "norm" in path else (0.0, gain * old.shape[-1] ** -0.5)
        return mx.array(rng.normal(centre, spread, old.shape).astype(np.float32))

    model = Transformer(config)
    model.update(tree_map_with_path(random, model.parameters()))
    return model


def velocity(model: Transformer, height: int, width: int, tokens: int = 7, t: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(6)
    latents, caption = (
        mx.array(rng.normal(size=shape).astype(np.float32)) for shape in ((height, width, 4), (tokens, 24))
    )
    (found,) = model(latents, t, [Side(model.condition(caption, height, width))])
    return np.array(found.astype(mx.float32))


@pytest.mark.parametrize(
    ("config", "gain"),
    [
        pytest.param(CONFIG, 1.0, id="as it is"),
        pytest.param(replace(CONFIG, qk_norm=False), 1.0, id="no norm of queries and keys"),
        pytest.param(replace(CONFIG, qk_norm=False), 4.0, id="scores in the hundreds"),
        pytest.param(CONFIG, 30.0, id="activations in the thousands"),
    ],
)
# Attention goes by groups of queries and element-wise work by groups of rows: fewer, and more than one of each.
@pytest.mark.parametrize("size", [(2, 2), (6, 10), (34, 40)])
def test_both_forms_predict_the_same(config: TransformerConfig, gain: float, size: tuple[int, int]):
    expected = velocity(transformer(config, gain), *size)
    host = transformer(config, gain)
    host.prepare(on_host=True)
    assert isinstance(host.stacks.joint, HostStack)
    found = velocity(host, *size)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_the_host_form_takes_the_weights_away():
    model = transformer()
    model.prepare(on_host=True)
    assert model.layers == model.noise_refiner == model.context_refiner == []


def test_the_host_form_changes_nothing_that_it_is_lent():
    model = transformer()
    model.prepare(on_host=True)
    first = velocity(model, 8, 8)
    np.testing.assert_array_equal(velocity(model, 8, 8), first)


def is_wide(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % 32 == 0


def test_quantised_weights_stay_and_compute_in_the_plain_form():
    expected = velocity(transformer(), 6, 6)
    model = transformer()
    nn.quantize(model, group_size=32, bits=8, class_predicate=is_wide)
    model.prepare()
    assert not isinstance(model.stacks.joint, HostStack)
    found = velocity(model, 6, 6)
    assert 0 < np.abs(found - expected).mean() < 0.02 * np.abs(expected).mean() + 0.02


def test_time_and_caption_and_place_all_count():
    model = transformer()
    plain = velocity(model, 6, 4)
    assert np.abs(velocity(model, 6, 4, t=0.6) - plain).max() > 0.01
    assert np.abs(velocity(model, 6, 4, tokens=8) - plain).max() > 0.001
    assert np.abs(velocity(model, 4, 6).reshape(plain.shape) - plain).max() > 0.01


@pytest.mark.parametrize("on_host", [False, True])
def test_what_a_step_takes_grows_with_the_picture_and_the_caption(on_host: bool):
    model = transformer()
    model.prepare(on_host=on_host)
    small, wide, wordy = (model.working_bytes(*sizes) for sizes in ((32, 32, 20), (32, 64, 20), (32, 32, 200)))
    assert small < wordy < wide


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("lengths", [(7, 20), (7, 40)])
def test_two_sides_at_once_are_two_sides_by_themselves(on_host: bool, lengths: tuple[int, int]):
    """Whether or not their captions are filled up to the same length."""
    model = transformer()
    model.prepare(on_host=on_host)
    rng = np.random.default_rng(8)
    latents, *captions = (
        mx.array(rng.normal(size=shape).astype(np.float32)) for shape in ((4, 10, 4), *((n, 24) for n in lengths))
    )
    sides = [Side(model.condition(caption, 4, 10)) for caption in captions]
    for together, side in zip(model(latents, 0.4, sides), sides, strict=True):
        (alone,) = model(latents, 0.4, [side])
        np.testing.assert_array_equal(np.array(together), np.array(alone))


def test_half_precision_stays_and_computes_in_the_plain_form():
    expected = velocity(transformer(), 6, 6)
    model = transformer()
    model.set_dtype(mx.bfloat16)
    model.prepare()
    assert not isinstance(model.stacks.joint, HostStack)
    (found,) = model(mx.zeros((4, 4, 4)), 0.4, [Side(model.condition(mx.zeros((7, 24)), 4, 4))])
    assert found.dtype == mx.bfloat16
    difference = np.abs(velocity(model, 6, 6) - expected).mean()
    assert 0 < difference < 0.05 * np.abs(expected).mean()
