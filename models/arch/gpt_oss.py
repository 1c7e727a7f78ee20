"""gpt-oss: attention sinks, windows on every other layer, and experts with biases and a clamped gate.

Source: transformers' `modeling_gpt_oss`; llama.cpp `convert_hf_to_gguf.py`, GptOssModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model, Stack
from models.arch.experts import GGUF_NAMES, STACKS, experts
from models.arch.gguf import Config, decoder_config, layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import ClampedSwish, Linear, Routing, Vector

_GATE, _UP, _DOWN = (f"{{0}}.experts.{{n}}.{part}_proj" for part in ("gate", "up", "down"))
_BOTH = (f"{_GATE}.weight", f"{_UP}.weight")
_STACKS = (
    # As published: gate and up take turns; in mxfp4, or (inputs, outputs).
    Stack(r"(.*)\.experts\.gate_up_proj_bias", (f"{_GATE}.bias", f"{_UP}.bias"), interleaved=True),
    Stack(r"(.*)\.experts\.down_proj_bias", (f"{_DOWN}.bias",)),
    Stack(r"(.*)\.experts\.gate_up_proj_blocks", _BOTH, interleaved=True),
    Stack(r"(.*)\.experts\.down_proj_blocks", (f"{_DOWN}.weight",)),
    Stack(r"(.*)\.experts\.gate_up_proj", _BOTH, interleaved=True, transposed=True),
    Stack(r"(.*)\.experts\.down_proj", (f"{_DOWN}.weight",), transposed=True),
    *STACKS,
)
_YARN: JSON = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims = blocks.read_dims(config)
    says_rope = reader.mapping("rope_parameters") or reader.mapping("rope_scaling")
    roped = config if says_rope else {**config, "rope_scaling": _YARN}
    attentions = blocks.attention_specs(roped, dims, _windows(reader, dims), default_theta=150_000.0)
    layers = [_layer(reader, dims, index) for index in range(dims.num_layers)]
    specs = [replace(spec, sinks=layer.attention.sinks) for spec, layer in zip(attentions, layers, strict=True)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs, _STACKS)


def _windows(reader: ConfigReader, dims: blocks.Dims) -> tuple[int | None, ...]:
    """Every other layer's, from the first on, unless `layer_types` say otherwise."""
    window = reader.size("sliding_window", 128)
    kinds = reader.texts("layer_types") or ["sliding_attention", "full_attention"] * dims.num_layers
    if len(kinds) < dims.num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"layer_types must name {dims.num_layers} known kinds of attention", file=blocks.FILE)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[: dims.num_layers])


def _layer(reader: ConfigReader, dims: blocks.Dims, index: int) -> blocks.Layer:
    name, bias = f"model.layers.{index}", reader.flag("attention_bias", default=True)
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    sinks = Vector(f"{name}.self_attn.sinks", dims.num_heads)
    attention = replace(blocks.attention(dims, name, qkv_bias=bias, out_bias=bias), sinks=sinks)
    return blocks.Layer(norm1, attention, norm2, _moe(reader, dims, f"{name}.mlp"))


def _moe(reader: ConfigReader, dims: blocks.Dims, name: str) -> blocks.MoE:
    count = reader.size("num_local_experts", 128)
    own = experts(name, count, dims.hidden_size, dims.intermediate_size, bias=True)
    routing = Routing(reader.count("num_experts_per_tok", count, reader.size("experts_per_token", 4)))
    gate = ClampedSwish(reader.number("swiglu_limit", 7.0), reader.number("swiglu_alpha", 1.702), 1.0)
    return blocks.MoE(Linear(f"{name}.router", dims.hidden_size, count, bias=True), own, routing, gate)


def _config(metadata: GGUFMetadata) -> Config:
    config = decoder_config(metadata)
    scaling = config["rope_scaling"]
    if isinstance(scaling, dict):
        # The file does not say so, the published configuration does.
        config["rope_scaling"] = {**scaling, "truncate": False}
    return config | {
        "intermediate_size": metadata.count("expert_feed_forward_length"),
        "num_local_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "sliding_window": metadata.count("attention.sliding_window"),
    }


ARCHITECTURE = Architecture(
    hf=("GptOssForCausalLM",),
    gguf=(
        layout(
            "gpt-oss",
            hf="GptOssForCausalLM",
            model_type="gpt_oss",
            bare=("attn_sinks",),
            config=_config,
            names=GGUF_NAMES,
            ffn_gate_inp="mlp.router",
            post_attention_norm="post_attention_layernorm",
            attn_sinks="self_attn.sinks",
        ),
    ),
    build=build,
)
