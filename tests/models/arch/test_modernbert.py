"""ModernBERT: which layers see a window, and what they rotate by."""

import pytest

from models.errors import CheckpointError
from models.ops import Ops
from tests.models.arch.encoders import build


class Attentions:
    """`Ops` of which only the attentions are noted."""

    def __init__(self) -> None:
        self.specs = []

    def __getattr__(self, name):
        assert hasattr(Ops, name)
        return (lambda _, sizes: (None,) * len(sizes)) if name == "split" else lambda *_: None

    def attention(self, q, k, v, layer, spec):
        self.specs.append(spec)


def specs_of(**changes):
    ops = Attentions()
    build("modernbert", **changes).forward(ops)
    return ops.specs


def test_every_third_layer_sees_everything_by_default():
    specs = specs_of()
    assert [spec.window for spec in specs] == [None, 5, 5, None]
    assert [spec.rope.theta for spec in specs] == [160000, 10000, 10000, 160000]
    assert all(spec.bidirectional for spec in specs)


def test_the_newer_spelling_names_kinds_and_rotations_by_layer():
    kinds = ["sliding_attention", "full_attention"] * 2
    ropes = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 3.0}}
    specs = specs_of(layer_types=kinds, rope_parameters=ropes, local_attention=6)
    assert [(spec.window, spec.rope.theta) for spec in specs] == [(4, 3), (None, 7)] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must name 4 known kinds"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope scaling of kind 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling is not supported"),
        ({"hidden_activation": "mish"}, "hidden_activation 'mish' is not supported"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        build("modernbert", **changes)
