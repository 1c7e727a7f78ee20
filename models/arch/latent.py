"""What decoders with latent attention share: reading its config, declaring it, and the decoder's forward pass.

Source: transformers' `modeling_deepseek_v2` and `modeling_deepseek_v3`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.arch import blocks
from models.arch.base import Model, Stack, Tensor
from models.config_reader import JSON, ConfigReader
from models.ops import KV, LatentAttention, LatentUp, Linear, Norm, Ops, RopeConfig
from models.ops.rope import read_rope

_NORM_EPS = 1e-6
"""Of the norms within attention, whatever the config says of the others."""


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """One layer's latent attention: what is looked at, and the sizes of the projections in front."""

    attention: LatentAttention
    rope: RopeConfig
    key_dim: int
    """Of the part of a head's key that has no position."""
    value_dim: int
    query_rank: int | None
    """None: queries are projected at once."""

    @property
    def head_dim(self) -> int:
        """Of a query."""
        return self.key_dim + self.attention.rope_dim

    @property
    def state(self) -> KV:
        """What the layer remembers."""
        return KV(1, self.attention.rank + self.attention.rope_dim, self.attention.rank, values_in_keys=True)


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """The weights of latent attention."""

    query: Linear
    """To the heads, or to a latent of its own."""
    query_norm: Norm | None
    query_up: Linear | None
    latent: Linear
    """To the latent and the rotated key, one behind the other."""
    latent_norm: Norm
    up: LatentUp
    out: Linear


@dataclass(frozen=True, slots=True)
class LatentLayer:
    """Attention and MLP, each behind a norm and beside a residual."""

    norm1: Norm
    attention: LatentWeights
    norm2: Norm
    mlp: blocks.MLP | blocks.MoE


def read_latent(config: Mapping[str, JSON]) -> tuple[blocks.Dims, LatentSpec]:
    """Read the sizes and the attention of every layer.

    Raises:
        CheckpointError: a value is missing or impossible.
    """
    reader = ConfigReader(config)
    rope_dim, key_dim = reader.size("qk_rope_head_dim"), reader.size("qk_nope_head_dim")
    heads = reader.size("num_attention_heads")
    dims = blocks.read_dims({**config, "head_dim": rope_dim, "num_key_value_heads": heads})
    rope = replace(read_rope(config, dims=rope_dim), interleaved=reader.flag("rope_interleave", default=True))
    scale = (key_dim + rope_dim) ** -0.5 * _temperature(reader) ** 2
    attention = LatentAttention(heads, reader.size("kv_lora_rank"), rope_dim, scale)
    query_rank = None if config.get("q_lora_rank") is None else reader.size("q_lora_rank")
    return dims, LatentSpec(attention, rope, key_dim, reader.size("v_head_dim"), query_rank)


def _temperature(reader: ConfigReader) -> float:
    """YaRN's factor on queries and keys, where the config wants it there."""
    scaling = reader.section("rope_parameters") or reader.section("rope_scaling")
    if scaling is None or scaling.text("rope_type", scaling.text("type", "default")) == "default":
        return 1.0
    factor, mscale = scaling.number("factor", 1.0), scaling.number("mscale_all_dim", 0.0)
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def latent_weights(config: Mapping[str, JSON], dims: blocks.Dims, spec: LatentSpec, layer: str) -> LatentWeights:
    """Declare the attention of the layer of that name."""
    reader, name, hidden = ConfigReader(config), f"{layer}.self_attn", dims.hidden_size
    bias = reader.flag("attention_bias", default=False)
    heads, rank = spec.attention.heads, spec.attention.rank
    queries = heads * spec.head_dim
    query = Linear(f"{name}.q_proj", hidden, queries)
    query_norm = query_up = None
    if spec.query_rank is not None:
        query = Linear(f"{name}.q_a_proj", hidden, spec.query_rank, bias)
        query_norm = Norm(f"{name}.q_a_layernorm", spec.query_rank, _NORM_EPS)
        query_up = Linear(f"{name}.q_b_proj", spec.query_rank, queries)
    divided = reader.flag("gguf_divided", default=False)
    return LatentWeights(
        query,
        query_norm,
        query_up,
        Linear(f"{name}.kv_a_proj_with_mqa", hidden, rank + spec.attention.rope_dim, bias),
        Norm(f"{name}.kv_a_layernorm", rank, _NORM_EPS),
        LatentUp(f"{name}.kv_b_proj", heads, spec.key_dim, spec.value_dim, rank, divided),
        Linear(f"{name}.o_proj", heads * spec.value_dim, hidden, bias),
    )


def latent_attention(ops: Ops[Tensor], x: Tensor, w: LatentWeights, layer: int, spec: LatentSpec) -> Tensor:
    """Multi-head latent attention. Shapes: x (T, D); returns (T, D)."""
    look = spec.attention
    q = ops.linear(x, w.query)
    if w.query_norm is not None and w.query_up is not None:
        q = ops.linear(ops.rms_norm(q, w.query_norm), w.query_up)
    still, turned = ops.split(q, (spec.key_dim, look.rope_dim), look.heads)
    q = ops.join((still, ops.rotate(turned, look.heads, spec.rope)), look.heads)
    latent, key = ops.split(ops.linear(x, w.latent), (look.rank, look.rope_dim))
    latent = ops.join((ops.rms_norm(latent, w.latent_norm), ops.rotate(key, 1, spec.rope)), 1)
    return ops.linear(ops.latent_attention(q, latent, w.up, layer, look), w.out)


def latent_model(
    dims: blocks.Dims, layers: Sequence[LatentLayer], spec: LatentSpec, stacks: tuple[Stack, ...], *, mtp_layers: int
) -> Model:
    """The model of a pre-norm decoder with latent attention; layers for predicting further tokens are left out."""
    weights = blocks.decoder(dims, layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, layer in enumerate(layers):
            x = ops.add(x, latent_attention(ops, ops.rms_norm(x, layer.norm1), layer.attention, index, spec))
            x = ops.add(x, blocks.feed_forward(ops, ops.rms_norm(x, layer.norm2), layer.mlp))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    def logits(ops: Ops[Tensor], hidden: Tensor) -> Tensor:
        return ops.linear(hidden, weights.head)

    context = max(dims.context_length, spec.rope.extended_context)
    further = tuple(f"layers.{dims.num_layers + n}." for n in range(mtp_layers))
    state = (spec.state,) * dims.num_layers
    return Model(dims, context, weights, state, forward, logits, stacks, other_parts=further)
