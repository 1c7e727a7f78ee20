"""Laguna: layers with numbers of heads of their own, what they see gated by softplus; experts chosen by sigmoid.

Source: transformers' `modeling_laguna`; llama.cpp `conversion/laguna.py` and `src/models/laguna.cpp`; Ollama's
`mlxrunner/model/laguna` for the older words of configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, kinds
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.arch.experts import GGUF_NAMES, STACKS, experts, is_sparse, shared_expert
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Linear, Norm, Ops, Routing, Vector

_DEFAULTS: Mapping[str, JSON] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_FIXED: Mapping[str, JSON] = {"moe_apply_router_weight_on_input": False, "norm_topk_prob": True}
_ROPES: JSON = {
    kinds.FULL: {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    kinds.SLIDING: {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}
_FULL_EVERY = 4
_HEAD, _ELEMENT = "per-head", "per-element"


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP or mixture, each behind a norm and beside a residual."""

    norm1: Norm
    attention: blocks.SelfAttention
    gate: Linear
    """Of each head of what attention saw, or of each value."""
    norm2: Norm
    mlp: blocks.MLP | blocks.MoE


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    for key, value in _FIXED.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{key} {config[key]!r} is not supported", file=blocks.FILE)
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    heads, gates, sparse = _heads(reader, dims), _gates(config, dims), _sparse(config, dims)
    specs = _specs(config, dims, heads)
    layers = [
        _layer(reader, replace(dims, num_heads=heads[n]), n, gate=gates[n], mixes=sparse[n])
        for n in range(dims.num_layers)
    ]
    dims = replace(dims, num_heads=max(heads))
    weights = blocks.decoder(dims, layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.add(x, _looked(ops, ops.rms_norm(x, w.norm1), w, index, spec))
            x = ops.add(x, blocks.feed_forward(ops, ops.rms_norm(x, w.norm2), w.mlp))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    return replace(blocks.model_with(dims, weights, specs, forward), stacks=STACKS)


def _looked(ops: Ops[Tensor], x: Tensor, w: Layer, index: int, spec: Attention) -> Tensor:
    """A layer's attention. Shapes: x (T, D); returns (T, D)."""
    attention = w.attention
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    q, k, v = ops.split(ops.linear(x, attention.qkv), attention.qkv.sizes)
    q, k = ops.rms_norm(q, attention.q_norm), ops.rms_norm(k, attention.k_norm)
    gate = ops.activate(ops.linear(x, w.gate), "softplus")
    return ops.linear(ops.mul(ops.attention(q, k, v, index, spec), gate), attention.out)


def _heads(reader: ConfigReader, dims: Dims) -> list[int]:
    heads = list(reader.sizes("num_attention_heads_per_layer") or [dims.num_heads] * dims.num_layers)
    if len(heads) != dims.num_layers or any(count % dims.num_kv_heads for count in heads):
        raise CheckpointError(
            f"num_attention_heads_per_layer must have a multiple of {dims.num_kv_heads} for each of {dims.num_layers} "
            "layers",
            file=blocks.FILE,
        )
    return heads


def _gates(config: Mapping[str, JSON], dims: Dims) -> list[str]:
    """What each layer's gate is of: `gating_types`, where there is one, counts."""
    reader = ConfigReader(config)
    said = (
        reader.texts("gating_types")
        or [_HEAD if config.get("gating") is True else reader.text("gating", _HEAD)] * dims.num_layers
    )
    gates = [each.replace("_", "-") for each in said]
    if len(gates) != dims.num_layers or not set(gates) <= {_HEAD, _ELEMENT}:
        raise CheckpointError(f"gating must be {_HEAD} or {_ELEMENT} in every layer", file=blocks.FILE)
    return gates


def _sparse(config: Mapping[str, JSON], dims: Dims) -> list[bool]:
    """Which layers are mixtures."""
    said = ConfigReader(config).texts("mlp_layer_types")
    if said is None and config.get("mlp_only_layers") is not None:
        return [is_sparse(config, layer) for layer in range(dims.num_layers)]
    said = said or ["dense"] + ["sparse"] * (dims.num_layers - 1)
    if len(said) != dims.num_layers or not set(said) <= {"dense", "sparse"}:
        raise CheckpointError(f"mlp_layer_types must name {dims.num_layers} known kinds of MLP", file=blocks.FILE)
    return [kind == "sparse" for kind in said]


def _specs(config: Mapping[str, JSON], dims: Dims, heads: list[int]) -> list[Attention]:
    sliding = blocks.sliding_layers(config, [False] * dims.num_layers)
    windows = kinds.window_of_sliding(config, sliding)
    ropes = kinds.ropes_by_kind(_by_kind(config), dims.head_dim, full=500_000.0, sliding=10_000.0)
    return [
        Attention(count, dims.num_kv_heads, dims.head_dim, dims.head_dim**-0.5, ropes[slides], window)
        for count, slides, window in zip(heads, sliding, windows, strict=True)
    ]


def _by_kind(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """The configuration with a rope for each kind of layer, as newer ones have it."""
    reader = ConfigReader(config)
    said = dict(reader.mapping("rope_parameters") or reader.mapping("rope_scaling"))
    if not said:
        return {**config, "rope_parameters": _ROPES, "rope_scaling": None}
    if "global_attention" in said:
        said[kinds.FULL] = said.pop("global_attention")
    if kinds.FULL not in said and kinds.SLIDING not in said:
        base: dict[str, JSON] = {
            key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None
        }
        plain: JSON = {"rope_type": "default", **base, **_bases(said), **reader.mapping("swa_rope_parameters")}
        said = {kinds.FULL: base | said, kinds.SLIDING: plain}
    return {**config, "rope_parameters": said, "rope_scaling": None}


def _bases(rope: Mapping[str, JSON]) -> dict[str, JSON]:
    return {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}


def _layer(reader: ConfigReader, dims: Dims, index: int, *, gate: str, mixes: bool) -> Layer:
    name, bias = f"model.layers.{index}", reader.flag("attention_bias", default=False)
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    q_norm, k_norm = (Norm(f"{name}.self_attn.{part}_norm", dims.head_dim, dims.eps) for part in "qk")
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    gated = dims.num_heads if gate == _HEAD else dims.num_heads * dims.head_dim
    return Layer(
        norm1,
        replace(attention, q_norm=q_norm, k_norm=k_norm),
        Linear(f"{name}.self_attn.g_proj", dims.hidden_size, gated),
        norm2,
        _moe(reader, dims, f"{name}.mlp") if mixes else blocks.mlp(dims, name),
    )


def _moe(reader: ConfigReader, dims: Dims, name: str) -> blocks.MoE:
    count, hidden = reader.size("num_experts"), dims.hidden_size
    softcap = reader.number("moe_router_logit_softcapping", 0.0)
    shared = shared_expert(f"{name}.shared_expert", hidden, reader.size("shared_expert_intermediate_size"))
    return blocks.MoE(
        Linear(f"{name}.gate", hidden, count),
        experts(name, count, hidden, reader.size("moe_intermediate_size")),
        Routing(
            reader.count("num_experts_per_tok", count),
            "sigmoid",
            scale=reader.number("moe_routed_scaling_factor", 1.0),
            bias=Vector(f"{name}.experts.e_score_correction_bias", count),
        ),
        dims.activation,
        replace(shared, activation=dims.activation),
        softcap=softcap if softcap > 0 else None,
    )


def _config(metadata: GGUFMetadata) -> gguf.Config:
    layers, window = metadata.count("block_count"), metadata.integer("attention.sliding_window")
    config = gguf.decoder_config(metadata, per_layer=True)
    heads, head_dim = metadata.each("attention.head_count", layers) or [], metadata.count("attention.key_length")
    slides = metadata.flags("attention.sliding_window_pattern", layers)
    if slides is None:
        interval = metadata.integer("attention.sliding_window_pattern") or _FULL_EVERY
        slides = [layer % interval != 0 for layer in range(layers)]
    dense = metadata.integer("leading_dense_block_count") or 0
    scaling = config.pop("rope_scaling")
    turned = [metadata.integer(f"rope.dimension_count{suffix}") or head_dim for suffix in ("", "_swa")]
    bases = [metadata.real(f"rope.freq_base{suffix}") or config["rope_theta"] for suffix in ("", "_swa")]
    ropes = [
        {**(scaling if isinstance(scaling, dict) and not n else {"rope_type": "default"}), "rope_theta": bases[n]}
        | {"partial_rotary_factor": turned[n] / head_dim}
        for n in range(2)
    ]
    said: gguf.Config = {
        "num_attention_heads": max(heads),
        "num_attention_heads_per_layer": [*heads],
        "gating_types": [_gate_of(metadata, layer, count) for layer, count in enumerate(heads)],
        "layer_types": [kinds.SLIDING if window and each else kinds.FULL for each in slides],
        "sliding_window": window,
        "rope_parameters": {kinds.FULL: ropes[0], kinds.SLIDING: ropes[1]},
        "mlp_layer_types": ["dense" if layer < dense else "sparse" for layer in range(layers)],
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
        "moe_routed_scaling_factor": metadata.real("expert_weights_scale") or 1.0,
        "norm_topk_prob": metadata.flag("expert_weights_norm"),
    }
    dropped = ("rope_theta", "partial_rotary_factor")
    return {key: value for key, value in (config | said).items() if value is not None and key not in dropped}


def _gate_of(metadata: GGUFMetadata, layer: int, heads: int) -> str:
    shape = metadata.shapes.get(f"blk.{layer}.attn_gate.weight")
    return _HEAD if shape is None or shape[0] == heads else _ELEMENT


ARCHITECTURE = Architecture(
    hf=("LagunaForCausalLM",),
    gguf=(
        gguf.layout(
            "laguna",
            hf="LagunaForCausalLM",
            model_type="laguna",
            bare=("exp_probs_b",),
            config=_config,
            names=GGUF_NAMES,
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
            attn_gate="self_attn.g_proj",
            exp_probs_b="mlp.experts.e_score_correction_bias",
            ffn_gate_shexp="mlp.shared_expert.gate_proj",
            ffn_up_shexp="mlp.shared_expert.up_proj",
            ffn_down_shexp="mlp.shared_expert.down_proj",
        ),
    ),
    build=build,
)
