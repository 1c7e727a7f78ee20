"""Muse Glimmer, the text model: norms without weights on embeddings, queries and keys, and a gate behind attention.

A layer's norms stand around its branches; every fourth layer, counted from the last, sees everything without positions.

Source: transformers' `modeling_muse_glimmer`; llama.cpp `conversion/muse_glimmer.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, kinds
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Linear, Norm, Ops

_DEFAULTS: Mapping[str, JSON] = {
    "vocab_size": 202048,
    "hidden_size": 6656,
    "intermediate_size": 19968,
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_activation": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 2048,
    "final_logit_softcapping": 20.0,
    "qk_scale_factor": 3.87,
    "output_multiplier": 0.19611613513818404,
    "post_norm_eps": 1e-8,
}
_OF_ANOTHER_FORM = ("no_rope_layers", "normalize_tok_embeddings", "output_soft_cap_temp", "use_attn_output_gate")
"""Words of the makers' own configurations, whose tensors have other names."""
_FULL_EVERY = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each between two norms and beside a residual."""

    norm1: Norm
    attention: blocks.SelfAttention
    gate: Linear
    """Of every value that attention saw."""
    norm1_behind: Norm
    norm2: Norm
    mlp: blocks.MLP
    norm2_behind: Norm


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    for key in _OF_ANOTHER_FORM:
        if config.get(key) is not None:
            raise CheckpointError(f"{key} is not supported", file=blocks.FILE)
    reader, dims = ConfigReader(config), blocks.read_dims(config, activation="hidden_activation")
    specs = _specs(config, dims)
    weights = blocks.decoder(dims, [_layer(config, dims, index) for index in range(dims.num_layers)])
    embedded = Norm("", dims.hidden_size, dims.eps)
    factor, softcap = reader.number("output_multiplier"), reader.positive("final_logit_softcapping")

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.rms_norm(ops.embed(weights.embed), embedded), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            looked = _looked(ops, ops.rms_norm(x, w.norm1), w, index, spec)
            x = ops.add(x, ops.rms_norm(looked, w.norm1_behind))
            made = blocks.swiglu(ops, ops.rms_norm(x, w.norm2), w.mlp)
            x = ops.residual(ops.add(x, ops.rms_norm(made, w.norm2_behind)), index + 1)
        return ops.rms_norm(x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.softcap(ops.scale(scores, factor), softcap)

    return blocks.model_with(dims, weights, specs, forward, finish)


def _looked(ops: Ops[Tensor], x: Tensor, w: Layer, index: int, spec: Attention) -> Tensor:
    """A layer's attention. Shapes: x (T, D); returns (T, D)."""
    attention = w.attention
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    q, k, v = ops.split(ops.linear(x, attention.qkv), attention.qkv.sizes)
    q, k = ops.rms_norm(q, attention.q_norm), ops.rms_norm(k, attention.k_norm)
    gate = ops.activate(ops.linear(x, w.gate), "sigmoid")
    return ops.linear(ops.mul(ops.attention(q, k, v, index, spec), gate), attention.out)


def _specs(config: Mapping[str, JSON], dims: Dims) -> list[Attention]:
    reader, layers = ConfigReader(config), dims.num_layers
    otherwise = [(layers - 1 - layer) % _FULL_EVERY != 0 for layer in range(layers)]
    windows = kinds.window_of_sliding(config, blocks.sliding_layers(config, otherwise))
    rotated = _rotated(config, otherwise)
    # What a file has norms' weights for is scaled by these.
    scale = dims.head_dim**-0.5 * (1.0 if _is_gguf(config) else reader.number("qk_scale_factor"))
    specs = blocks.attention_specs(config, dims, windows)
    return [
        replace(spec, scale=scale, rope=spec.rope if turns else None)
        for spec, turns in zip(specs, rotated, strict=True)
    ]


def _rotated(config: Mapping[str, JSON], otherwise: list[bool]) -> list[bool]:
    """Which layers have positions: those whose `layer_rope_theta` is not 0."""
    if config.get("layer_rope_theta") is None:
        return otherwise
    reader = ConfigReader(config)
    bases, rope = reader.numbers("layer_rope_theta"), reader.section("rope_parameters")
    theta = reader.number("rope_theta", 10000.0) if rope is None else rope.number("rope_theta", 10000.0)
    if len(bases) != len(otherwise) or not set(bases) <= {0.0, theta}:
        raise CheckpointError(
            f"layer_rope_theta must have 0 or rope_theta for each of {len(otherwise)} layers", file=blocks.FILE
        )
    return [base != 0 for base in bases]


def _is_gguf(config: Mapping[str, JSON]) -> bool:
    """Whether norms are stored whole, and those of queries and keys are stored at all."""
    return "gguf_architecture" in config


def _layer(config: Mapping[str, JSON], dims: Dims, index: int) -> Layer:
    reader, name = ConfigReader(config), f"model.layers.{index}"
    stored, bias = _is_gguf(config), reader.flag("attention_bias", default=False)
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    q_norm, k_norm = (Norm(f"{name}.self_attn.{part}_norm" if stored else "", dims.head_dim, dims.eps) for part in "qk")

    def norm(part: str, eps: float) -> Norm:
        return Norm(f"{name}.{part}_layernorm", dims.hidden_size, eps, offset=0.0 if stored else 1.0)

    behind = reader.number("post_norm_eps")
    return Layer(
        norm("input", dims.eps),
        replace(attention, q_norm=q_norm, k_norm=k_norm),
        Linear(f"{name}.self_attn.gate_proj", dims.hidden_size, dims.num_heads * dims.head_dim),
        norm("post_attention", behind),
        norm("pre_feedforward", dims.eps),
        blocks.mlp(dims, name),
        norm("post_feedforward", behind),
    )


def _config(metadata: GGUFMetadata) -> gguf.Config:
    config, types = gguf.decoder_config(metadata), gguf.layer_types(metadata, _FULL_EVERY)
    slides = [kind == kinds.SLIDING for kind in types] if isinstance(types, list) else []
    said: gguf.Config = {
        "hidden_activation": "silu",
        "layer_types": types,
        "layer_rope_theta": [config["rope_theta"] if each else 0.0 for each in slides],
        "sliding_window": metadata.integer("attention.sliding_window"),
        "final_logit_softcapping": metadata.real("final_logit_softcapping"),
        "output_multiplier": metadata.real("logit_scale"),
    }
    return {key: value for key, value in (config | said).items() if value is not None}


ARCHITECTURE = Architecture(
    hf=("MuseGlimmerForConditionalGeneration",),
    gguf=(
        gguf.layout(
            "muse-glimmer",
            hf="MuseGlimmerForConditionalGeneration",
            model_type="muse_glimmer_text",
            interleaved=("attn_q", "attn_k"),
            config=_config,
            names={
                "attn_q_norm": "self_attn.q_norm",
                "attn_k_norm": "self_attn.k_norm",
                "attn_gate": "self_attn.gate_proj",
                "post_attention_norm": "post_attention_layernorm",
                "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            },
        ),
    ),
    build=build,
    other_parts=("vision_tower.", "vision_adapter.", "vision_projection."),
)
