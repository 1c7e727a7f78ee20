"""Gemma 2: a norm before and behind each branch, softcaps on scores and logits, every other layer with a window.

Source: transformers' `modeling_gemma2`; llama.cpp `conversion/gemma.py`, Gemma2Model (norms have the 1 added there).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from models.arch import blocks, gguf, kinds
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Norm, Ops
from models.ops.rope import read_rope

_DEFAULTS: Mapping[str, JSON] = {
    "vocab_size": 256000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_LARGEST = 46
"""Layers of the 27B, whose scores alone are not scaled by the width of a head; a GGUF file does not say it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each between two norms and beside a residual."""

    norm1: Norm
    attention: blocks.SelfAttention
    norm1_behind: Norm
    norm2: Norm
    mlp: blocks.MLP
    norm2_behind: Norm


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS, nullable=("attn_logit_softcapping", "final_logit_softcapping"))
    if ConfigReader(config).flag("use_bidirectional_attention", default=False):
        raise CheckpointError("use_bidirectional_attention is not supported", file=blocks.FILE)
    dims = read_dims(config)
    windows = kinds.window_of_sliding(config, kinds.sliding_but_every(config, 2))
    rope = read_rope(config, dims=dims.head_dim)
    softcap = ConfigReader(config).number("attn_logit_softcapping", 0.0) or None
    spec = partial(Attention, dims.num_heads, dims.num_kv_heads, dims.head_dim, query_scale(config), rope)
    bias = ConfigReader(config).flag("attention_bias", default=False)
    layers = [layer(dims, index, bias=bias) for index in range(dims.num_layers)]
    return model(config, dims, layers, [spec(window=window, softcap=softcap) for window in windows])


def read_dims(config: Mapping[str, JSON]) -> Dims:
    """The sizes of a Gemma 2 or 3. Raises CheckpointError."""
    return blocks.read_dims(config, activation="hidden_activation")


def query_scale(config: Mapping[str, JSON]) -> float:
    """What scores are multiplied by. Raises CheckpointError."""
    return 1 / math.sqrt(ConfigReader(config).positive("query_pre_attn_scalar"))


def norm(dims: Dims, name: str) -> Norm:
    """Declare a norm over the residual stream; its weight is stored less 1."""
    return Norm(name, dims.hidden_size, dims.eps, offset=1.0)


def layer(dims: Dims, index: int, *, bias: bool) -> Layer:
    """Declare a Gemma 2's layer."""
    name = f"model.layers.{index}"
    return Layer(
        norm(dims, f"{name}.input_layernorm"),
        blocks.attention(dims, name, qkv_bias=bias, out_bias=bias),
        norm(dims, f"{name}.post_attention_layernorm"),
        norm(dims, f"{name}.pre_feedforward_layernorm"),
        blocks.mlp(dims, name),
        norm(dims, f"{name}.post_feedforward_layernorm"),
    )


def model(config: Mapping[str, JSON], dims: Dims, layers: Sequence[Layer], specs: Sequence[Attention]) -> Model:
    """The model of a Gemma 2 or 3 with these layers and attentions. Raises CheckpointError."""
    weights = blocks.decoder_with(dims, layers, norm(dims, "model.norm"))
    softcap = ConfigReader(config).number("final_logit_softcapping", 0.0)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.scale(ops.embed(weights.embed), dims.hidden_size**0.5), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.residual(between_norms(ops, x, w, index, spec), index + 1)
        return ops.rms_norm(x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.softcap(scores, softcap) if softcap else scores

    return blocks.model_with(dims, weights, specs, forward, finish)


def between_norms(ops: Ops[Tensor], x: Tensor, w: Layer, index: int, spec: Attention) -> Tensor:
    """A layer. Shapes: x (T, D); returns (T, D)."""
    looked = blocks.gqa(ops, ops.rms_norm(x, w.norm1), w.attention, index, spec)
    x = ops.add(x, ops.rms_norm(looked, w.norm1_behind))
    made = blocks.swiglu(ops, ops.rms_norm(x, w.norm2), w.mlp)
    return ops.add(x, ops.rms_norm(made, w.norm2_behind))


def gguf_config(metadata: GGUFMetadata, *, largest: int, theta: float = 10000.0) -> gguf.Config:
    """What a config.json says, from a Gemma's metadata; the scale of scores by how many layers the largest has."""
    config = gguf.decoder_config(metadata)
    width, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    layers = metadata.count("block_count")
    said: gguf.Config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon") or 1e-6,
        "rope_theta": metadata.real("rope.freq_base") or theta,
        "query_pre_attn_scalar": width // heads if layers == largest else config["head_dim"],
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": gguf.layer_types(metadata, 2),
        "attn_logit_softcapping": metadata.real("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.real("final_logit_softcapping"),
    }
    return config | {key: value for key, value in said.items() if value is not None}


ARCHITECTURE = Architecture(
    hf=("Gemma2ForCausalLM",),
    gguf=(
        gguf.layout(
            "gemma2",
            hf="Gemma2ForCausalLM",
            model_type="gemma2",
            config=partial(gguf_config, largest=_LARGEST),
            norm_shift=1.0,
            half="bfloat16",
            post_attention_norm="post_attention_layernorm",
            ffn_norm="pre_feedforward_layernorm",
            post_ffw_norm="post_feedforward_layernorm",
        ),
    ),
    build=build,
)
