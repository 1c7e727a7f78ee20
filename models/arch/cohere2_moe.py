"""Cohere2-MoE: a Cohere 2 whose layers are mixtures but for the first, chosen by logits.

Source: transformers' `modeling_cohere2_moe`; llama.cpp `conversion/command_r.py` and `src/models/cohere2moe.cpp`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from models.arch import blocks, cohere, gguf, kinds
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.arch.experts import GGUF_NAMES, STACKS, experts, shared_expert
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, LayerNorm, Linear, Norm, Ops, Routing

_DEFAULTS: Mapping[str, JSON] = {
    "head_dim": 128,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_DENSE, _SPARSE = "dense", "sparse"


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP or mixture of one norm's output, beside a residual."""

    norm: Norm | LayerNorm
    attention: blocks.SelfAttention
    mlp: blocks.MLP | blocks.MoE
    share: float
    """Of what the mixture and its shared expert make together."""


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    cohere.refuse_others(config)
    reader = ConfigReader(config)
    by_rms = config.get("rms_norm_eps") is not None
    dims = blocks.read_dims(config, eps="rms_norm_eps" if by_rms else "layer_norm_eps")
    sparse = _sparse(reader, dims)
    specs = _specs(config, dims, sparse)
    layers = [_layer(reader, dims, index, by_rms=by_rms, sparse=sparse[index]) for index in range(dims.num_layers)]
    model = _model(dims, layers, specs, reader.number("logit_scale"), by_rms=by_rms)
    # Layers that predict further tokens are left out.
    further = [dims.num_layers + n for n in range(reader.integer("num_nextn_predict_layers", 0))]
    parts = tuple(f"{stem}.{number}." for number in further for stem in ("layers", "blk"))
    return replace(model, stacks=STACKS, other_parts=parts)


def _sparse(reader: ConfigReader, dims: Dims) -> list[bool]:
    """Which layers are mixtures."""
    dense = reader.integer("first_k_dense_replace", 0)
    said = reader.texts("mlp_layer_types") or [_DENSE if n < dense else _SPARSE for n in range(dims.num_layers)]
    if len(said) != dims.num_layers or not set(said) <= {_DENSE, _SPARSE}:
        raise CheckpointError(f"mlp_layer_types must name {dims.num_layers} known kinds of MLP", file=blocks.FILE)
    return [kind == _SPARSE for kind in said]


def _specs(config: Mapping[str, JSON], dims: Dims, sparse: list[bool]) -> list[Attention]:
    """Layers that slide have positions; of the others the dense ones, where the config says so."""
    reader, prefix = ConfigReader(config), ConfigReader(config).integer("first_k_dense_replace", 0)
    of_prefix, of_rest = reader.size("prefix_dense_sliding_window_pattern", 1), reader.size("sliding_window_pattern", 4)
    otherwise = [(n + 1) % of_prefix != 0 for n in range(prefix)]
    otherwise += [(n + 1) % of_rest != 0 for n in range(dims.num_layers - prefix)]
    sliding = blocks.sliding_layers(config, otherwise)
    specs = blocks.attention_specs(config, dims, kinds.window_of_sliding(config, sliding))
    return [
        blocks.interleaved(spec) if slides or (of_prefix == 1 and not mixes) else replace(spec, rope=None)
        for spec, slides, mixes in zip(specs, sliding, sparse, strict=True)
    ]


def _norm(dims: Dims, name: str, *, by_rms: bool) -> Norm | LayerNorm:
    if by_rms:
        return Norm(name, dims.hidden_size, dims.eps)
    return LayerNorm(name, dims.hidden_size, dims.eps, bias=False)


def _layer(reader: ConfigReader, dims: Dims, index: int, *, by_rms: bool, sparse: bool) -> Layer:
    name, bias = f"model.layers.{index}", reader.flag("attention_bias", default=False)
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    norm = _norm(dims, f"{name}.input_layernorm", by_rms=by_rms)
    if sparse:
        moe = _moe(reader, dims, f"{name}.mlp")
        averages = moe.shared is not None and _combination(reader) == "average"
        return Layer(norm, attention, moe, 0.5 if averages else 1.0)
    wide = replace(dims, intermediate_size=reader.size("prefix_dense_intermediate_size", dims.intermediate_size))
    return Layer(norm, attention, blocks.mlp(wide, name), 1.0)


def _moe(reader: ConfigReader, dims: Dims, name: str) -> blocks.MoE:
    count, width = reader.size("num_experts", 8), dims.intermediate_size
    picked, score = reader.count("num_experts_per_tok", count, 2), _score(reader)
    # The softmax is of the picked logits, which is that of all, divided by its sum.
    normalized = score == "softmax" or reader.flag("norm_topk_prob", default=True)
    shared = reader.integer("num_shared_experts", 0)
    own = replace(shared_expert(f"{name}.shared_experts", dims.hidden_size, shared * width), activation=dims.activation)
    return blocks.MoE(
        Linear(f"{name}.gate", dims.hidden_size, count),
        experts(name, count, dims.hidden_size, width),
        Routing(picked, score, by_logits=True, normalized=normalized),
        dims.activation,
        own if shared else None,
    )


def _score(reader: ConfigReader) -> Literal["softmax", "sigmoid"]:
    match reader.text("expert_selection_fn", "softmax"):
        case "softmax":
            return "softmax"
        case "sigmoid":
            return "sigmoid"
        case other:
            raise CheckpointError(f"expert_selection_fn {other!r} is not supported", file=blocks.FILE)


def _combination(reader: ConfigReader) -> str:
    said = reader.text("shared_expert_combination_strategy", "average")
    if said not in ("average", "sum"):
        raise CheckpointError(f"shared_expert_combination_strategy {said!r} is not supported", file=blocks.FILE)
    return said


def _model(
    dims: Dims, layers: Sequence[Layer], specs: Sequence[Attention], logit_scale: float, *, by_rms: bool
) -> Model:
    weights: blocks.Decoder[Layer, Norm] | blocks.Decoder[Layer, LayerNorm] = blocks.decoder(dims, layers)
    if not by_rms:
        final = LayerNorm("model.norm", dims.hidden_size, dims.eps, bias=False)
        weights = blocks.decoder_with(dims, layers, final)

    def normed(ops: Ops[Tensor], x: Tensor, norm: Norm | LayerNorm) -> Tensor:
        return ops.rms_norm(x, norm) if isinstance(norm, Norm) else ops.layer_norm(x, norm)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            before = normed(ops, x, w.norm)
            made = blocks.feed_forward(ops, before, w.mlp)
            made = ops.scale(made, w.share) if w.share != 1 else made
            branches = ops.add(blocks.gqa(ops, before, w.attention, index, spec), made)
            x = ops.residual(ops.add(x, branches), index + 1)
        return normed(ops, x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.scale(scores, logit_scale)

    return blocks.model_with(dims, weights, specs, forward, finish)


def _config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.decoder_config(metadata)
    further, dense = metadata.integer("nextn_predict_layers") or 0, metadata.integer("leading_dense_block_count") or 0
    layers, width = metadata.count("block_count") - further, metadata.count("expert_feed_forward_length")
    types = gguf.layer_types(metadata, 4)
    shared = metadata.integer("expert_shared_feed_forward_length")
    first = metadata.shapes.get("blk.0.ffn_gate.weight")
    return config | {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": further,
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon") or None,
        "layer_norm_eps": metadata.real("attention.layer_norm_epsilon"),
        "logit_scale": metadata.real("logit_scale"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": types[:layers] if isinstance(types, list) else types,
        "first_k_dense_replace": dense,
        "intermediate_size": width,
        "prefix_dense_intermediate_size": first[0] if dense and first else None,
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "num_shared_experts": shared // width if shared else metadata.integer("expert_shared_count") or 0,
        "norm_topk_prob": bool(metadata.flag("expert_weights_norm")),
        "expert_selection_fn": "softmax" if metadata.integer("expert_gating_func") == 1 else "sigmoid",
    }


ARCHITECTURE = Architecture(
    hf=("Cohere2MoeForCausalLM",),
    gguf=(
        gguf.layout(
            "cohere2moe",
            hf="Cohere2MoeForCausalLM",
            model_type="cohere2_moe",
            config=_config,
            names=GGUF_NAMES,
            ffn_norm="",
            ffn_gate_shexp="mlp.shared_experts.gate_proj",
            ffn_up_shexp="mlp.shared_experts.up_proj",
            ffn_down_shexp="mlp.shared_experts.down_proj",
        ),
    ),
    build=build,
)
