from typing import Any

from models.llm.llama import ARCHITECTURE

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_llama_and_mistral_are_one_architecture():
    assert set(ARCHITECTURE.hf) == {"LlamaForCausalLM", "MistralForCausalLM"}
    assert "llama" in ARCHITECTURE.gguf


def test_the_attentions_bias_is_on_all_its_projections():
    config = ARCHITECTURE.config(SIZES | {"attention_bias": True})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, False)


def test_the_mlps_bias_is_its_own():
    config = ARCHITECTURE.config(SIZES | {"mlp_bias": True})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, True)


MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"]}


def test_a_mistrals_window_is_every_layers():
    assert ARCHITECTURE.config(MISTRAL | {"sliding_window": 8}).windows == (8, 8)


def test_a_mistrals_window_that_is_null_is_none():
    assert ARCHITECTURE.config(MISTRAL | {"sliding_window": None}).windows == ()


def test_a_llama_has_no_window_whatever_its_configuration_carries():
    assert ARCHITECTURE.config(SIZES | {"architectures": ["LlamaForCausalLM"], "sliding_window": 8}).windows == ()
