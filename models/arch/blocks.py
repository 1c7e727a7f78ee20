"""What several architectures share: reading a config, and the blocks of a pre-norm decoder. Called or not called.

Source: transformers' `modeling_llama` for the order of operations and the names of tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from models.arch.base import Model, Stack, Tensor
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import (
    KV,
    Activation,
    Attention,
    Embedding,
    Experts,
    Gate,
    Joined,
    LayerNorm,
    Linear,
    Norm,
    Ops,
    PositionScale,
    Routing,
    Vector,
)
from models.ops.rope import read_rope

FILE = "config.json"
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


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
    activation: Activation = "silu"


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The weights of grouped-query attention; norms of queries and keys where an architecture has them."""

    qkv: Joined
    """Three matrices, or one with the rows of all three."""
    out: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: Vector | None = None
    """The attention's, see `Attention.sinks`."""
    query_scale: PositionScale | None = None


@dataclass(frozen=True, slots=True)
class MLP:
    """The weights of a gated MLP, and what its gate goes through."""

    gate_up: Joined
    """Two matrices, or one with the rows of both."""
    down: Linear
    activation: Activation = "silu"


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
    softcap: float | None = None
    """Of the router's logits."""
    on_input: bool = False
    """Weights are those of what goes into the experts; see `Ops.experts`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each behind a norm and beside a residual."""

    norm1: Norm
    attention: SelfAttention
    norm2: Norm
    mlp: MLP | MoE


LayerWeights = TypeVar("LayerWeights")
FinalNorm = TypeVar("FinalNorm", Norm, LayerNorm)


@dataclass(frozen=True, slots=True)
class Decoder(Generic[LayerWeights, FinalNorm]):
    """The weights of a whole decoder; a tied head is the embedding."""

    embed: Embedding
    layers: tuple[LayerWeights, ...]
    norm: FinalNorm
    head: Linear | Embedding


def completed(
    config: Mapping[str, JSON], defaults: Mapping[str, JSON], *, nullable: tuple[str, ...] = ()
) -> dict[str, JSON]:
    """A config.json with an architecture's defaults. Null counts as absent, but for keys where it means none."""
    return {**defaults, **{key: value for key, value in config.items() if value is not None or key in nullable}}


def read_dims(config: Mapping[str, JSON], *, eps: str = "rms_norm_eps", activation: str = "hidden_act") -> Dims:
    """Read the sizes; `eps` and `activation` are the keys of these two.

    Raises:
        CheckpointError: a value is missing, impossible, or asks for an unknown activation.
    """
    reader = ConfigReader(config)
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.size("num_key_value_heads", heads)
    head_dim = reader.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise CheckpointError(f"{heads} attention heads cannot share {kv_heads} key-value heads", file=FILE)
    if head_dim % 2:
        raise CheckpointError(f"head_dim must be even, not {head_dim}", file=FILE)
    if (function := reader.text(activation, "silu")) not in _ACTIVATIONS:
        raise CheckpointError(f"{activation} {function!r} is not supported", file=FILE)
    return Dims(
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("max_position_embeddings", 2048),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        eps=reader.number(eps, 1e-6),
        tied=reader.flag("tie_word_embeddings", default=False),
        activation=_ACTIVATIONS[function],
    )


def read_windows(config: Mapping[str, JSON], *, first_windowed_layer: int = 0) -> tuple[int | None, ...]:
    """The sliding window of each layer: by `layer_types` where the config has them, else from a first layer on.

    Raises:
        CheckpointError: `layer_types` does not name one known kind for each layer.
    """
    reader = ConfigReader(config)
    layers, window = reader.size("num_hidden_layers"), reader.integer("sliding_window", 0)
    if window <= 0:
        return (None,) * layers
    sliding = sliding_layers(config, [layer >= first_windowed_layer for layer in range(layers)])
    return tuple(window if slides else None for slides in sliding)


def sliding_layers(config: Mapping[str, JSON], otherwise: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers' attention is the sliding one: by `layer_types` where the config has them.

    Raises:
        CheckpointError: `layer_types` does not name one known kind for each layer.
    """
    kinds = ConfigReader(config).texts("layer_types")
    if kinds is None:
        return tuple(otherwise)
    if len(kinds) != len(otherwise) or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"layer_types must name {len(otherwise)} known kinds of attention", file=FILE)
    return tuple(kind == "sliding_attention" for kind in kinds)


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


def interleaved(spec: Attention) -> Attention:
    """The same attention, its rope pairing neighbours."""
    assert spec.rope is not None
    return replace(spec, rope=replace(spec.rope, interleaved=True))


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


def mlp(dims: Dims, layer: str, *, bias: bool = False, module: str = "mlp") -> MLP:
    """Declare the gated MLP of the layer of that name."""
    name, hidden, width = f"{layer}.{module}", dims.hidden_size, dims.intermediate_size
    gate_up = Joined(tuple(Linear(f"{name}.{part}_proj", hidden, width, bias) for part in ("gate", "up")))
    return MLP(gate_up, Linear(f"{name}.down_proj", width, hidden, bias), dims.activation)


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


def decoder(dims: Dims, layers: Sequence[LayerWeights]) -> Decoder[LayerWeights, Norm]:
    """Declare embedding, final norm and head around the layers."""
    return decoder_with(dims, layers, Norm("model.norm", dims.hidden_size, dims.eps))


def decoder_with(dims: Dims, layers: Sequence[LayerWeights], norm: FinalNorm) -> Decoder[LayerWeights, FinalNorm]:
    """Declare embedding and head around the layers and a final norm of another kind."""
    embed = Embedding("model.embed_tokens", dims.vocab_size, dims.hidden_size)
    head = embed if dims.tied else Linear("lm_head", dims.hidden_size, dims.vocab_size)
    return Decoder(embed, tuple(layers), norm, head)


def gqa(ops: Ops[Tensor], x: Tensor, w: SelfAttention, layer: int, spec: Attention) -> Tensor:
    """Grouped-query attention. Shapes: x (T, D); returns (T, D)."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    q, k, v = ops.split(ops.linear(x, w.qkv), (queries, keys, keys))
    if w.q_norm is not None and w.k_norm is not None:
        q, k = ops.rms_norm(q, w.q_norm), ops.rms_norm(k, w.k_norm)
    if w.query_scale is not None:
        q = ops.position_scale(q, w.query_scale)
    return ops.linear(ops.attention(q, k, v, layer, spec), w.out)


def times(ops: Ops[Tensor], x: Tensor, factor: float) -> Tensor:
    """A product that is none where the factor is 1. Shapes: x (T, D); returns the same."""
    return x if factor == 1 else ops.scale(x, factor)


def swiglu(ops: Ops[Tensor], x: Tensor, w: MLP) -> Tensor:
    """The gated MLP: with SiLU, unless its weights say otherwise. Shapes: x (T, D); returns (T, D)."""
    gate, up = ops.split(ops.linear(x, w.gate_up), (w.down.inputs, w.down.inputs))
    return ops.linear(ops.glu(gate, up, w.activation), w.down)


def moe(ops: Ops[Tensor], x: Tensor, w: MoE) -> Tensor:
    """A mixture of experts. Shapes: x (T, D); returns (T, D)."""
    logits = ops.linear(x, w.router)
    picks, weights = ops.route(logits if w.softcap is None else ops.softcap(logits, w.softcap), w.routing)
    y = ops.experts(x, picks, weights, w.experts, w.gate, on_input=w.on_input)
    if w.shared is None:
        return y
    shared = swiglu(ops, x, w.shared)
    if w.shared_gate is not None:
        shared = ops.mul(shared, ops.activate(ops.linear(x, w.shared_gate), "sigmoid"))
    return ops.add(y, shared)


def feed_forward(ops: Ops[Tensor], x: Tensor, w: MLP | MoE) -> Tensor:
    """A layer's MLP or mixture. Shapes: x (T, D); returns (T, D)."""
    return moe(ops, x, w) if isinstance(w, MoE) else swiglu(ops, x, w)


def pre_norm(ops: Ops[Tensor], w: Decoder[Layer, Norm], specs: Sequence[Attention], levels: int = 0) -> Tensor:
    """The whole decoder; pictures say more behind the first `levels` layers. Shapes: returns (T, D), normed."""
    x = ops.residual(ops.embed(w.embed), 0)
    for index, (layer, spec) in enumerate(zip(w.layers, specs, strict=True)):
        x = ops.add(x, gqa(ops, ops.rms_norm(x, layer.norm1), layer.attention, index, spec))
        x = ops.add(x, feed_forward(ops, ops.rms_norm(x, layer.norm2), layer.mlp))
        x = ops.residual(x, index + 1)
        if index < levels:
            x = ops.deepen(x, index + 1)
    return ops.rms_norm(x, w.norm)


def model(
    dims: Dims,
    weights: Decoder[Layer, Norm],
    specs: Sequence[Attention],
    stacks: tuple[Stack, ...] = (),
    levels: int = 0,
) -> Model:
    """The model of a pre-norm decoder with these weights and attentions; for `levels` see `pre_norm`."""

    def forward(ops: Ops[Tensor]) -> Tensor:
        return pre_norm(ops, weights, specs, levels)

    return replace(model_with(dims, weights, specs, forward), stacks=stacks)


def model_with(
    dims: Dims,
    weights: Decoder[Any, Any],
    specs: Sequence[Attention],
    forward: Callable[[Ops[Any]], Any],
    finish: Callable[[Ops[Any], Any], Any] = lambda _, scores: scores,
) -> Model:
    """The model of a decoder that computes otherwise; `finish` makes logits of what the head says."""
    state = tuple(KV(spec.kv_heads, spec.head_dim, spec.head_dim, spec.window) for spec in specs)
    context = max([dims.context_length, *(spec.rope.extended_context for spec in specs if spec.rope is not None)])

    def logits(ops: Ops[Tensor], hidden: Tensor) -> Tensor:
        finished: Tensor = finish(ops, ops.linear(hidden, weights.head))
        return finished

    return Model(dims, context, weights, state, forward, logits)
