"""Nemotron-H: four kinds of layers by either spelling, states of those that have one, and what is refused."""

from typing import Any

import pytest

from models.arch import Model
from models.errors import CheckpointError
from models.ops import KV, Experts, Recurrent, weights_in
from tests.models.arch.declared import build, gguf_config, tensors

SPACE = (Recurrent((3, 32 + 2 * 2 * 6)), Recurrent((4, 8, 6)))
FULL = KV(2, 4, 4)


def nemotron(**said: Any) -> Model:
    return build("NemotronHForCausalLM", **said)


def experts(model: Model) -> Experts:
    return next(weight for weight in weights_in(model.weights) if isinstance(weight, Experts))


@pytest.mark.parametrize(
    "said",
    [
        {"hybrid_override_pattern": "M-*EM"},
        {"layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba"]},
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"]},
        {"layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba"], "hybrid_override_pattern": "***"},
    ],
)
def test_layers_are_told_by_signs_or_words_and_some_remember_nothing(said: dict[str, Any]):
    model = nemotron(**said)
    assert model.config.num_layers == 5
    assert model.state == (*SPACE, FULL, *SPACE)


def test_an_expert_has_no_gate_and_may_work_in_a_narrower_space():
    wide, narrow = nemotron(), nemotron(moe_latent_size=6, mlp_bias=True)
    assert not experts(wide).gated
    assert tensors(wide)["backbone.layers.2.mixer.experts.1.up_proj.weight"] == (8, 16)
    found, name = tensors(narrow), "backbone.layers.2.mixer"
    assert found[f"{name}.experts.1.down_proj.weight"] == (6, 8)
    assert (found[f"{name}.fc1_latent_proj.weight"], found[f"{name}.fc2_latent_proj.bias"]) == ((6, 16), (16,))
    assert f"{name}.experts.1.down_proj.bias" not in found
    assert found[f"{name}.shared_experts.up_proj.bias"] == (10,)


def test_older_words_are_understood():
    model = nemotron(
        head_dim=None, attention_head_dim=6, mamba_n_groups=1, n_groups=None, mamba_d_conv=3, conv_kernel=None
    )
    assert model.state == (Recurrent((2, 32 + 2 * 6)), SPACE[1], KV(2, 6, 6))


def test_what_predicts_further_tokens_is_left_out():
    assert nemotron(num_nextn_predict_layers=1).other_parts == ("mtp.", "layers.3.", "blk.3.")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hybrid_override_pattern": None}, "layers_block_type or hybrid_override_pattern"),
        ({"hybrid_override_pattern": "MX"}, "layers_block_type or hybrid_override_pattern"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu'"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"mlp_hidden_act": "tanh"}, "mlp_hidden_act 'tanh'"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"moe_latent_size": 0}, "moe_latent_size"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        nemotron(**change)


def test_a_gguf_says_by_tensors_which_layers_are_which_and_leaves_the_last_ones_out():
    names = [f"blk.{n}.{name}" for n, name in enumerate(("ssm_in", "attn_q", "ffn_gate_inp", "ffn_up", "ssm_in"))]
    said = {"ssm.time_step_rank": 8, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.conv_kernel": 4}
    said |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 8, "nextn_predict_layers": 1}
    said |= {"expert_shared_feed_forward_length": 12, "attention.head_count_kv": [0, 2, 0, 0, 0, 2]}
    said |= {"feed_forward_length": [0, 0, 8, 0, 0, 8], "moe_latent_size": 6}
    config = gguf_config("nemotron_h_moe", None, [f"{name}.weight" for name in names], **said)
    assert config["layers_block_type"] == ["linear_attention", "full_attention", "moe", "mlp", "linear_attention"]
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 4)
    assert (config["moe_latent_size"], config["n_group"], config["norm_topk_prob"]) == (6, 1, True)
    assert config["num_nextn_predict_layers"] == 1
