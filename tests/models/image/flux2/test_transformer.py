"""The two forms of FLUX.2's transformer: which one computes, in which type, and what both leave alone."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from models.checkpoint import open_checkpoint
from models.image.base import LoadChoices
from models.image.flux2.blocks import Conditions
from models.image.flux2.config import transformer_config
from models.image.flux2.transformer import Grid, Transformer, rotations
from models.image.loading import load_component

FOLDER = Path(__file__).parents[3] / "parity_image" / "flux2_klein"
GRID: Grid = (4, 4)
SIGMA = float(np.float32(0.6))


@pytest.fixture
def transformer() -> Transformer:
    checkpoint = open_checkpoint(str(FOLDER), FOLDER)
    transformer = Transformer(transformer_config(checkpoint))
    load_component(transformer, checkpoint, "transformer", LoadChoices())
    return transformer


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "goldens.npz") as file:
        return dict(file)


def conditions_of(transformer: Transformer, goldens: dict[str, np.ndarray]) -> Conditions:
    (conditions,) = transformer.condition([mx.array(goldens["forward.text"])], [], GRID)
    return conditions


def error(transformer: Transformer, goldens: dict[str, np.ndarray]) -> float:
    """The mean difference from the reference's answer, of the answer's own size."""
    conditions = conditions_of(transformer, goldens)
    tokens = mx.array(goldens["forward.square.tokens"])
    output = np.array(transformer(tokens, transformer.modulations(SIGMA), conditions))
    assert output.dtype == np.float32
    reference = goldens["forward.square.output"]
    return float(np.abs(output - reference).mean() / np.abs(reference).mean())


@pytest.mark.parametrize(("dtype", "bound"), [(mx.bfloat16, 0.05), (mx.float16, 0.01)])
def test_weights_of_half_precision_compute_as_they_are(transformer, goldens, dtype, bound):
    transformer.update(tree_map(lambda array: array.astype(dtype), transformer.parameters()))
    transformer.prepare()
    conditions = conditions_of(transformer, goldens)
    assert (transformer.dtype, conditions.text.dtype, conditions.rotations.dtype) == (dtype, dtype, mx.complex64)
    assert 0 < error(transformer, goldens) < bound


def test_quantised_weights_stay_and_say_nearly_the_same(transformer, goldens):
    nn.quantize(
        transformer, 32, 8, class_predicate=lambda _, layer: "weight" in layer and layer.weight.shape[-1] % 32 == 0
    )
    transformer.prepare()
    assert isinstance(transformer.single_transformer_blocks[0].attn.to_out, nn.QuantizedLinear)
    assert 0 < error(transformer, goldens) < 0.05


def test_the_form_for_a_cpu_takes_the_blocks_weights_over(transformer, goldens):
    transformer.prepare()
    assert transformer.dtype == mx.float32
    assert not [name for name, _ in tree_flatten(transformer.parameters()) if "transformer_blocks" in name]
    assert error(transformer, goldens) < 1e-4


@pytest.mark.parametrize("prepared", [False, True])
def test_a_pass_changes_nothing_of_what_it_was_given(transformer, goldens, prepared):
    if prepared:
        transformer.prepare()
    tokens = mx.array(goldens["forward.references.tokens"])
    references = [(tokens[12:18], (2, 3)), (tokens[18:], (4, 2))]
    (conditions,) = transformer.condition([mx.array(goldens["forward.text"])], references, (3, 4))
    modulations = transformer.modulations(SIGMA)
    first = np.array(transformer(tokens[:12], modulations, conditions))
    before = [np.array(array) for array in (*conditions.arrays(), tokens, modulations.picture, modulations.single)]
    np.testing.assert_array_equal(np.array(transformer(tokens[:12], modulations, conditions)), first)
    after = [np.array(array) for array in (*conditions.arrays(), tokens, modulations.picture, modulations.single)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_picture_has_a_place_of_its_own_on_the_first_axis(transformer):
    turns = np.array(rotations(transformer.config, 3, [(1, 2), (1, 1), (1, 1)]))[:, 0]
    assert turns.shape == (7, 8)
    angles = np.angle(turns[:, ::2])
    # The first frequency of each axis turns by one radian a place: reference, row, column, place in the text.
    np.testing.assert_allclose(angles[:3], [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(angles[3:5], [[0, 0, 0, 0], [0, 0, 1, 0]], atol=1e-6)
    places = np.exp(1j * np.array([10, 20]))
    np.testing.assert_allclose(turns[5:, 0], places, atol=1e-6)


@pytest.mark.parametrize("prepared", [False, True])
def test_the_working_space_grows_faster_than_the_sequence_only_without_blocks_of_scores(transformer, prepared):
    if prepared:
        transformer.prepare()
    one, three = (transformer.working_bytes([512, 4096, *[4096] * references], texts=1) for references in (0, 2))
    assert one < three
    assert (three < 3 * one) == prepared
