"""Gemma 3: a Gemma 2 with norms on each head's query and key, and another rope for the layers with a window.

Source: transformers' `modeling_gemma3`; llama.cpp `conversion/gemma.py`, Gemma3Model; ollama v0.17.0
convert/convert_gemma3.go for its own keys and the vision tensors in the same file.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from models.arch import blocks, gemma2, gguf, kinds
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Norm

_DEFAULTS: Mapping[str, JSON] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_LARGEST = 62
_SCALED_CONTEXT = 131072
"""Ollama's files of models made for so many tokens do not say that their rope is stretched eight times."""


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    if ConfigReader(config).flag("use_bidirectional_attention", default=False):
        raise CheckpointError("use_bidirectional_attention is for models of embeddings", file=blocks.FILE)
    return build_with(config, bidirectional=False)


def build_with(config: Mapping[str, JSON], *, bidirectional: bool) -> Model:
    """The model of a Gemma 3, perhaps one whose tokens see those behind them as well. Raises CheckpointError."""
    config = blocks.completed(config, _DEFAULTS)
    reader, dims = ConfigReader(config), gemma2.read_dims(config)
    sliding = kinds.sliding_but_every(config, reader.size("sliding_window_pattern", 6))
    ropes = kinds.ropes_by_kind(
        config, dims.head_dim, full=1_000_000.0, sliding=reader.number("rope_local_base_freq", 10000.0)
    )
    if reader.number("attn_logit_softcapping", 0.0):
        raise CheckpointError("attn_logit_softcapping is not supported", file=blocks.FILE)
    spec = partial(Attention, dims.num_heads, dims.num_kv_heads, dims.head_dim, gemma2.query_scale(config))
    specs = [
        spec(
            ropes[slides],
            window=_both_ways(window) if bidirectional else window,
            bidirectional=bidirectional,
            two_way=not bidirectional,
        )
        for slides, window in zip(sliding, kinds.window_of_sliding(config, sliding), strict=True)
    ]
    bias = reader.flag("attention_bias", default=False)
    layers = [_layer(dims, index, bias=bias) for index in range(dims.num_layers)]
    return gemma2.model(config, dims, layers, specs)


def _both_ways(window: int | None) -> int | None:
    """The window of a layer that looks both ways: half of it to each side."""
    return None if window is None else window // 2 + 1


def _layer(dims: blocks.Dims, index: int, *, bias: bool) -> gemma2.Layer:
    layer = gemma2.layer(dims, index, bias=bias)
    q_norm, k_norm = (
        Norm(f"model.layers.{index}.self_attn.{part}_norm", dims.head_dim, dims.eps, offset=1.0) for part in "qk"
    )
    return replace(layer, attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm))


def gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    """What a config.json says, from the metadata of a Gemma 3."""
    config = gemma2.gguf_config(metadata, largest=_LARGEST, theta=1_000_000.0)
    if config["rope_scaling"] is None and metadata.count("context_length") >= _SCALED_CONTEXT:
        config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    return config | {
        "layer_types": gguf.layer_types(metadata, 6),
        "rope_theta": metadata.real("rope.freq_base") or metadata.real("rope.global.freq_base") or 1_000_000.0,
        "rope_local_base_freq": metadata.real("rope.freq_base_swa") or metadata.real("rope.local.freq_base"),
    }


def pools(metadata: GGUFMetadata) -> bool:
    """Whether a file is one for embeddings."""
    return bool(metadata.integer("pooling_type"))


layout = partial(
    gguf.layout,
    model_type="gemma3_text",
    norm_shift=1.0,
    half="bfloat16",
    other_parts=("v.", "mm."),
    attn_q_norm="self_attn.q_norm",
    attn_k_norm="self_attn.k_norm",
    post_attention_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    post_ffw_norm="post_feedforward_layernorm",
)
"""How a GGUF file of this architecture is written, whatever it is for."""

ARCHITECTURE = Architecture(
    hf=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf=(
        layout(
            "gemma3",
            hf="Gemma3ForCausalLM",
            config=gguf_config,
            applies=lambda metadata: not pools(metadata),
        ),
    ),
    build=build,
    other_parts=("vision_tower.", "multi_modal_projector."),
)
