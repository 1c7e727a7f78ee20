from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import RopeConfig
from models.ops.rope import DynamicScaling
from tests.models.arch.attentions import Noting
from tests.models.arch.declared import biases, build, tensors


class Turning(Noting):
    """Notes rotations among the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.ropes: set[RopeConfig] = set()

    def rotate(self, x: str, heads: int, rope: RopeConfig) -> str:
        self.normed.append(f"rotation of {heads} heads")
        self.ropes.add(rope)
        return "rotated"


def hunyuan(**said: Any) -> Model:
    return build("HunYuanDenseV1ForCausalLM", **said)


def turned(model: Model) -> Turning:
    ops: Any = Turning()
    model.forward(ops)
    return ops  # type: ignore[no-any-return]


def test_queries_and_keys_are_normed_behind_their_rotation_and_rotated_once():
    ops = turned(hunyuan(num_hidden_layers=1, num_key_value_heads=2))
    layer = "model.layers.0"
    assert ops.normed == [
        f"{layer}.input_layernorm",
        "rotation of 4 heads",
        f"{layer}.self_attn.query_layernorm",
        "rotation of 2 heads",
        f"{layer}.self_attn.key_layernorm",
        f"{layer}.post_attention_layernorm",
        "model.norm",
    ]
    assert [spec.rope for spec in ops.attentions.values()] == [None]


def test_alpha_stretches_the_rope_once_for_all():
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    (rope,) = turned(hunyuan(rope_scaling=scaling, max_position_embeddings=64)).ropes
    assert rope == RopeConfig(4, 10000.0, DynamicScaling(1.0, 64, 1000.0))


def test_the_width_of_a_head_goes_by_two_names():
    for said in ({"attention_head_dim": 6}, {"head_dim": 6}, {"attention_head_dim": 6, "head_dim": 6}):
        assert tensors(hunyuan(**said))["model.layers.0.self_attn.q_proj.weight"] == (4 * 6, 16)


def test_biases_are_the_attentions_and_by_option():
    assert biases(hunyuan(attention_bias=True)) == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert biases(hunyuan()) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"use_qk_norm": False},
        {"use_cla": True},
        {"mlp_bias": True},
        {"use_rotary_pos_emb": False},
        {"attention_head_dim": 6, "head_dim": 8},
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any]):
    with pytest.raises(CheckpointError, match=rf"config\.json: {next(iter(change))}"):
        hunyuan(**change)
