"""ModernBERT: a pre-norm encoder with rotary positions and a gated MLP; most layers see a window around each token.

Source: ModernBERT (arXiv 2412.13663); transformers' `modeling_modernbert`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.arch import encoder_blocks as blocks
from models.arch.base import Architecture, Model, Tensor
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import Attention, Embedding, LayerNorm, Linear, Ops
from models.ops.rope import RopeConfig

_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each behind a norm (the first layer's attention has none) and beside a residual."""

    attn_norm: LayerNorm | None
    qkv: Linear
    attn_out: Linear
    mlp_norm: LayerNorm
    gated: Linear
    """What is activated and what it is multiplied with, side by side."""
    mlp_out: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of the whole encoder."""

    tokens: Embedding
    norm: LayerNorm
    layers: tuple[Layer, ...]
    final_norm: LayerNorm


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims = blocks.checked(
        blocks.EncoderDims(
            vocab_size=reader.size("vocab_size"),
            hidden_size=reader.size("hidden_size"),
            intermediate_size=reader.size("intermediate_size"),
            num_heads=reader.size("num_attention_heads"),
            num_layers=reader.size("num_hidden_layers"),
            positions=reader.size("max_position_embeddings", 8192),
            eps=reader.number("norm_eps", 1e-5),
            activation=blocks.read_activation(reader, "hidden_activation"),
        )
    )
    norm_bias = reader.flag("norm_bias", default=False)
    weights = Weights(
        Embedding("embeddings.tok_embeddings", dims.vocab_size, dims.hidden_size),
        LayerNorm("embeddings.norm", dims.hidden_size, dims.eps, norm_bias),
        tuple(_layer(dims, reader, index) for index in range(dims.num_layers)),
        LayerNorm("final_norm", dims.hidden_size, dims.eps, norm_bias),
    )
    specs = _specs(dims, reader)

    def forward(ops: Ops[Tensor]) -> Tensor:
        return _forward(ops, weights, specs, dims)

    parts = ("head.", "decoder.", "classifier.")
    return Model(dims, dims.positions, weights, (), forward, None, other_parts=parts)


def _layer(dims: blocks.EncoderDims, reader: ConfigReader, index: int) -> Layer:
    name, width, inner = f"layers.{index}", dims.hidden_size, dims.intermediate_size
    bias, mlp_bias = (reader.flag(f"{part}_bias", default=False) for part in ("attention", "mlp"))
    norm_bias = reader.flag("norm_bias", default=False)
    return Layer(
        LayerNorm(f"{name}.attn_norm", width, dims.eps, norm_bias) if index else None,
        Linear(f"{name}.attn.Wqkv", width, 3 * width, bias),
        Linear(f"{name}.attn.Wo", width, width, bias),
        LayerNorm(f"{name}.mlp_norm", width, dims.eps, norm_bias),
        Linear(f"{name}.mlp.Wi", width, 2 * inner, mlp_bias),
        Linear(f"{name}.mlp.Wo", inner, width, mlp_bias),
    )


def _specs(dims: blocks.EncoderDims, reader: ConfigReader) -> tuple[Attention, ...]:
    """The attention of each layer: the whole text or a window, each kind with its own base of rotation."""
    kinds = reader.texts("layer_types")
    if kinds is None:
        every = reader.size("global_attn_every_n_layers", 3)
        kinds = [_KINDS[index % every > 0] for index in range(dims.num_layers)]
    if len(kinds) != dims.num_layers or not set(kinds) <= {*_KINDS}:
        raise CheckpointError(f"layer_types must name {dims.num_layers} known kinds of attention", file=blocks.FILE)
    # A token sees half of `local_attention` to each side, and itself.
    window = reader.size("local_attention", 128) // 2 + 1
    full = replace(blocks.attention_spec(dims), rope=_rope(dims, reader, "full_attention", "global", 160000.0))
    local = replace(full, window=window, rope=_rope(dims, reader, "sliding_attention", "local", 10000.0))
    return tuple(full if kind == "full_attention" else local for kind in kinds)


def _rope(dims: blocks.EncoderDims, reader: ConfigReader, kind: str, old: str, default: float) -> RopeConfig:
    """The rotation of a kind of layer, in transformers 5's words or in the older ones."""
    theta = reader.number(f"{old}_rope_theta", default)
    parameters = reader.section("rope_parameters")
    own = parameters.section(kind) if parameters is not None else None
    if own is not None:
        if (scaling := own.text("rope_type", "default")) != "default":
            raise CheckpointError(f"rope scaling of kind {scaling!r} is not supported", file=blocks.FILE)
        theta = own.number("rope_theta", theta)
    if reader.section("rope_scaling") is not None:
        raise CheckpointError("rope_scaling is not supported", file=blocks.FILE)
    return RopeConfig(dims.head_dim, theta)


def _forward(ops: Ops[Tensor], w: Weights, specs: tuple[Attention, ...], dims: blocks.EncoderDims) -> Tensor:
    """Shapes: returns (T, D), the final norm done."""
    x = ops.layer_norm(ops.embed(w.tokens), w.norm)
    for index, (layer, spec) in enumerate(zip(w.layers, specs, strict=True)):
        normed = x if layer.attn_norm is None else ops.layer_norm(x, layer.attn_norm)
        x = ops.add(x, ops.linear(blocks.attend(ops, normed, layer.qkv, index, spec), layer.attn_out))
        gated = ops.linear(ops.layer_norm(x, layer.mlp_norm), layer.gated)
        gate, up = ops.split(gated, (dims.intermediate_size,) * 2)
        x = ops.add(x, ops.linear(ops.glu(gate, up, dims.activation), layer.mlp_out))
    return ops.layer_norm(x, w.final_norm)


ARCHITECTURE = Architecture(hf=("ModernBertModel", "ModernBertForMaskedLM"), gguf=(), build=build, is_encoder=True)
