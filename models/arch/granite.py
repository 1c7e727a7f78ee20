"""Granite 3: a Llama with factors on embeddings, scores, branches and logits.

Source: transformers' `modeling_granite`; llama.cpp `conversion/granite.py`, GraniteModel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Ops


@dataclass(frozen=True, slots=True)
class Factors:
    """What is multiplied besides; of the scores' factor the attentions know."""

    embedding: float
    residual: float
    logits: float


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    bias, mlp_bias = (reader.flag(f"{part}_bias", default=False) for part in ("attention", "mlp"))
    layers = [blocks.layer(dims, index, bias=bias, mlp_bias=mlp_bias) for index in range(dims.num_layers)]
    return _model(dims, layers, _specs(config, dims), read_factors(config))


def read_factors(config: Mapping[str, JSON]) -> Factors:
    """The factors but the scores'. Raises CheckpointError."""
    reader = ConfigReader(config)
    return Factors(
        reader.number("embedding_multiplier", 1.0),
        reader.number("residual_multiplier", 1.0),
        1 / reader.positive("logits_scaling") if config.get("logits_scaling") is not None else 1.0,
    )


def _specs(config: Mapping[str, JSON], dims: Dims) -> list[Attention]:
    reader = ConfigReader(config)
    scale = reader.number("attention_multiplier", 1.0)
    specs = [replace(spec, scale=scale) for spec in blocks.attention_specs(config, dims, [None] * dims.num_layers)]
    match reader.text("position_embedding_type", "rope"):
        case "rope":
            return specs
        case "nope":
            return [replace(spec, rope=None) for spec in specs]
        case kind:
            raise CheckpointError(f"position_embedding_type {kind!r} is not supported", file=blocks.FILE)


def _model(dims: Dims, layers: Sequence[blocks.Layer], specs: Sequence[Attention], factors: Factors) -> Model:
    weights = blocks.decoder(dims, layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.scale(ops.embed(weights.embed), factors.embedding), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            looked = blocks.gqa(ops, ops.rms_norm(x, w.norm1), w.attention, index, spec)
            x = ops.add(x, ops.scale(looked, factors.residual))
            made = blocks.feed_forward(ops, ops.rms_norm(x, w.norm2), w.mlp)
            x = ops.residual(ops.add(x, ops.scale(made, factors.residual)), index + 1)
        return ops.rms_norm(x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.scale(scores, factors.logits)

    return blocks.model_with(dims, weights, specs, forward, finish)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    return gguf.decoder_config(metadata) | gguf_factors(metadata)


def gguf_factors(metadata: GGUFMetadata) -> gguf.Config:
    """All factors, and whether there are positions, in config.json's words. Raises CheckpointError."""
    heads = metadata.count("attention.head_count")
    head_dim = metadata.integer("attention.key_length") or metadata.count("embedding_length") // heads
    has_rope = metadata.flag("rope.scaling.finetuned") is not False
    return {
        "embedding_multiplier": metadata.real("embedding_scale") or 1.0,
        "attention_multiplier": metadata.real("attention.scale") or float(head_dim) ** -0.5,
        "residual_multiplier": metadata.real("residual_scale") or 1.0,
        "logits_scaling": metadata.real("logit_scale") or 1.0,
        "position_embedding_type": "rope" if has_rope else "nope",
    }


ARCHITECTURE = Architecture(
    hf=("GraniteForCausalLM",),
    gguf=(
        gguf.layout(
            "granite",
            hf="GraniteForCausalLM",
            model_type="granite",
            interleaved=("attn_q", "attn_k"),
            config=_gguf_config,
        ),
    ),
    build=build,
)
