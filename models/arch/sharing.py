"""What Gemma 3n and 4 share: layers that look at an earlier layer's state, and embeddings for each layer.

Source: transformers' `modeling_gemma3n` and `modeling_gemma4`; cross-layer attention (arXiv 2405.12981).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.arch.base import Tensor
from models.arch.blocks import FILE, Dims
from models.errors import CheckpointError
from models.ops import KV, Attention, Embedding, Joined, Linear, Norm, Ops

PER_LAYER_GGUF: Mapping[str, str] = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
"""llama.cpp's names of what `PerLayerInputs` has."""


@dataclass(frozen=True, slots=True)
class Attending:
    """The weights of attention: a layer that looks at another's state has those of queries alone."""

    qkv: Joined
    """Queries, keys and values; where values are the keys before their norm, the first two."""
    out: Linear
    q_norm: Norm
    k_norm: Norm | None
    v_norm: Norm | None


@dataclass(frozen=True, slots=True)
class PerLayer:
    """How a layer takes in its own embedding of each token."""

    gate: Linear
    out: Linear
    behind: Norm


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """The tokens' embeddings for every layer: one table, and a product of the common embedding."""

    table: Embedding
    projection: Linear
    norm: Norm


@dataclass(frozen=True, slots=True)
class Plan:
    """Each layer's attention, and which state it looks at."""

    specs: tuple[Attention, ...]
    own: int
    """Layers with a state of their own, the first so many."""
    state_of: tuple[int, ...]

    @property
    def state(self) -> tuple[KV, ...]:
        """One that later layers look at holds everything, for a window moves when it is written."""
        shared = set(self.state_of[self.own :])
        return tuple(
            KV(spec.kv_heads, spec.head_dim, spec.head_dim, None if layer in shared else spec.window)
            for layer, spec in enumerate(self.specs[: self.own])
        )

    @property
    def unused(self) -> tuple[str, ...]:
        """Beginnings of names of what checkpoints may have of layers that share, and these do not need."""
        parts = ("k_proj", "v_proj", "k_norm", "v_norm")
        layers = range(self.own, len(self.specs))
        return tuple(f"layers.{layer}.self_attn.{part}." for layer in layers for part in parts)


def plan(specs: Sequence[Attention], sliding: Sequence[bool], shared: int) -> Plan:
    """The last `shared` layers look at the state of the last layer before them of their kind.

    Raises:
        CheckpointError: there is none.
    """
    own = len(specs) - shared
    if not 0 < own <= len(specs) or not set(sliding[own:]) <= set(sliding[:own]):
        raise CheckpointError("num_kv_shared_layers leaves a kind of layer without keys", file=FILE)
    last = {kind: max(layer for layer in range(own) if sliding[layer] == kind) for kind in set(sliding[:own])}
    return Plan(tuple(specs), own, tuple(n if n < own else last[kind] for n, kind in enumerate(sliding)))


def attending(
    dims: Dims, name: str, spec: Attention, *, shares: bool, alike: bool = False, bias: bool = False
) -> Attending:
    """Declare the attention of that name; `shares`: it has no keys; `alike`: its values are its keys."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    parts = {"q": queries} if shares else {"q": queries, "k": keys} if alike else {"q": queries, "k": keys, "v": keys}
    return Attending(
        Joined(
            tuple(Linear(f"{name}.{part}_proj", dims.hidden_size, rows, bias) for part, rows in parts.items()),
            precise=True,
        ),
        Linear(f"{name}.o_proj", queries, dims.hidden_size, bias),
        Norm(f"{name}.q_norm", spec.head_dim, dims.eps),
        None if shares else Norm(f"{name}.k_norm", spec.head_dim, dims.eps),
        None if shares else Norm("", spec.head_dim, dims.eps),
    )


def per_layer(dims: Dims, name: str, width: int) -> PerLayer:
    """Declare how the layer of that name takes in its own embeddings of that width."""
    return PerLayer(
        Linear(f"{name}.per_layer_input_gate", dims.hidden_size, width),
        Linear(f"{name}.per_layer_projection", width, dims.hidden_size),
        Norm(f"{name}.post_per_layer_input_norm", dims.hidden_size, dims.eps),
    )


def per_layer_inputs(dims: Dims, rows: int, width: int) -> PerLayerInputs:
    """Declare the embeddings of that width for every layer, of so many tokens."""
    return PerLayerInputs(
        Embedding("model.embed_tokens_per_layer", rows, dims.num_layers * width, is_partial=rows < dims.vocab_size),
        Linear("model.per_layer_model_projection", dims.hidden_size, dims.num_layers * width),
        Norm("model.per_layer_projection_norm", width, dims.eps),
    )


def embeddings_of_layers(ops: Ops[Tensor], x: Tensor, w: PerLayerInputs, dims: Dims) -> tuple[Tensor, ...]:
    """Each layer's embeddings of the tokens. Shapes: x (T, D); returns (T, P) for each."""
    projected = ops.rms_norm(ops.scale(ops.linear(x, w.projection), dims.hidden_size**-0.5), w.norm)
    both = ops.add(projected, ops.scale(ops.embed(w.table), w.norm.width**0.5))
    return ops.split(ops.scale(both, 2**-0.5), (w.norm.width,) * dims.num_layers)


def taken_in(ops: Ops[Tensor], x: Tensor, own: Tensor, w: PerLayer, dims: Dims) -> Tensor:
    """What a layer makes of its own embeddings. Shapes: x (T, D), own (T, P); returns (T, D)."""
    gated = ops.glu(ops.linear(x, w.gate), own, dims.activation)
    return ops.rms_norm(ops.linear(gated, w.out), w.behind)


def looked(ops: Ops[Tensor], x: Tensor, w: Attending, state: int, spec: Attention) -> Tensor:
    """A layer's attention. Shapes: x (T, D); returns (T, D)."""
    q, *kv = ops.split(ops.linear(x, w.qkv), w.qkv.sizes)
    q = ops.rms_norm(q, w.q_norm)
    if w.k_norm is None or w.v_norm is None:
        return ops.linear(ops.look_again(q, state, spec), w.out)
    k, v = ops.rms_norm(kv[0], w.k_norm), ops.rms_norm(kv[-1], w.v_norm)
    return ops.linear(ops.attention(q, k, v, state, spec), w.out)
