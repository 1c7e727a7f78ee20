"""Phi-3, Phi-3.5 and Phi-4: Llamas whose queries, keys and values are one matrix, and whose gate and up are another.

Source: transformers' `modeling_phi3`; llama.cpp `conversion/phi.py`, Phi3MiniModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata
from models.ops import Joined, Linear

_ORIGINAL_CONTEXT = 4096


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, {"rms_norm_eps": 1e-5, "original_max_position_embeddings": _ORIGINAL_CONTEXT})
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(_with_long_rope(config), dims, blocks.read_windows(config))
    layers = [_layer(dims, index) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs)


def _with_long_rope(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """The first Phi-3 call their LongRoPE `yarn`."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    scaling = dict(ConfigReader(config).mapping(key))
    if "yarn" not in (scaling.get("rope_type"), scaling.get("type")):
        return config
    return {**config, key: {**scaling, "rope_type": "longrope"}}


def _layer(dims: blocks.Dims, index: int) -> blocks.Layer:
    name = f"model.layers.{index}"
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    return blocks.Layer(norm1, fused_attention(dims, name), norm2, fused_mlp(dims, name))


def fused_attention(dims: blocks.Dims, layer: str, *, qkv_bias: bool = False) -> blocks.SelfAttention:
    """Declare an attention whose queries, keys and values are one matrix."""
    attention = blocks.attention(dims, layer)
    qkv = Linear(f"{layer}.self_attn.qkv_proj", dims.hidden_size, sum(attention.qkv.sizes), qkv_bias)
    return replace(attention, qkv=Joined((qkv,), precise=True))


def fused_mlp(dims: blocks.Dims, layer: str) -> blocks.MLP:
    """Declare a gated MLP whose gate and up are one matrix."""
    mlp = blocks.mlp(dims, layer)
    gate_up = Linear(f"{layer}.mlp.gate_up_proj", dims.hidden_size, sum(mlp.gate_up.sizes))
    return replace(mlp, gate_up=Joined((gate_up,)))


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.windowed_config(metadata)
    short, long = (metadata.vector(f"rope_factors_{reach}.weight") for reach in ("short", "long"))
    original = metadata.integer("rope.scaling.original_context_length") or _ORIGINAL_CONTEXT
    config["original_max_position_embeddings"] = original
    if short is not None and long is not None:
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(short),
            "long_factor": list(long),
            "attention_factor": metadata.real("rope.scaling.attn_factor"),
        }
    return config


ARCHITECTURE = Architecture(
    hf=("Phi3ForCausalLM",),
    gguf=(
        gguf.layout(
            "phi3",
            hf="Phi3ForCausalLM",
            model_type="phi3",
            config=_gguf_config,
            attn_qkv="self_attn.qkv_proj",
            attn_q="",
            attn_k="",
            attn_v="",
            ffn_gate="",
            ffn_up="mlp.gate_up_proj",
        ),
    ),
    build=build,
)
