"""What the Qwens with a gated delta rule share: it on most layers, attention behind a gate on the others.

Source: gated delta networks (arXiv 2412.06464); transformers' `modeling_qwen3_next` and `modeling_qwen3_5` for the
order of operations and the names; llama.cpp `conversion/qwen.py` for GGUF's; mlx-lm's `qwen3_5` for its norms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from models.arch import blocks, gguf
from models.arch.base import Model, Shapes, Tensor
from models.arch.blocks import FILE, MLP, Dims, MoE, SelfAttention
from models.arch.experts import STACKS
from models.arch.recurrent import GGUF_BARE, GGUF_RATES, gguf_layers, numbered
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import (
    KV,
    Activation,
    Attention,
    DeltaRule,
    Joined,
    LayerState,
    Linear,
    Norm,
    Ops,
    Recurrent,
    ShortConv,
    Vector,
)

DEFAULTS: Mapping[str, JSON] = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
OTHER_PARTS = ("visual.", "vision_tower.")
"""The tower of pictures."""
_FURTHER = "mtp."
"""What predicts further tokens."""

_LINEAR, _FULL = "linear_attention", "full_attention"
_DELTA = "linear_attn"


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """The weights of a layer with the gated delta rule."""

    into: Joined
    """Queries, keys, values and the gate, in one matrix by heads of keys or in two; rates and decays the same way."""
    conv: ShortConv
    """Over queries, keys and values."""
    rule: DeltaRule
    norm: Norm
    """Of each head's output, before the gate."""
    out: Linear
    activation: Activation
    """Behind the convolution."""
    key_heads: int
    fused_qkvz: bool
    fused_ba: bool
    tiled: bool
    """A head of keys serves every so manieth head of values; else as many in a row."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One of the two, and an MLP, each behind a norm and beside a residual."""

    norm1: Norm
    mixer: DeltaNet | SelfAttention
    norm2: Norm
    mlp: MLP | MoE


MLPOf: TypeAlias = Callable[[Dims, int], MLP | MoE]

AXES = (11, 11, 10)
"""How many of a Qwen3.5's pairs turn by each axis where the configuration does not say."""


def build_with(config: Mapping[str, JSON], mlp_of: MLPOf, *, fused: bool) -> Model:
    """The model whose layers have these MLPs. `fused`: a layer's inputs lie in two matrices, unless tensors tell.

    Raises:
        CheckpointError: a value is missing, impossible or not honoured.
    """
    config = blocks.completed(config, {**DEFAULTS, "fused_qkvz": fused, "fused_ba": fused})
    reader = ConfigReader(config)
    if not reader.flag("attn_output_gate", default=True):
        raise CheckpointError("attn_output_gate false is not supported", file=FILE)
    if (gate := reader.text("output_gate_type", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"output_gate_type {gate!r} is not supported", file=FILE)
    dims = blocks.read_dims(config)
    (spec,) = blocks.attention_specs(config, dims, [None])
    layers = [_layer(config, dims, index, kind, mlp_of) for index, kind in enumerate(_kinds(config, dims.num_layers))]
    further = [dims.num_layers + n for n in range(reader.integer("num_nextn_predict_layers", 0))]
    parts = (_FURTHER, *(f"{stem}.{number}." for number in further for stem in ("layers", "blk")))
    return replace(_model(dims, layers, spec, _offset(config)), stacks=STACKS, other_parts=parts)


def _offset(config: Mapping[str, JSON]) -> float:
    return ConfigReader(config).number("norm_offset", 1.0)


def _kinds(config: Mapping[str, JSON], layers: int) -> list[str]:
    reader = ConfigReader(config)
    kinds = reader.texts("layer_types")
    if kinds is None:
        interval = reader.size("full_attention_interval")
        kinds = [_LINEAR if (layer + 1) % interval else _FULL for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {_LINEAR, _FULL}:
        raise CheckpointError(f"layer_types must name {layers} times {_LINEAR} or {_FULL}", file=FILE)
    return kinds


def _layer(config: Mapping[str, JSON], dims: Dims, index: int, kind: str, mlp_of: MLPOf) -> Layer:
    name, offset = f"model.layers.{index}", _offset(config)
    norm1, norm2 = (replace(norm, offset=offset) for norm in blocks.layer_norm_pair(dims, name))
    mixer = _attention(config, dims, name) if kind == _FULL else _delta_net(config, dims, f"{name}.{_DELTA}")
    return Layer(norm1, mixer, norm2, mlp_of(dims, index))


def _attention(config: Mapping[str, JSON], dims: Dims, name: str) -> SelfAttention:
    """Attention whose matrix of queries has a gate for each behind them."""
    bias, offset = ConfigReader(config).flag("attention_bias", default=False), _offset(config)
    own = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    queries, *others = own.qkv.parts
    qkv = replace(own.qkv, parts=(replace(queries, outputs=2 * queries.outputs), *others))
    q_norm, k_norm = (Norm(f"{name}.self_attn.{part}_norm", dims.head_dim, dims.eps, offset) for part in "qk")
    return replace(own, qkv=qkv, q_norm=q_norm, k_norm=k_norm)


def _delta_net(config: Mapping[str, JSON], dims: Dims, name: str) -> DeltaNet:
    reader = ConfigReader(config)
    key_heads, heads = reader.size("linear_num_key_heads"), reader.size("linear_num_value_heads")
    key_dim, value_dim = reader.size("linear_key_head_dim"), reader.size("linear_value_head_dim")
    if heads % key_heads:
        raise CheckpointError(f"{heads} heads of values cannot share {key_heads} heads of keys", file=FILE)
    fused_qkvz, fused_ba = reader.flag("fused_qkvz", default=False), reader.flag("fused_ba", default=False)
    tiled = reader.flag("tiled_value_heads", default=False)
    values = heads * value_dim
    mixed = 2 * key_heads * key_dim + values
    sizes = {"qkvz": mixed + values} if fused_qkvz else {"qkv": mixed, "z": values}
    sizes |= {"ba": 2 * heads} if fused_ba else {"b": heads, "a": heads}
    a_log, dt_bias = Vector(f"{name}.A_log", heads), Vector(f"{name}.dt_bias", heads)
    return DeltaNet(
        Joined(tuple(Linear(f"{name}.in_proj_{part}", dims.hidden_size, size) for part, size in sizes.items())),
        ShortConv(f"{name}.conv1d", mixed, reader.size("linear_conv_kernel_dim")),
        DeltaRule(heads if tiled else key_heads, heads, key_dim, value_dim, a_log, dt_bias),
        Norm(f"{name}.norm", value_dim, dims.eps),
        Linear(f"{name}.out_proj", values, dims.hidden_size),
        dims.activation,
        key_heads,
        fused_qkvz,
        fused_ba,
        tiled,
    )


def _states(layer: Layer, spec: Attention) -> tuple[LayerState, ...]:
    if isinstance(layer.mixer, DeltaNet):
        return Recurrent(layer.mixer.conv.shape), Recurrent(layer.mixer.rule.shape)
    return (KV(spec.kv_heads, spec.head_dim, spec.head_dim),)


def _model(dims: Dims, layers: list[Layer], spec: Attention, offset: float) -> Model:
    norm = Norm("model.norm", dims.hidden_size, dims.eps, offset)
    weights = blocks.decoder_with(dims, layers, norm)
    first, state = numbered(_states(layer, spec) for layer in layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (layer, own) in enumerate(zip(weights.layers, first, strict=True)):
            normed = ops.rms_norm(x, layer.norm1)
            if isinstance(layer.mixer, DeltaNet):
                x = ops.add(x, _remembered(ops, normed, layer.mixer, own))
            else:
                x = ops.add(x, _attended(ops, normed, layer.mixer, own, spec))
            x = ops.add(x, blocks.feed_forward(ops, ops.rms_norm(x, layer.norm2), layer.mlp))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    return replace(blocks.model_with(dims, weights, (spec,), forward), state=state)


def _attended(ops: Ops[Tensor], x: Tensor, w: SelfAttention, state: int, spec: Attention) -> Tensor:
    """Attention behind a gate. Shapes: x (T, D); returns (T, D)."""
    assert w.q_norm is not None
    assert w.k_norm is not None
    both, k, v = ops.split(ops.linear(x, w.qkv), w.qkv.sizes)
    q, gate = ops.split(both, (spec.head_dim, spec.head_dim), spec.heads)
    looked = ops.attention(ops.rms_norm(q, w.q_norm), ops.rms_norm(k, w.k_norm), v, state, spec)
    return ops.linear(ops.glu(gate, looked, "sigmoid"), w.out)


def _remembered(ops: Ops[Tensor], x: Tensor, w: DeltaNet, state: int) -> Tensor:
    """The gated delta rule, the first of whose states has that number. Shapes: x (T, D); returns (T, D)."""
    mixed, z, b, a = _inputs(ops, x, w)
    mixed = ops.activate(ops.short_conv(mixed, w.conv, state), w.activation)
    keys, values = w.key_heads * w.rule.key_dim, w.rule.heads * w.rule.value_dim
    q, k, v = ops.split(mixed, (keys, keys, values))
    if w.tiled:
        q, k = (ops.join((part,) * (w.rule.heads // w.key_heads), 1) for part in (q, k))
    y = ops.delta_rule(q, k, v, a, b, layer=state + 1, spec=w.rule)
    return ops.linear(ops.glu(z, ops.rms_norm(y, w.norm), "silu"), w.out)


def _inputs(ops: Ops[Tensor], x: Tensor, w: DeltaNet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What goes into the convolution, the gate, rates and decays, whichever way they are stored."""
    parts, shared = ops.split(ops.linear(x, w.into), w.into.sizes), w.rule.heads // w.key_heads
    if w.fused_qkvz:
        values = shared * w.rule.value_dim
        *qkv, z = ops.split(parts[0], (w.rule.key_dim, w.rule.key_dim, values, values), w.key_heads)
        mixed = ops.join(qkv, 1)
    else:
        mixed, z = parts[:2]
    b, a = ops.split(parts[-1], (shared, shared), w.key_heads) if w.fused_ba else parts[-2:]
    return mixed, z, b, a


def told_by_tensors(shapes: Shapes) -> dict[str, JSON]:
    """What tensors say and config.json does not: whether 1 was added to norms, and in how many matrices inputs lie.

    Who converts for MLX adds it when moving a kernel's taps to the middle. Where no kernel has three axes, the layers
    for further tokens speak for a checkpoint as published. GGUF's have neither, and 1 was added there.
    """
    kernels = [shape for name, shape in shapes.items() if name.endswith(f"{_DELTA}.conv1d.weight") and len(shape) == 3]
    published = any(each[-1] != 1 for each in kernels) if kernels else any(_FURTHER in name for name in shapes)
    told: dict[str, JSON] = {"norm_offset": 1.0 if published else 0.0}
    inputs = {name.rpartition("_")[2] for name in shapes if f"{_DELTA}.in_proj_" in name}
    if inputs:
        told |= {"fused_qkvz": "qkvz.weight" in inputs, "fused_ba": "ba.weight" in inputs}
    return told


GGUF_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_qkv": f"{_DELTA}.in_proj_qkv",
    "attn_gate": f"{_DELTA}.in_proj_z",
    # As the first files had them.
    "ssm_in": f"{_DELTA}.in_proj_qkvz",
    "ssm_ba": f"{_DELTA}.in_proj_ba",
    "ssm_alpha": f"{_DELTA}.in_proj_a",
    "ssm_beta": f"{_DELTA}.in_proj_b",
    "ssm_conv1d": f"{_DELTA}.conv1d",
    "ssm_dt": f"{_DELTA}.dt_bias",
    "ssm_a": f"{_DELTA}.A_log",
    "ssm_norm": f"{_DELTA}.norm",
    "ssm_out": f"{_DELTA}.out_proj",
}


def gguf_layout(arch: str, hf: str, model_type: str, names: Mapping[str, str]) -> gguf.GGUFLayout:
    """How llama.cpp writes one of them; `names` are of the tensors that it has besides."""
    return gguf.layout(
        arch,
        hf=hf,
        model_type=model_type,
        bare=GGUF_BARE,
        rates=GGUF_RATES,
        config=gguf_config,
        other_parts=("v.", "mm."),
        names=GGUF_NAMES | dict(names),
    )


def gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    """The rest of config.json. Raises CheckpointError."""
    further = metadata.integer("nextn_predict_layers") or 0
    layers = metadata.count("block_count") - further
    config = {"partial_rotary_factor": 1.0} | gguf.decoder_config(metadata, per_layer=True)
    heads, inner = metadata.count("ssm.time_step_rank"), metadata.count("ssm.inner_size")
    if inner % heads:
        raise CheckpointError(f"its metadata has {heads} heads for values of {inner}", file=metadata.file)
    said: gguf.Config = {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": further,
        "num_key_value_heads": max(metadata.each("attention.head_count_kv", layers) or [0])
        or config["num_attention_heads"],
        "layer_types": gguf_layers(metadata, {"ssm_a": _LINEAR, "attn_q.weight": _FULL}, layers),
        "linear_conv_kernel_dim": metadata.count("ssm.conv_kernel"),
        "linear_num_key_heads": metadata.count("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": metadata.count("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "tiled_value_heads": metadata.arch != "qwen3next" and metadata.flag("ssm.v_head_reordered") is not False,
    }
    if count := metadata.integer("expert_count"):
        said |= {
            "num_experts": count,
            "num_experts_per_tok": metadata.count("expert_used_count"),
            "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
            "shared_expert_intermediate_size": metadata.count("expert_shared_feed_forward_length"),
            "norm_topk_prob": metadata.flag("norm_top_k_prob") is not False,
        }
    return gguf.with_axes(config | said, metadata)
