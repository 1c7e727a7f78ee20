"""What several architectures share: reading a config, and the blocks of a pre-norm decoder. Called or not called.

Source: transformers' `modeling_llama` for the order of operations and the names of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from models.arch.base import Model, Stack, Tensor
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import KV, Attention, Embedding, Experts, Gate, Joined, Linear, Norm, Ops, Routing, Vector
from models.ops.rope import read_rope

FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes that every dense decoder's config.json gives; implements `ModelConfig`."""

    vocab_size: int
    context_length: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    tied: bool


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The weights of grouped-query attention; norms of each head's query and key where an architecture has them."""

    qkv: Joined
    out: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: Vector | None = None
    """The attention's, see `Attention.sinks`."""


@dataclass(frozen=True, slots=True)
class MLP:
    """The weights of a gated MLP."""

    gate_up: Joined
    down: Linear


@dataclass(frozen=True, slots=True)
class MoE:
    """The weights of a mixture of experts, and how they are chosen; see `moe`."""

    router: Linear
    experts: Experts
    routing: Routing
    gate: Gate = "silu"
    shared: MLP | None = None
    """An MLP that all tokens go through besides,"""
    shared_gate: Linear | None = None
    """and what that is multiplied by, through a sigmoid."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each behind a norm and beside a residual."""

    norm1: Norm
    attention: SelfAttention
    norm2: Norm
    mlp: MLP | MoE


@dataclass(frozen=True, slots=True)
class Decoder:
    """The weights of a whole decoder; a tied head is the embedding."""

    embed: Embedding
    layers: tuple[Any, ...]
    norm: Norm
    head: Linear | Embedding


def read_dims(config: Mapping[str, JSON]) -> Dims:
    """Read the sizes.

    Raises:
        CheckpointError: a value is missing, impossible, or asks for another activation than SiLU.
    """
    reader = ConfigReader(config)
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.size("num_key_value_heads", heads)
    head_dim = reader.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise CheckpointError(f"{heads} attention heads cannot share {kv_heads} key-value heads", file=FILE)
    if head_dim % 2:
        raise CheckpointError(f"head_dim must be even, not {head_dim}", file=FILE)
    if (activation := reader.text("hidden_act", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {activation!r} is not supported", file=FILE)
    return Dims(
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("max_position_embeddings", 2048),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        eps=reader.number("rms_norm_eps", 1e-6),
        tied=reader.flag("tie_word_embeddings", default=False),
    )


def read_windows(config: Mapping[str, JSON], *, first_windowed_layer: int = 0) -> tuple[int | None, ...]:
    """The sliding window of each layer: by `layer_types` where the config has them, else from a first layer on.

    Raises:
        CheckpointError: `layer_types` does not name one known kind for each layer.
    """
    reader = ConfigReader(config)
    layers, window = reader.size("num_hidden_layers"), reader.integer("sliding_window", 0)
    kinds = reader.texts("layer_types")
    if window <= 0:
        return (None,) * layers
    if kinds is None:
        return tuple(window if layer >= first_windowed_layer else None for layer in range(layers))
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"layer_types must name {layers} known kinds of attention", file=FILE)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def attention_specs(
    config: Mapping[str, JSON], dims: Dims, windows: Sequence[int | None], *, default_theta: float = 10000.0
) -> tuple[Attention, ...]:
    """The attention of each layer, all with the config's rope.

    Raises:
        CheckpointError: the rope is of an unknown kind or its values make no sense.
    """
    rope = read_rope(config, dims=dims.head_dim, default_theta=default_theta)
    spec = partial(Attention, dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.head_dim**-0.5, rope)
    return tuple(spec(window=window) for window in windows)


def attention(dims: Dims, layer: str, *, qkv_bias: bool = False, out_bias: bool = False) -> SelfAttention:
    """Declare the attention of the layer of that name."""
    queries, keys = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    qkv = Joined(
        tuple(
            Linear(f"{layer}.self_attn.{part}_proj", dims.hidden_size, outputs, qkv_bias)
            for part, outputs in (("q", queries), ("k", keys), ("v", keys))
        ),
        precise=True,
    )
    return SelfAttention(qkv, Linear(f"{layer}.self_attn.o_proj", queries, dims.hidden_size, out_bias))


def mlp(dims: Dims, layer: str, *, bias: bool = False) -> MLP:
    """Declare the gated MLP of the layer of that name."""
    hidden, width = dims.hidden_size, dims.intermediate_size
    gate_up = Joined(tuple(Linear(f"{layer}.mlp.{part}_proj", hidden, width, bias) for part in ("gate", "up")))
    return MLP(gate_up, Linear(f"{layer}.mlp.down_proj", width, hidden, bias))


def layer(dims: Dims, index: int, *, bias: bool = False, mlp_bias: bool = False) -> Layer:
    """Declare a Llama's layer."""
    name = f"model.layers.{index}"
    norm1, norm2 = layer_norm_pair(dims, name)
    own = attention(dims, name, qkv_bias=bias, out_bias=bias)
    return Layer(norm1, own, norm2, mlp(dims, name, bias=mlp_bias))


def layer_norm_pair(dims: Dims, layer: str) -> tuple[Norm, Norm]:
    """Declare the norms before attention and before the MLP."""
    before, after = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
    return Norm(before, dims.hidden_size, dims.eps), Norm(after, dims.hidden_size, dims.eps)


def decoder(dims: Dims, layers: Sequence[Any]) -> Decoder:
    """Declare embedding, final norm and head around the layers."""
    embed = Embedding("model.embed_tokens", dims.vocab_size, dims.hidden_size)
    head = embed if dims.tied else Linear("lm_head", dims.hidden_size, dims.vocab_size)
    return Decoder(embed, tuple(layers), Norm("model.norm", dims.hidden_size, dims.eps), head)


def gqa(ops: Ops[Tensor], x: Tensor, w: SelfAttention, layer: int, spec: Attention) -> Tensor:
    """Grouped-query attention. Shapes: x (T, D); returns (T, D)."""
    q, k, v = ops.split(ops.linear(x, w.qkv), w.qkv.sizes)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = ops.rms_norm(q, w.q_norm), ops.rms_norm(k, w.k_norm)
    return ops.linear(ops.attention(q, k, v, layer, spec), w.out)


def swiglu(ops: Ops[Tensor], x: Tensor, w: MLP) -> Tensor:
    """The gated MLP with SiLU. Shapes: x (T, D); returns (T, D)."""
    gate, up = ops.split(ops.linear(x, w.gate_up), w.gate_up.sizes)
    return ops.linear(ops.glu(gate, up, "silu"), w.down)


def moe(ops: Ops[Tensor], x: Tensor, w: MoE) -> Tensor:
    """A mixture of experts. Shapes: x (T, D); returns (T, D)."""
    picks, weights = ops.route(ops.linear(x, w.router), w.routing)
    y = ops.experts(x, picks, weights, w.experts, w.gate)
    if w.shared is None:
        return y
    shared = swiglu(ops, x, w.shared)
    if w.shared_gate is not None:
        shared = ops.mul(shared, ops.activate(ops.linear(x, w.shared_gate), "sigmoid"))
    return ops.add(y, shared)


def feed_forward(ops: Ops[Tensor], x: Tensor, w: MLP | MoE) -> Tensor:
    """A layer's MLP or mixture. Shapes: x (T, D); returns (T, D)."""
    return moe(ops, x, w) if isinstance(w, MoE) else swiglu(ops, x, w)


def pre_norm(ops: Ops[Tensor], w: Decoder, specs: Sequence[Attention]) -> Tensor:
    """The whole decoder. Shapes: returns (T, D), the final norm done."""
    x = ops.residual(ops.embed(w.embed), 0)
    for index, (layer, spec) in enumerate(zip(w.layers, specs, strict=True)):
        x = ops.add(x, gqa(ops, ops.rms_norm(x, layer.norm1), layer.attention, index, spec))
        x = ops.add(x, feed_forward(ops, ops.rms_norm(x, layer.norm2), layer.mlp))
        x = ops.residual(x, index + 1)
    return ops.rms_norm(x, w.norm)


def model(dims: Dims, weights: Decoder, specs: Sequence[Attention], stacks: tuple[Stack, ...] = ()) -> Model:
    """The model of a pre-norm decoder with these weights and attentions."""
    state = tuple(KV(spec.kv_heads, spec.head_dim, spec.head_dim, spec.window) for spec in specs)
    context = max([dims.context_length, *(spec.rope.extended_context for spec in specs if spec.rope is not None)])

    def forward(ops: Ops[Tensor]) -> Tensor:
        return pre_norm(ops, weights, specs)

    def logits(ops: Ops[Tensor], hidden: Tensor) -> Tensor:
        return ops.linear(hidden, weights.head)

    return Model(dims, context, weights, state, forward, logits, stacks)
