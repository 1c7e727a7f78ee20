"""OLMo 2 and OLMo 3: norms behind each branch and over all queries and all keys; most layers of OLMo 3 slide.

Source: transformers' `modeling_olmo2` and `modeling_olmo3`; llama.cpp `conversion/olmo.py`, Olmo2Model. Where an older
config.json names a base for the rope, all of OLMo 3's layers have it, as in llama.cpp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from models.arch import blocks, gguf, kinds
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Norm, Ops

_THETA = 500_000.0
_FULL_EVERY = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each before a norm and beside a residual."""

    attention: blocks.SelfAttention
    norm1: Norm
    mlp: blocks.MLP
    norm2: Norm


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, {"rms_norm_eps": 1e-5, "sliding_window": 4096})
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    slides = "Olmo3ForCausalLM" in (reader.texts("architectures") or [])
    specs = _sliding_specs(config, dims) if slides else blocks.attention_specs(config, dims, [None] * dims.num_layers)
    bias = reader.flag("attention_bias", default=False)
    return model(dims, [layer(dims, index, bias=bias) for index in range(dims.num_layers)], specs)


def _sliding_specs(config: Mapping[str, JSON], dims: Dims) -> Sequence[Attention]:
    sliding = kinds.sliding_but_every(config, _FULL_EVERY)
    theta = ConfigReader(config).number("rope_theta", _THETA)
    ropes = kinds.ropes_by_kind(config, dims.head_dim, full=theta, sliding=theta)
    spec = partial(Attention, dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.head_dim**-0.5)
    windows = kinds.window_of_sliding(config, sliding)
    return [spec(ropes[slides], window=window) for slides, window in zip(sliding, windows, strict=True)]


def layer(dims: Dims, index: int, *, bias: bool) -> Layer:
    """Declare an OLMo 2's layer."""
    name = f"model.layers.{index}"
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    q_norm, k_norm = (
        Norm(f"{name}.self_attn.{part}_norm", heads * dims.head_dim, dims.eps)
        for part, heads in (("q", dims.num_heads), ("k", dims.num_kv_heads))
    )
    norm1, norm2 = (
        Norm(f"{name}.post_{branch}_layernorm", dims.hidden_size, dims.eps) for branch in ("attention", "feedforward")
    )
    return Layer(replace(attention, q_norm=q_norm, k_norm=k_norm), norm1, blocks.mlp(dims, name), norm2)


def model(dims: Dims, layers: Sequence[Layer], specs: Sequence[Attention]) -> Model:
    """The model of a decoder whose norms are behind the branches."""
    weights = blocks.decoder(dims, layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.add(x, ops.rms_norm(blocks.gqa(ops, x, w.attention, index, spec), w.norm1))
            x = ops.residual(ops.add(x, ops.rms_norm(blocks.swiglu(ops, x, w.mlp), w.norm2)), index + 1)
        return ops.rms_norm(x, weights.norm)

    return blocks.model_with(dims, weights, specs, forward)


def _has_window(metadata: GGUFMetadata) -> bool:
    """llama.cpp writes an OLMo 3 as an OLMo 2; only OLMo 3 has a window."""
    return bool(metadata.integer("attention.sliding_window"))


def _sliding_config(metadata: GGUFMetadata) -> gguf.Config:
    window = metadata.integer("attention.sliding_window")
    layer_types = gguf.layer_types(metadata, _FULL_EVERY)
    return gguf.decoder_config(metadata) | {"sliding_window": window, "layer_types": layer_types}


NAMES: Mapping[str, str] = {
    "attn_norm": "",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYOUT = gguf.layout(
    "olmo2",
    hf="Olmo2ForCausalLM",
    model_type="olmo2",
    config=gguf.decoder_config,
    names=NAMES,
)

ARCHITECTURE = Architecture(
    hf=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    gguf=(
        replace(_LAYOUT, hf="Olmo3ForCausalLM", model_type="olmo3", config=_sliding_config, applies=_has_window),
        _LAYOUT,
    ),
    build=build,
)
