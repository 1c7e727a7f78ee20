"""What a model declares, laid out for comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.arch import Model, build_model, gguf_layout
from models.gguf_metadata import GGUFMetadata
from models.ops import weights_in

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "moe_num_experts": 2,
    "moe_k": 1,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 6,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    # The same in GPT-2's words.
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 3,
    "n_head": 4,
    # And in DistilBERT's.
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 3,
    "n_heads": 4,
}


GATED_DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}

NEMOTRON_H: dict[str, Any] = {
    "hybrid_override_pattern": "M*E",
    "num_key_value_heads": 2,
    "head_dim": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 6,
    "moe_shared_expert_intermediate_size": 10,
}

# A quarter of a head must be a pair or more; heads of keys must divide those of queries.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": GATED_DELTA,
    "Qwen3_5ForCausalLM": GATED_DELTA,
    "Qwen3_5MoeForCausalLM": GATED_DELTA,
    "Qwen2VLForConditionalGeneration": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}},
    "Qwen2_5_VLForConditionalGeneration": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}},
    "StableLmForCausalLM": {"head_dim": 8},
    "Lfm2ForCausalLM": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    "Lfm2MoeForCausalLM": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2},
    "NemotronHForCausalLM": NEMOTRON_H,
    "NemotronH_Nano_Omni_Reasoning_V3": NEMOTRON_H,
    "NemotronH_Omni_Reasoning_V3": NEMOTRON_H,
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_state": 6,
        "shared_intermediate_size": 10,
    },
    "BambaForCausalLM": {"num_key_value_heads": 4, "mamba_n_heads": 4, "mamba_d_state": 6, "head_dim": 4},
    "FalconH1ForCausalLM": {"num_key_value_heads": 4, "mamba_d_ssm": 40, "mamba_n_heads": 4, "mamba_d_state": 6},
    "Llama4ForCausalLM": {"num_key_value_heads": 2},
    "Llama4ForConditionalGeneration": {"num_key_value_heads": 2},
    "LagunaForCausalLM": {"num_key_value_heads": 2},
    "MuseGlimmerForConditionalGeneration": {"num_key_value_heads": 2},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Gemma3nForConditionalGeneration": {"num_kv_shared_layers": 0},
    "Gemma3TextModel": {"use_bidirectional_attention": True},
}


def sizes(architecture: str) -> dict[str, Any]:
    """A small config.json."""
    return SIZES | OWN_SIZES.get(architecture, {}) | {"architectures": [architecture]}


def build(architecture: str, **said: Any) -> Model:
    return build_model(sizes(architecture) | said)


def tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every declared tensor, by name."""
    return dict(tensor for weight in weights_in(model.weights) for tensor in weight.tensors())


def biases(model: Model) -> set[str]:
    """The biases of its second layer."""
    start, end = "model.layers.1.", ".bias"
    return {
        name.removeprefix(start).removesuffix(end) for name in tensors(model) if name.startswith(start) and end in name
    }


def windows(model: Model) -> tuple[int | None, ...]:
    return tuple(state.window for state in model.state)


def gguf_config(
    arch: str, vectors: Mapping[str, list[float]] | None = None, named_tensors: Sequence[str] = (), **said: Any
) -> dict[str, Any]:
    """The config.json of a GGUF file of a small model with this metadata, and with tensors of these names."""
    values = {"embedding_length": 64, "block_count": 6, "attention.head_count": 4, "feed_forward_length": 96}
    values |= {"context_length": 128} | said
    named = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in values.items()}
    shapes = {"token_embd.weight": (11, 64)} | dict.fromkeys(named_tensors, (4, 4))
    metadata = GGUFMetadata(named, shapes, (vectors or {}).get, "m")
    layout = gguf_layout(metadata)
    assert layout is not None
    return layout.config(metadata)
