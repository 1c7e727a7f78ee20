"""Command R, R7B and A, and Aya: attention and MLP side by side behind one LayerNorm, a rope that pairs neighbours.

Most layers of a Cohere 2 slide; the others have no positions.

Source: transformers' `modeling_cohere` and `modeling_cohere2`; llama.cpp `conversion/command_r.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, kinds
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, LayerNorm, Ops

_DEFAULTS: Mapping[str, JSON] = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
# Published configurations name these, and there is no model with other values that this could run.
_FIXED: Mapping[str, JSON] = {
    "use_qk_norm": False,
    "use_parallel_block": True,
    "use_gated_activation": True,
    "rotary_pct": 1.0,
    "position_embedding_type": "rope_gptj",
}
_FULL_EVERY = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP of one norm's output, beside a residual."""

    norm: LayerNorm
    attention: blocks.SelfAttention
    mlp: blocks.MLP


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    refuse_others(config)
    reader = ConfigReader(config)
    dims = blocks.read_dims(config, eps="layer_norm_eps")
    # The limit of a Command R is beside what its makers call the positions.
    dims = replace(dims, context_length=reader.size("model_max_length", dims.context_length))
    bias = reader.flag("attention_bias", default=False)
    layers = [_layer(dims, index, bias=bias) for index in range(dims.num_layers)]
    return _model(dims, layers, _specs(config, dims), reader.number("logit_scale"))


def refuse_others(config: Mapping[str, JSON]) -> None:
    """Raise CheckpointError where a configuration names what no published model has."""
    for key, value in _FIXED.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{key} {config[key]!r} is not supported", file=blocks.FILE)


def _specs(config: Mapping[str, JSON], dims: Dims) -> list[Attention]:
    reader = ConfigReader(config)
    if "Cohere2ForCausalLM" not in (reader.texts("architectures") or []):
        specs = blocks.attention_specs(config, dims, [None] * dims.num_layers, default_theta=500_000.0)
        return [blocks.interleaved(spec) for spec in specs]
    sliding = kinds.sliding_but_every(config, reader.size("sliding_window_pattern", _FULL_EVERY))
    specs = blocks.attention_specs(config, dims, kinds.window_of_sliding(config, sliding))
    return [blocks.interleaved(spec) if spec.window is not None else replace(spec, rope=None) for spec in specs]


def _norm(dims: Dims, name: str) -> LayerNorm:
    return LayerNorm(name, dims.hidden_size, dims.eps, bias=False)


def _layer(dims: Dims, index: int, *, bias: bool) -> Layer:
    name = f"model.layers.{index}"
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    return Layer(_norm(dims, f"{name}.input_layernorm"), attention, blocks.mlp(dims, name))


def _model(dims: Dims, layers: Sequence[Layer], specs: Sequence[Attention], logit_scale: float) -> Model:
    weights = blocks.decoder_with(dims, layers, _norm(dims, "model.norm"))

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            normed = ops.layer_norm(x, w.norm)
            branches = ops.add(blocks.gqa(ops, normed, w.attention, index, spec), blocks.swiglu(ops, normed, w.mlp))
            x = ops.residual(ops.add(x, branches), index + 1)
        return ops.layer_norm(x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.scale(scores, logit_scale)

    return blocks.model_with(dims, weights, specs, forward, finish)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.decoder_config(metadata) | {
        "layer_norm_eps": metadata.real("attention.layer_norm_epsilon"),
        "logit_scale": metadata.real("logit_scale"),
    }
    if metadata.integer("attention.sliding_window") is None:
        return config
    window, layer_types = metadata.integer("attention.sliding_window"), gguf.layer_types(metadata, _FULL_EVERY)
    return config | {"sliding_window": window, "layer_types": layer_types}


ARCHITECTURE = Architecture(
    hf=("CohereForCausalLM", "Cohere2ForCausalLM"),
    gguf=(
        gguf.layout("command-r", hf="CohereForCausalLM", model_type="cohere", config=_gguf_config, ffn_norm=""),
        gguf.layout("cohere2", hf="Cohere2ForCausalLM", model_type="cohere2", config=_gguf_config, ffn_norm=""),
    ),
    build=build,
)
