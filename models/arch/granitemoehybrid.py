"""Granite 4: Mamba-2 on most layers, attention on the others, experts beside a shared MLP or that MLP alone.

Its factors are those of Granite 3. Source: transformers' `modeling_granitemoehybrid`; llama.cpp
`conversion/granite.py`, GraniteHybridModel, which writes Bamba under the same name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, granite, recurrent
from models.arch.base import Architecture, Model, Stack, Tensor
from models.arch.blocks import FILE, MLP, Decoder, Dims, MoE, SelfAttention
from models.arch.experts import STACKS, experts
from models.arch.recurrent import Mixer
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import KV, Attention, Joined, LayerState, Linear, Norm, Ops, Routing

SPACE, ATTENTION = "linear_attention", "full_attention"
_KINDS = {"mamba": SPACE, "attention": ATTENTION, SPACE: SPACE, ATTENTION: ATTENTION}
_STACKS = (
    # Gate and up in one, of the shared MLP and of experts; and as mlx-lm calls the shared one where it is alone.
    Stack(
        r"(.*\.shared_mlp)\.input_linear\.weight",
        ("{0}.gate_proj.weight", "{0}.up_proj.weight"),
        whole=True,
    ),
    Stack(r"(.*\.layers\.\d+)\.mlp\.(gate|up)_proj\.(.+)", ("{0}.shared_mlp.{1}_proj.{2}",), whole=True),
    Stack(r"(.*\.layers\.\d+)\.mlp\.down_proj\.(.+)", ("{0}.shared_mlp.output_linear.{1}",), whole=True),
    Stack(
        r"(.*\.block_sparse_moe)\.input_linear\.weight",
        ("{0}.experts.{n}.gate_proj.weight", "{0}.experts.{n}.up_proj.weight"),
    ),
    Stack(r"(.*\.block_sparse_moe)\.output_linear\.weight", ("{0}.experts.{n}.down_proj.weight",)),
    *STACKS,
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A state space or attention, then MLPs, each behind a norm and beside a residual."""

    norm1: Norm
    mixer: Mixer | SelfAttention
    norm2: Norm
    mlp: MLP | MoE


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims({"intermediate_size": 11008, **config})
    kinds = read_kinds(config, dims.num_layers)
    spec = _attention(config, dims)
    layers = [_layer(config, dims, f"model.layers.{index}", kind) for index, kind in enumerate(kinds)]
    model = model_with(dims, blocks.decoder(dims, layers), spec, granite.read_factors(config))
    return replace(model, stacks=_STACKS)


def read_kinds(config: Mapping[str, JSON], layers: int) -> list[str]:
    """Whether each layer is a state space or attention. Raises CheckpointError."""
    kinds = ConfigReader(config).texts("layer_types") or [SPACE] * layers
    if len(kinds) != layers or not set(kinds) <= set(_KINDS):
        raise CheckpointError(f"layer_types must name {layers} times mamba or attention", file=FILE)
    return [_KINDS[kind] for kind in kinds]


def _attention(config: Mapping[str, JSON], dims: Dims) -> Attention:
    reader = ConfigReader(config)
    (spec,) = blocks.attention_specs(config, dims, [None])
    spec = replace(spec, scale=reader.number("attention_multiplier", 1.0))
    match reader.text("position_embedding_type", "nope"):
        case "rope":
            return spec
        case "nope":
            return replace(spec, rope=None)
        case kind:
            raise CheckpointError(f"position_embedding_type {kind!r} is not supported", file=FILE)


def _layer(config: Mapping[str, JSON], dims: Dims, name: str, kind: str) -> Layer:
    reader = ConfigReader(config)
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    mlp = _mlp(dims, f"{name}.shared_mlp", reader.size("shared_intermediate_size", 1024))
    mixed: MLP | MoE = mlp
    if count := reader.integer("num_local_experts", 8):
        own = experts(f"{name}.block_sparse_moe", count, dims.hidden_size, dims.intermediate_size)
        router = Linear(f"{name}.block_sparse_moe.router.layer", dims.hidden_size, count)
        mixed = MoE(router, own, Routing(reader.count("num_experts_per_tok", count, 2)), dims.activation, shared=mlp)
    if kind == ATTENTION:
        bias = reader.flag("attention_bias", default=False)
        return Layer(norm1, blocks.attention(dims, name, qkv_bias=bias, out_bias=bias), norm2, mixed)
    inner = reader.size("mamba_expand", 2) * dims.hidden_size
    sizes = recurrent.read_sizes(config, inner, dims.eps, dims.activation)
    return Layer(norm1, recurrent.mixer(sizes, f"{name}.mamba"), norm2, mixed)


def _mlp(dims: Dims, name: str, width: int) -> MLP:
    gate_up = Joined(tuple(Linear(f"{name}.{part}_proj", dims.hidden_size, width) for part in ("gate", "up")))
    return MLP(gate_up, Linear(f"{name}.output_linear", width, dims.hidden_size), dims.activation)


def _states(layer: Layer, spec: Attention) -> Sequence[LayerState]:
    if isinstance(layer.mixer, Mixer):
        return layer.mixer.states
    return (KV(spec.kv_heads, spec.head_dim, spec.head_dim),)


def model_with(dims: Dims, weights: Decoder[Layer, Norm], spec: Attention, factors: granite.Factors) -> Model:
    """The model of such layers."""
    first, state = recurrent.numbered(_states(layer, spec) for layer in weights.layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(blocks.times(ops, ops.embed(weights.embed), factors.embedding), 0)
        for index, (w, own) in enumerate(zip(weights.layers, first, strict=True)):
            normed = ops.rms_norm(x, w.norm1)
            if isinstance(w.mixer, Mixer):
                made = recurrent.mixed(ops, normed, w.mixer, own)
            else:
                made = blocks.gqa(ops, normed, w.mixer, own, spec)
            x = ops.add(x, blocks.times(ops, made, factors.residual))
            made = blocks.feed_forward(ops, ops.rms_norm(x, w.norm2), w.mlp)
            x = ops.residual(ops.add(x, blocks.times(ops, made, factors.residual)), index + 1)
        return ops.rms_norm(x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return blocks.times(ops, scores, factors.logits)

    return replace(blocks.model_with(dims, weights, (spec,), forward, finish), state=state)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    layers = metadata.count("block_count")
    config = gguf.decoder_config(metadata, per_layer=True) | recurrent.gguf_sizes(metadata)
    kv_heads = max(metadata.each("attention.head_count_kv", layers) or [0])
    experts_count, width = metadata.integer("expert_count") or 0, metadata.integer("expert_feed_forward_length")
    shared = metadata.integer("expert_shared_feed_forward_length") or config["intermediate_size"]
    ours: gguf.Config = {
        "num_key_value_heads": kv_heads or config["num_attention_heads"],
        "layer_types": recurrent.gguf_layers(metadata, {"ssm_in.weight": SPACE, "attn_q.weight": ATTENTION}, layers),
        "mamba_expand": metadata.count("ssm.inner_size") // metadata.count("embedding_length"),
        "attention_bias": any(name.endswith(".attn_q.bias") for name in metadata.shapes),
        "num_local_experts": experts_count,
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "intermediate_size": width or config["intermediate_size"],
        "shared_intermediate_size": shared,
    }
    return config | granite.gguf_factors(metadata) | ours


ARCHITECTURE = Architecture(
    hf=("GraniteMoeHybridForCausalLM",),
    gguf=(
        gguf.layout(
            "granitehybrid",
            hf="GraniteMoeHybridForCausalLM",
            model_type="granitemoehybrid",
            interleaved=("attn_q", "attn_k"),
            bare=recurrent.GGUF_BARE,
            rates=recurrent.GGUF_RATES,
            config=_gguf_config,
            names=recurrent.gguf_names("mamba")
            | {
                "ffn_gate": "shared_mlp.gate_proj",
                "ffn_up": "shared_mlp.up_proj",
                "ffn_down": "shared_mlp.output_linear",
                "ffn_gate_shexp": "shared_mlp.gate_proj",
                "ffn_up_shexp": "shared_mlp.up_proj",
                "ffn_down_shexp": "shared_mlp.output_linear",
                "ffn_gate_inp": "block_sparse_moe.router.layer",
                "ffn_gate_exps": "block_sparse_moe.experts.*.gate_proj",
                "ffn_up_exps": "block_sparse_moe.experts.*.up_proj",
                "ffn_down_exps": "block_sparse_moe.experts.*.down_proj",
            },
        ),
    ),
    build=build,
)
