"""Apertus: norms on queries and keys, and MLPs without a gate whose activation has numbers of its own in each layer.

Source: transformers' `modeling_apertus` and its `XIELUActivation`; llama.cpp `conversion/apertus.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Norm, Ops, Vector, Xielu

_XIELU = "xielu"
_DEFAULTS: Mapping[str, JSON] = {
    "hidden_act": _XIELU,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
}
_THETA = 12_000_000.0
_ROPE: JSON = {
    "rope_type": "llama3",
    "rope_theta": _THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
"""That of the published models, where a configuration does not say it."""
_FIXED: Mapping[str, JSON] = {"hidden_act": _XIELU, "mlp_bias": False, "post_norm": False, "qk_norm": True}
_NUMBERS = {"alpha_p": "above", "alpha_n": "below", "beta": "slope", "eps": "least"}
_WITH_AXIS = ("alpha_p", "alpha_n")


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each behind a norm and beside a residual."""

    norm1: Norm
    attention: blocks.SelfAttention
    norm2: Norm
    up: Linear
    activation: Xielu
    down: Linear


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_parameters"] = _ROPE
    for key, value in _FIXED.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{key} {config[key]!r} is not supported", file=blocks.FILE)
    dims = blocks.read_dims({**config, "hidden_act": None})
    bias = ConfigReader(config).flag("attention_bias", default=False)
    specs = blocks.attention_specs(config, dims, (None,) * dims.num_layers, default_theta=_THETA)
    weights = blocks.decoder(
        dims, [_layer(dims, f"model.layers.{index}", bias=bias) for index in range(dims.num_layers)]
    )

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.add(x, blocks.gqa(ops, ops.rms_norm(x, w.norm1), w.attention, index, spec))
            inner = ops.xielu(ops.linear(ops.rms_norm(x, w.norm2), w.up), w.activation)
            x = ops.residual(ops.add(x, ops.linear(inner, w.down)), index + 1)
        return ops.rms_norm(x, weights.norm)

    return blocks.model_with(dims, weights, specs, forward)


def _layer(dims: Dims, name: str, *, bias: bool) -> Layer:
    hidden, width = dims.hidden_size, dims.intermediate_size
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    q_norm, k_norm = (Norm(f"{name}.self_attn.{part}_norm", dims.head_dim, dims.eps) for part in "qk")
    numbers = {
        field: Vector(f"{name}.mlp.act_fn.{stored}", 1, as_number=stored not in _WITH_AXIS)
        for stored, field in _NUMBERS.items()
    }
    return Layer(
        Norm(f"{name}.attention_layernorm", hidden, dims.eps),
        replace(attention, q_norm=q_norm, k_norm=k_norm),
        Norm(f"{name}.feedforward_layernorm", hidden, dims.eps),
        Linear(f"{name}.mlp.up_proj", hidden, width),
        Xielu(**numbers),
        Linear(f"{name}.mlp.down_proj", width, hidden),
    )


def _config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.decoder_config(metadata) | {"hidden_act": _XIELU}
    # That the file has no factors means that there is no scaling.
    said = config["rope_scaling"] or {"rope_type": "default"}
    return config | {"rope_parameters": said, "rope_scaling": None}


def _numbers(metadata: GGUFMetadata) -> Mapping[str, gguf.Array]:
    layers, made = metadata.count("block_count"), {}
    for stored in _NUMBERS:
        for index, value in enumerate(metadata.reals(f"xielu.{stored}", layers)):
            number = np.array([value] if stored in _WITH_AXIS else value, np.float32)
            made[f"model.layers.{index}.mlp.act_fn.{stored}"] = number
    return made


ARCHITECTURE = Architecture(
    hf=("ApertusForCausalLM",),
    gguf=(
        gguf.layout(
            "apertus",
            hf="ApertusForCausalLM",
            model_type="apertus",
            config=_config,
            numbers=_numbers,
            attn_norm="attention_layernorm",
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
            ffn_norm="feedforward_layernorm",
            ffn_gate="",
        ),
    ),
    build=build,
)
