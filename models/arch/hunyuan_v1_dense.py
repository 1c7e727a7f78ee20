"""Hunyuan, the dense ones: Llamas with norms on each head's query and key, behind the rotation.

Source: transformers' `modeling_hunyuan_v1_dense`; llama.cpp `conversion/hunyuan.py`, HunYuanModel (a rope stretched by
`alpha` is another base there).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import Attention, Norm, Ops

# Published configurations name these, and there is no dense model with other values that this could run.
_FIXED: Mapping[str, JSON] = {"use_qk_norm": True, "use_cla": False, "mlp_bias": False, "use_rotary_pos_emb": True}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = _with_head_dim(blocks.completed(config, {"rms_norm_eps": 1e-5}))
    for key, value in _FIXED.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{key} {config[key]!r} is not supported", file=blocks.FILE)
    dims, bias = blocks.read_dims(config), ConfigReader(config).flag("attention_bias", default=False)
    layers = [_layer(dims, index, bias=bias) for index in range(dims.num_layers)]
    return _model(dims, layers, blocks.attention_specs(config, dims, [None] * dims.num_layers))


def _with_head_dim(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """Published configurations say `attention_head_dim` besides or instead. Raises CheckpointError."""
    other = config.get("attention_head_dim")
    if other is None:
        return config
    if config.get("head_dim", other) != other:
        raise CheckpointError(f"attention_head_dim {other!r} is not its head_dim", file=blocks.FILE)
    return {**config, "head_dim": other}


def _layer(dims: Dims, index: int, *, bias: bool) -> blocks.Layer:
    layer = blocks.layer(dims, index, bias=bias)
    q_norm, k_norm = (
        Norm(f"model.layers.{index}.self_attn.{part}_layernorm", dims.head_dim, dims.eps) for part in ("query", "key")
    )
    return replace(layer, attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm))


def _model(dims: Dims, layers: Sequence[blocks.Layer], specs: Sequence[Attention]) -> Model:
    weights = blocks.decoder(dims, layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.add(x, _attend(ops, ops.rms_norm(x, w.norm1), w.attention, index, spec))
            x = ops.residual(ops.add(x, blocks.feed_forward(ops, ops.rms_norm(x, w.norm2), w.mlp)), index + 1)
        return ops.rms_norm(x, weights.norm)

    return blocks.model_with(dims, weights, specs, forward)


def _attend(ops: Ops[Tensor], x: Tensor, w: blocks.SelfAttention, index: int, spec: Attention) -> Tensor:
    """Grouped-query attention to keys that are normed behind their rotation. Shapes: x (T, D); returns (T, D)."""
    assert spec.rope is not None
    assert w.q_norm is not None
    assert w.k_norm is not None
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    q, k, v = ops.split(ops.linear(x, w.qkv), (queries, keys, keys))
    q = ops.rms_norm(ops.rotate(q, spec.heads, spec.rope), w.q_norm)
    k = ops.rms_norm(ops.rotate(k, spec.kv_heads, spec.rope), w.k_norm)
    return ops.linear(ops.attention(q, k, v, index, replace(spec, rope=None)), w.out)


ARCHITECTURE = Architecture(
    hf=("HunYuanDenseV1ForCausalLM",),
    gguf=(
        gguf.layout(
            "hunyuan-dense",
            hf="HunYuanDenseV1ForCausalLM",
            model_type="hunyuan_v1_dense",
            config=gguf.decoder_config,
            attn_q_norm="self_attn.query_layernorm",
            attn_k_norm="self_attn.key_layernorm",
        ),
    ),
    build=build,
)
