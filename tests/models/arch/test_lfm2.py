"""LFM2 and LFM2-MoE: which layers are which, how wide their MLPs are, and what is refused."""

from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import KV, Experts, Recurrent, weights_in
from tests.models.arch.declared import build, gguf_config, tensors

CONV, FULL = Recurrent((2, 16)), KV(2, 4, 4)


def lfm2(**said: Any) -> Model:
    return build("Lfm2ForCausalLM", **{"layer_types": None, "block_auto_adjust_ff_dim": False} | said)


def moe(**said: Any) -> Model:
    return build("Lfm2MoeForCausalLM", **said)


def width(model: Model) -> int:
    return tensors(model)["model.layers.0.feed_forward.w1.weight"][0]


def test_layers_attend_by_their_kinds_or_their_numbers_and_all_where_nothing_is_said():
    assert lfm2(layer_types=["conv", "full_attention", "conv"]).state == (CONV, FULL, CONV)
    assert lfm2(full_attn_idxs=[0, 2]).state == (FULL, CONV, FULL)
    assert lfm2(full_attn_idxs=[]).state == (CONV,) * 3
    assert lfm2().state == (FULL,) * 3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"block_auto_adjust_ff_dim": False}, 24),
        ({"block_auto_adjust_ff_dim": False, "block_ff_dim": 40}, 40),
        ({"block_multiple_of": 1}, 16),
        ({"block_multiple_of": 10}, 20),
        ({"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 1}, 20),
        ({"block_ffn_dim_multiplier": None, "block_multiple_of": 10}, 16),
        ({}, 256),
    ],
)
def test_the_mlps_width_is_derived(said: dict[str, Any], expected: int):
    assert width(lfm2(**{"block_auto_adjust_ff_dim": True} | said)) == expected


def test_the_head_is_tied_by_either_word():
    assert "lm_head.weight" not in tensors(lfm2())
    assert "lm_head.weight" in tensors(lfm2(tie_word_embeddings=False))
    assert "lm_head.weight" in tensors(lfm2(tie_embedding=False))


def test_a_convolution_has_biases_and_taps_by_option():
    found = tensors(lfm2(full_attn_idxs=[], conv_bias=True, conv_L_cache=5))
    names = {"conv.weight": (16, 1, 5), "conv.bias": (16,)}
    assert {name: found[f"model.layers.1.conv.conv.{name.partition('.')[2]}"] for name in names} == names
    assert found["model.layers.1.conv.in_proj.bias"] == (48,)
    assert not [name for name in tensors(lfm2(full_attn_idxs=[])) if name.endswith("bias")]


def test_first_layers_are_dense_and_the_others_mixtures_with_a_bias_by_option():
    model = moe(num_dense_layers=1)
    assert [len(each.each) for each in weights_in(model.weights) if isinstance(each, Experts)] == [2, 2]
    assert "model.layers.1.feed_forward.expert_bias" in tensors(model)
    assert "model.layers.1.feed_forward.expert_bias" not in tensors(moe(num_dense_layers=1, use_expert_bias=False))


def test_a_gguf_says_by_tensors_which_layers_attend():
    kinds = ["conv", "full_attention"] * 3
    names = [f"blk.{n}.{'attn_q' if n % 2 else 'shortconv.conv'}.weight" for n in range(6)]
    said = {"shortconv.l_cache": 4, "attention.head_count_kv": [0, 2] * 3}
    config = gguf_config("lfm2", None, names, **said)
    assert config["layer_types"] == kinds
    assert (config["num_key_value_heads"], config["conv_L_cache"], config["conv_bias"]) == (2, 4, False)
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 8}
    config = gguf_config("lfm2moe", None, [*names, "blk.4.exp_probs_b.bias"], **said | experts)
    assert (config["norm_topk_prob"], config["routed_scaling_factor"], config["use_expert_bias"]) == (True, 1.0, True)
    with pytest.raises(CheckpointError, match="layer 5 is of no known kind"):
        gguf_config("lfm2", None, names[:5], **said)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["conv"]}, "layer_types"),
        ({"layer_types": ["conv", "conv", "linear_attention"]}, "layer_types"),
        ({"block_use_swiglu": False}, "block_use_swiglu false"),
        ({"use_pos_enc": False}, "use_pos_enc false"),
        ({"conv_L_cache": 0}, "conv_L_cache"),
        ({"block_auto_adjust_ff_dim": True, "block_multiple_of": 0}, "block_multiple_of"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        lfm2(**{"full_attn_idxs": []} | change)
