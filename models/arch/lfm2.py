"""LFM2: short convolutions between two gates on most layers, attention with norms of queries and keys on the others.

Source: transformers' `modeling_lfm2`; llama.cpp `conversion/lfm2.py`, LFM2Model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model, Stack, Tensor
from models.arch.blocks import FILE, MLP, Dims, MoE, SelfAttention
from models.arch.recurrent import gguf_layers, numbered
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import KV, Attention, Joined, LayerState, Linear, Norm, Ops, Recurrent, ShortConv

DEFAULTS: Mapping[str, JSON] = {
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
_THETA = 1_000_000.0
_CONV, _ATTENTION = "conv", "full_attention"

RENAMED = (
    Stack(r"(.*\.feed_forward)\.gate_proj\.(.+)", ("{0}.w1.{1}",), whole=True),
    Stack(r"(.*\.feed_forward)\.up_proj\.(.+)", ("{0}.w3.{1}",), whole=True),
    Stack(r"(.*\.feed_forward)\.down_proj\.(.+)", ("{0}.w2.{1}",), whole=True),
)
"""As mlx-lm names the matrices of dense layers beside mixtures."""


@dataclass(frozen=True, slots=True)
class GatedConv:
    """The weights of a short convolution between two gates."""

    into: Linear
    """Both gates, then what they are on."""
    conv: ShortConv
    out: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One of the two, and an MLP, each behind a norm and beside a residual."""

    norm1: Norm
    mixer: GatedConv | SelfAttention
    norm2: Norm
    mlp: MLP | MoE


MLPOf: TypeAlias = Callable[[Dims, int], MLP | MoE]


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, DEFAULTS, nullable=("block_ffn_dim_multiplier",))
    return build_with(config | {"intermediate_size": _width(config)}, mlp, ())


def build_with(config: Mapping[str, JSON], mlp_of: MLPOf, stacks: tuple[Stack, ...]) -> Model:
    """The model whose layers have these MLPs; `config` has the defaults. Raises CheckpointError."""
    reader = ConfigReader(config)
    for key in ("block_use_swiglu", "use_pos_enc"):
        if not reader.flag(key, default=True):
            raise CheckpointError(f"{key} false is not supported", file=FILE)
    tied = reader.flag("tie_embedding", default=reader.flag("tie_word_embeddings", default=True))
    dims = replace(blocks.read_dims(config, eps="norm_eps"), tied=tied)
    (spec,) = blocks.attention_specs(config, dims, [None], default_theta=_THETA)
    kinds = _kinds(config, dims.num_layers)
    layers = [_layer(config, dims, index, kind, mlp_of(dims, index)) for index, kind in enumerate(kinds)]
    return replace(_model(dims, layers, spec), stacks=stacks)


def _width(config: Mapping[str, JSON]) -> int:
    """The MLP's, which is derived from what the configuration names."""
    reader = ConfigReader(config)
    width = reader.size("block_ff_dim", reader.size("intermediate_size", 12288))
    if not reader.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = 2 * width // 3
    if "block_ffn_dim_multiplier" in config and config["block_ffn_dim_multiplier"] is None:
        return width
    multiple = reader.size("block_multiple_of", 256)
    return -(-int(reader.number("block_ffn_dim_multiplier", 1.0) * width) // multiple) * multiple


def _kinds(config: Mapping[str, JSON], layers: int) -> list[str]:
    reader = ConfigReader(config)
    kinds = reader.texts("layer_types")
    if kinds is None:
        attending = reader.integers("full_attn_idxs") if config.get("full_attn_idxs") is not None else range(layers)
        kinds = [_ATTENTION if layer in attending else _CONV for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {_CONV, _ATTENTION}:
        raise CheckpointError(f"layer_types must name {layers} times {_CONV} or {_ATTENTION}", file=FILE)
    return kinds


def _layer(config: Mapping[str, JSON], dims: Dims, index: int, kind: str, own: MLP | MoE) -> Layer:
    name, hidden = f"model.layers.{index}", dims.hidden_size
    norm1, norm2 = (Norm(f"{name}.{part}_norm", hidden, dims.eps) for part in ("operator", "ffn"))
    if kind == _ATTENTION:
        q_norm, k_norm = (Norm(f"{name}.self_attn.{part}_layernorm", dims.head_dim, dims.eps) for part in "qk")
        declared = blocks.attention(dims, name)
        out = replace(declared.out, name=f"{name}.self_attn.out_proj")
        return Layer(norm1, replace(declared, out=out, q_norm=q_norm, k_norm=k_norm), norm2, own)
    reader = ConfigReader(config)
    bias = reader.flag("conv_bias", default=False)
    conv = GatedConv(
        Linear(f"{name}.conv.in_proj", hidden, 3 * hidden, bias),
        ShortConv(f"{name}.conv.conv", hidden, reader.size("conv_L_cache", 3), bias),
        Linear(f"{name}.conv.out_proj", hidden, hidden, bias),
    )
    return Layer(norm1, conv, norm2, own)


def mlp(dims: Dims, index: int) -> MLP:
    """Declare the gated MLP of a layer."""
    name, hidden, width = f"model.layers.{index}.feed_forward", dims.hidden_size, dims.intermediate_size
    gate_up = Joined(tuple(Linear(f"{name}.{part}", hidden, width) for part in ("w1", "w3")))
    return MLP(gate_up, Linear(f"{name}.w2", width, hidden))


def _states(layer: Layer, spec: Attention) -> tuple[LayerState, ...]:
    if isinstance(layer.mixer, GatedConv):
        return (Recurrent(layer.mixer.conv.shape),)
    return (KV(spec.kv_heads, spec.head_dim, spec.head_dim),)


def _model(dims: Dims, layers: Sequence[Layer], spec: Attention) -> Model:
    weights = blocks.decoder_with(dims, layers, Norm("model.embedding_norm", dims.hidden_size, dims.eps))
    first, state = numbered(_states(layer, spec) for layer in layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (layer, own) in enumerate(zip(weights.layers, first, strict=True)):
            normed = ops.rms_norm(x, layer.norm1)
            if isinstance(layer.mixer, GatedConv):
                x = ops.add(x, _convolved(ops, normed, layer.mixer, own))
            else:
                x = ops.add(x, blocks.gqa(ops, normed, layer.mixer, own, spec))
            x = ops.add(x, blocks.feed_forward(ops, ops.rms_norm(x, layer.norm2), layer.mlp))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    return replace(blocks.model_with(dims, weights, (spec,), forward), state=state)


def _convolved(ops: Ops[Tensor], x: Tensor, w: GatedConv, state: int) -> Tensor:
    """Shapes: x (T, D); returns (T, D)."""
    before, behind, value = ops.split(ops.linear(x, w.into), (w.conv.channels,) * 3)
    return ops.linear(ops.mul(behind, ops.short_conv(ops.mul(before, value), w.conv, state)), w.out)


GGUF_NAMES = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
GGUF_TOP = {"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"}


def gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    """The rest of config.json. Raises CheckpointError."""
    config, layers = gguf.decoder_config(metadata, per_layer=True), metadata.count("block_count")
    kv_heads = metadata.each("attention.head_count_kv", layers) or [0]
    said: gguf.Config = {
        "norm_eps": config["rms_norm_eps"],
        "num_key_value_heads": max(kv_heads) or config["num_attention_heads"],
        "layer_types": gguf_layers(metadata, {"shortconv.conv.weight": _CONV, "attn_q.weight": _ATTENTION}, layers),
        "conv_L_cache": metadata.count("shortconv.l_cache"),
        "conv_bias": any(name.endswith(".shortconv.conv.bias") for name in metadata.shapes),
        # What the file says is the width itself.
        "block_auto_adjust_ff_dim": False,
    }
    return config | said


ARCHITECTURE = Architecture(
    hf=("Lfm2ForCausalLM",),
    gguf=(
        gguf.layout(
            "lfm2", hf="Lfm2ForCausalLM", model_type="lfm2", config=gguf_config, names=GGUF_NAMES, top=GGUF_TOP
        ),
    ),
    build=build,
)
