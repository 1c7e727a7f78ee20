"""Llama 4: most layers see their own chunk of the text, the others have no positions; experts beside a shared one.

A token's score for an expert weighs what goes into the expert. Queries and keys are normed behind the rotation, which
is the same as before it: what has no weight does not mind being turned.

Source: transformers' `modeling_llama4`; llama.cpp `conversion/llama4.py` and `src/models/llama4.cpp`.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model, Stack
from models.arch.blocks import Dims
from models.arch.experts import GGUF_NAMES, STACKS, experts, shared_expert
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Linear, Norm, PositionScale, Routing

_DEFAULTS: Mapping[str, JSON] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
_FULL, _CHUNKED = "full_attention", "chunked_attention"
_WITHOUT_QK_NORM = 128
"""Experts of the one published model whose queries and keys are not normed; its GGUF files do not say so."""
_STACKS = (
    # As published: (inputs, outputs), gate in front of up.
    Stack(
        r"(.*)\.experts\.gate_up_proj",
        ("{0}.experts.{n}.gate_proj.weight", "{0}.experts.{n}.up_proj.weight"),
        transposed=True,
    ),
    Stack(r"(.*)\.experts\.down_proj", ("{0}.experts.{n}.down_proj.weight",), transposed=True),
    *STACKS,
)


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    # Null, of a chunk's size, means that there are none.
    config = blocks.completed(config, _DEFAULTS, nullable=("attention_chunk_size",))
    dims = blocks.read_dims(config)
    rotated = _rotated(config, dims)
    specs = _specs(config, dims, rotated)
    sparse = _sparse(config, dims)
    layers = [_layer(config, dims, specs[index], index, sparse=index in sparse) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs, _STACKS)


def _rotated(config: Mapping[str, JSON], dims: Dims) -> list[bool]:
    """Which layers have positions: `no_rope_layers` has a 1 for each that has them."""
    reader, layers = ConfigReader(config), dims.num_layers
    rotated = reader.flags("no_rope_layers")
    if not rotated:
        interval = reader.size("no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(layers)]
    if len(rotated) < layers:
        raise CheckpointError(f"no_rope_layers must have a number for each of {layers} layers", file=blocks.FILE)
    return rotated[:layers]


def _specs(config: Mapping[str, JSON], dims: Dims, rotated: list[bool]) -> list[Attention]:
    reader = ConfigReader(config)
    chunk = None if config["attention_chunk_size"] is None else reader.size("attention_chunk_size")
    kinds = reader.texts("layer_types") or [_CHUNKED if turns and chunk else _FULL for turns in rotated]
    if len(kinds) != dims.num_layers or not set(kinds) <= {_FULL, _CHUNKED}:
        raise CheckpointError(f"layer_types must name {dims.num_layers} known kinds of attention", file=blocks.FILE)
    if chunk is None and _CHUNKED in kinds:
        raise CheckpointError(f"layer_types has {_CHUNKED}, and attention_chunk_size is missing", file=blocks.FILE)
    turning = blocks.attention_specs(config, dims, (None,) * dims.num_layers, default_theta=500_000.0)
    seeing = [
        replace(spec, chunk=chunk if kind == _CHUNKED else None) for spec, kind in zip(turning, kinds, strict=True)
    ]
    return [
        blocks.interleaved(spec) if turns else replace(spec, rope=None)
        for spec, turns in zip(seeing, rotated, strict=True)
    ]


def _sparse(config: Mapping[str, JSON], dims: Dims) -> set[int]:
    """The layers that are mixtures: those of `moe_layers`, else the last of every so many."""
    reader = ConfigReader(config)
    if config.get("moe_layers") is not None:
        return set(reader.integers("moe_layers"))
    step = reader.size("interleave_moe_layer_step", 1)
    return set(range(step - 1, dims.num_layers, step))


def _layer(config: Mapping[str, JSON], dims: Dims, spec: Attention, index: int, *, sparse: bool) -> blocks.Layer:
    reader, name = ConfigReader(config), f"model.layers.{index}"
    bias = reader.flag("attention_bias", default=False)
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    if spec.rope is None:
        if reader.flag("attn_temperature_tuning", default=True):
            scale = PositionScale(reader.number("attn_scale"), reader.size("floor_scale"), shift=1)
            attention = replace(attention, query_scale=scale)
    elif reader.flag("use_qk_norm", default=True):
        if spec.rope.magnitude != 1.0:
            raise CheckpointError("use_qk_norm beside a rope that changes lengths is not supported", file=blocks.FILE)
        norm = Norm("", dims.head_dim, dims.eps)
        attention = replace(attention, q_norm=norm, k_norm=norm)
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    place = f"{name}.feed_forward"
    if sparse:
        return blocks.Layer(norm1, attention, norm2, _moe(reader, dims, place))
    return blocks.Layer(norm1, attention, norm2, _mlp(dims, place, reader.size("intermediate_size_mlp")))


def _mlp(dims: Dims, name: str, width: int) -> blocks.MLP:
    return replace(shared_expert(name, dims.hidden_size, width), activation=dims.activation)


def _moe(reader: ConfigReader, dims: Dims, name: str) -> blocks.MoE:
    count = reader.size("num_local_experts", 16)
    picked = reader.count("num_experts_per_tok", count, 1)
    return blocks.MoE(
        Linear(f"{name}.router", dims.hidden_size, count),
        experts(name, count, dims.hidden_size, dims.intermediate_size),
        Routing(picked, score="sigmoid", by_logits=True, normalized=False),
        dims.activation,
        _mlp(dims, f"{name}.shared_expert", dims.intermediate_size),
        on_input=True,
    )


def _config(metadata: GGUFMetadata) -> gguf.Config:
    """llama.cpp takes for granted what the published models have in common; Ollama's converter says some of it."""
    config = gguf.decoder_config(metadata)
    count = metadata.count("expert_count")
    normed = metadata.flag("use_qk_norm")
    own: gguf.Config = {
        "intermediate_size": metadata.count("expert_feed_forward_length"),
        "intermediate_size_mlp": metadata.count("feed_forward_length"),
        "num_local_experts": count,
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "interleave_moe_layer_step": metadata.integer("interleave_moe_layer_step") or 1,
        "use_qk_norm": count != _WITHOUT_QK_NORM if normed is None else normed,
    }
    if metadata.integer("attention.sliding_window") == 0:
        # One without chunks: all layers have positions and see everything.
        return config | own | {"attention_chunk_size": None, "no_rope_layers": [1] * metadata.count("block_count")}
    return config | own | {"attention_chunk_size": metadata.integer("attention.chunk_size") or 8192}


ARCHITECTURE = Architecture(
    hf=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    gguf=(
        gguf.layout(
            "llama4",
            hf="Llama4ForCausalLM",
            model_type="llama4_text",
            config=_config,
            other_parts=("v.", "mm."),
            names={gguf_name: name.replace("mlp.", "feed_forward.") for gguf_name, name in GGUF_NAMES.items()},
            ffn_gate_inp="feed_forward.router",
            ffn_gate="feed_forward.gate_proj",
            ffn_up="feed_forward.up_proj",
            ffn_down="feed_forward.down_proj",
            ffn_gate_shexp="feed_forward.shared_expert.gate_proj",
            ffn_up_shexp="feed_forward.shared_expert.up_proj",
            ffn_down_shexp="feed_forward.shared_expert.down_proj",
        ),
    ),
    build=build,
    other_parts=("vision_model.", "multi_modal_projector."),
)
