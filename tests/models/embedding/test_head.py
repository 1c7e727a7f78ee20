"""Pooling, dense layers, cutting and normalising, against their formulas."""

import math

import numpy as np
import pytest

from models.embedding import POOLINGS, EmbeddingModel, EmbeddingSettings, NotFinite
from models.embedding.head import DenseLayer, Head, pooled

HIDDEN = np.array([[1, -2, 3], [4, 5, -6], [7, 8, 9]], np.float32)
FORMULAS = {
    "cls": HIDDEN[0],
    "last": HIDDEN[2],
    "max": [7, 8, 9],
    "mean": HIDDEN.mean(0),
    "mean_sqrt_len": HIDDEN.sum(0) / math.sqrt(3),
    "weightedmean": (HIDDEN[0] + 2 * HIDDEN[1] + 3 * HIDDEN[2]) / 6,
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_pooling_is_its_formula(pooling):
    made = pooled(HIDDEN, pooling)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, FORMULAS[pooling], rtol=1e-6)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("identity", lambda x: x),
        ("tanh", math.tanh),
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
    ],
)
def test_a_dense_layer_is_a_product_a_bias_and_an_activation(activation, function):
    weight, bias = np.array([[1, 0, -1], [0.5, 1, 0]], np.float32), np.array([0.25, -3], np.float32)
    made = DenseLayer(weight, bias, activation)(HIDDEN[0])
    np.testing.assert_allclose(made, [function(value) for value in (1 - 3 + 0.25, 0.5 - 2 - 3)], rtol=1e-6)


def test_a_vector_is_cut_before_it_is_normalised():
    head = Head(EmbeddingSettings("last", 3, normalize=True))
    np.testing.assert_allclose(head.vector(HIDDEN, 2), np.array([7, 8]) / math.hypot(7, 8), rtol=1e-6)
    short = Head(EmbeddingSettings("last", 3, normalize=False, default_width=1))
    assert short.vector(HIDDEN, None).tolist() == [7]
    assert short.vector(HIDDEN, 3).tolist() == [7, 8, 9]


def test_a_vector_of_zeros_stays_one():
    head = Head(EmbeddingSettings("mean", 3, normalize=True))
    assert head.vector(np.zeros((2, 3), np.float32), None).tolist() == [0, 0, 0]


class Known:
    """An embedder whose hidden states are known."""

    def __init__(self, *hidden):
        self.made = [np.array(each, np.float32) for each in hidden]

    def hidden(self, texts):
        return self.made


def test_a_vector_that_is_not_finite_is_told_beside_the_others():
    model = EmbeddingModel(Known([[1, 2]], [[np.nan, 1]], [[np.inf, 1]]), Head(EmbeddingSettings("cls", 2, False)))
    fine, nan, infinite = model.embed([[1]] * 3, [None] * 3)
    assert fine.tolist() == [1.0, 2.0]
    assert isinstance(nan, NotFinite)
    assert isinstance(infinite, NotFinite)
