"""Which tensors are quantised: the cases of Ollama's own tests, and the edges of each rule."""

import pytest

from models.errors import QuantizationError
from models.store.policy import check_architectures, language_quant_type, pipeline_quant_type

LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("name", "shape", "requested", "expected"),
    [
        (f"{LAYER}self_attn.q_proj.weight", (64, 64), "int4", "int4"),
        (f"{LAYER}self_attn.v_proj.weight", (64, 64), "int4", "int8"),
        (f"{LAYER}self_attn.k_proj.weight", (64, 64), "nvfp4", "mxfp8"),
        (f"{LAYER}mlp.down_proj.weight", (64, 64), "mxfp4", "mxfp8"),
        (f"{LAYER}mlp.down_proj.weight", (64, 64), "int8", "int8"),
        (f"{LAYER}mlp.down_proj.weight", (64, 64), "mxfp8", "mxfp8"),
        # Eight bits want groups of 32, which 48 columns are not; four do with 16.
        (f"{LAYER}mlp.down_proj.weight", (64, 48), "nvfp4", "nvfp4"),
        (f"{LAYER}mlp.up_proj.weight", (64, 48), "int4", None),
        (f"{LAYER}mlp.up_proj.weight", (64, 96), "int4", None),
        (f"{LAYER}mlp.up_proj.weight", (64, 96), "mxfp8", "mxfp8"),
        (f"{LAYER}mlp.up_proj.weight", (15, 64), "int4", None),
        (f"{LAYER}mlp.up_proj.weight", (16, 64), "int4", "int4"),
        (f"{LAYER}mlp.up_proj.weight", (2, 16, 64), "int4", None),
        (f"{LAYER}mlp.up_proj.bias", (64, 64), "int4", None),
        (f"{LAYER}input_layernorm.weight", (64, 64), "int4", None),
        (f"{LAYER}self_attn.q_norm.weight", (64, 64), "int4", None),
        (f"{LAYER}mlp.gate.weight", (64, 64), "int4", None),
        (f"{LAYER}mlp.gate_proj.weight", (64, 64), "int4", "int4"),
        (f"{LAYER}mlp.shared_expert_gate.weight", (64, 64), "int4", None),
        ("model.embed_tokens.weight", (64, 64), "int4", None),
        ("lm_head.weight", (64, 64), "int4", "int8"),
        ("lm_head.weight", (64, 64), "nvfp4", "mxfp8"),
        ("lm_head.weight", (64, 48), "nvfp4", None),
        ("model.audio_tower.q_proj.weight", (64, 64), "int4", None),
        (f"{LAYER}mlp.experts.up_proj.weight", (8, 64, 64), "int4", "int4"),
        (f"{LAYER}mlp.experts.down_proj.weight", (8, 64, 64), "int4", "int8"),
        (f"{LAYER}mlp.experts.down_proj.weight", (8, 64, 64), "nvfp4", "nvfp4"),
        (f"{LAYER}mlp.experts.gate_up_proj", (8, 64, 64), "mxfp8", "mxfp8"),
        (f"{LAYER}mlp.experts.up_proj.bias", (8, 64), "mxfp8", None),
    ],
)
def test_a_tensor_of_a_language_model(name, shape, requested, expected):
    assert language_quant_type(name, shape, requested) == expected


@pytest.mark.parametrize(
    ("component", "name", "shape", "requested", "expected"),
    [
        ("transformer", "a.to_q.weight", (8, 64), "int4", "int4"),
        ("transformer", "a.to_q.weight", (8, 32), "int4", None),
        ("transformer", "a.to_q.weight", (8, 16), "nvfp4", "nvfp4"),
        ("transformer", "a.to_q.weight", (64,), "nvfp4", None),
        ("transformer", "time_embed.weight", (8, 64), "int4", None),
        ("text_encoder", "a.v_proj.weight", (8, 64), "int4", "int4"),
        ("vae", "a.to_q.weight", (8, 64), "int4", None),
    ],
)
def test_a_tensor_of_a_pipeline(component, name, shape, requested, expected):
    assert pipeline_quant_type(component, name, shape, requested) == expected


@pytest.mark.parametrize("name", ["Gemma4ForCausalLM", "qwen3_5", "Qwen3NextForCausalLM", "NemotronHForCausalLM"])
def test_architectures_that_ollama_treats_by_themselves_are_known(name):
    with pytest.raises(QuantizationError, match=name):
        check_architectures([name])


def test_others_are_treated_alike():
    check_architectures(["LlamaForCausalLM", "Qwen3ForCausalLM", "qwen3", "MistralForCausalLM", "Qwen3MoeForCausalLM"])
