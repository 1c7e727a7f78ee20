"""Mixtures of experts and latent attention: what they declare, and what they refuse by name."""

from typing import Any

import pytest

from models.errors import CheckpointError
from models.ops import KV, Experts, weights_in
from tests.models.arch.declared import build, tensors

DEEPSEEK = {"num_attention_heads": 4, "n_group": 1, "topk_group": 1}


def mixtures(architecture: str, **said: Any) -> list[int]:
    """The experts of each mixture, in the order of layers."""
    model = build(architecture, **said)
    return [len(weight.each) for weight in weights_in(model.weights) if isinstance(weight, Experts)]


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM"])
def test_every_layer_is_a_mixture(architecture: str):
    assert mixtures(architecture) == [2, 2, 2]


def test_a_config_says_which_layers_are_mixtures():
    assert mixtures("Qwen3MoeForCausalLM", decoder_sparse_step=2) == [2]
    assert mixtures("Qwen3MoeForCausalLM", mlp_only_layers=[0, 2]) == [2]
    assert mixtures("Glm4MoeLiteForCausalLM", mlp_layer_types=["sparse", "dense", "dense"]) == [2]
    assert mixtures("Glm4MoeForCausalLM", first_k_dense_replace=2) == [2]
    assert mixtures("Ernie4_5_MoeForCausalLM", moe_layer_end_index=1) == [2]


def test_a_latents_state_is_one_head_that_holds_the_values_too():
    model = build("DeepseekV3ForCausalLM", **DEEPSEEK)
    assert model.state == (KV(1, 6 + 2, 6, values_in_keys=True),) * 3
    assert "model.layers.0.self_attn.kv_b_proj.weight" in tensors(model)
    assert model.other_parts == ("layers.3.",)


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ("GptOssForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func"),
        ("DeepseekV3ForCausalLM", {"n_group": 2}, "groups of two"),
        ("DeepseekV3ForCausalLM", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("MiniMaxM2ForCausalLM", {"scoring_func": "softmax"}, "scoring_func"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv"),
        ("Ernie4_5_MoeForCausalLM", {"use_bias": True}, "use_bias"),
        ("Ernie4_5_MoeForCausalLM", {"moe_norm_min": 0.1}, "moe_norm_min"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(architecture: str, change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        build(architecture, **DEEPSEEK | change)
