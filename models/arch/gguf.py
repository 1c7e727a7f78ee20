"""How llama.cpp's converter writes a decoder: the names of tensors, and the metadata in a config.json's words.

An architecture says in its own file which of this it has and what it has besides. Source: llama.cpp
`convert_hf_to_gguf.py` and `gguf-py/gguf/constants.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.config_reader import JSON
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata

Config: TypeAlias = dict[str, JSON]
Array: TypeAlias = npt.NDArray[np.float32]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def decoder_config(metadata: GGUFMetadata, *, per_layer: bool = False) -> Config:
    """What a config.json says of a decoder, from the keys that every architecture has.

    `per_layer`: layers may differ in the width of the MLP and in heads; the first one's are given.

    Raises:
        CheckpointError: the metadata lacks what every model needs, or holds impossible values.
    """
    hidden = metadata.count("embedding_length")
    heads = _first(metadata, "attention.head_count") if per_layer else metadata.count("attention.head_count")
    head_dim = metadata.integer("attention.key_length") or hidden // heads
    if head_dim == 0:
        raise CheckpointError(f"its metadata has {heads} attention heads for a width of {hidden}", file=metadata.file)
    embedding = metadata.shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError("is missing or no matrix", file=metadata.file, tensor="token_embd.weight")
    kv_heads, width = metadata.integer, metadata.count
    if per_layer:
        kv_heads, width = partial(_first, metadata), partial(_first_width, metadata)
    config: Config = {
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "intermediate_size": width("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon") or 1e-5,
        "rope_theta": metadata.real("rope.freq_base") or 10000.0,
        "rope_scaling": rope_scaling(metadata),
        "vocab_size": embedding[0],
        "max_position_embeddings": metadata.count("context_length"),
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        "attention_bias": "blk.0.attn_q.bias" in metadata.shapes,
        "mlp_bias": "blk.0.ffn_down.bias" in metadata.shapes,
    }
    rotated = metadata.integer("rope.dimension_count") or head_dim
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    return config


def _first(metadata: GGUFMetadata, name: str) -> int:
    values = metadata.each(name, metadata.count("block_count"))
    return values[0] if values else metadata.count(name)


def _first_width(metadata: GGUFMetadata, name: str) -> int:
    """The width of the first layer's MLP; where the file has none for there are mixtures alone, that of an expert."""
    widths = metadata.each(name, metadata.count("block_count")) or [0]
    return widths[0] or metadata.integer("expert_feed_forward_length") or _first(metadata, name)


def windowed_config(metadata: GGUFMetadata) -> Config:
    """The same for one whose layers all have the sliding window that the file may name."""
    window = metadata.integer("attention.sliding_window")
    if not window:
        return decoder_config(metadata)
    return decoder_config(metadata) | {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}


def with_axes(config: Config, metadata: GGUFMetadata) -> Config:
    """The same for one whose pairs turn by several axes, in the sections that the file names.

    Raises:
        CheckpointError: the metadata holds impossible values.
    """
    # Ollama's converter has a key of its own.
    keys = ("rope.dimension_sections", "rope.mrope_section")
    sections = next((found for key in keys if (found := metadata.each(key, 3)) is not None), None)
    scaling = config["rope_scaling"]
    if sections is None:
        return config
    return config | {"rope_scaling": {**(scaling if isinstance(scaling, dict) else {}), "mrope_section": [*sections]}}


def layer_types(metadata: GGUFMetadata, interval: int) -> JSON:
    """A config.json's `layer_types`, where all but the last of every so many slide unless the file says otherwise."""
    layers = metadata.count("block_count")
    slides = metadata.flags("attention.sliding_window_pattern", layers)
    if slides is None:
        interval = metadata.integer("attention.sliding_window_pattern") or interval
        slides = [(layer + 1) % interval != 0 for layer in range(layers)]
    has_window = bool(metadata.integer("attention.sliding_window"))
    return ["sliding_attention" if has_window and each else "full_attention" for each in slides]


def encoder_config(metadata: GGUFMetadata) -> Config:
    """What a config.json says of an encoder, in BERT's words and in GPT-2's, which Nomic BERT's speaks."""
    config = decoder_config(metadata)
    kinds = metadata.shapes.get("token_types.weight")
    eps = metadata.real("attention.layer_norm_epsilon") or 1e-12
    return config | {
        "hidden_act": "gelu",
        "layer_norm_eps": eps,
        "type_vocab_size": 0 if kinds is None else kinds[0] if len(kinds) > 1 else 1,
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": eps,
        "rotary_emb_base": metadata.real("rope.freq_base") or 1000.0,
    }


def rope_scaling(metadata: GGUFMetadata) -> JSON:
    """A config.json's `rope_scaling`. Llama 3's stands in a tensor, the divisors of the frequencies."""
    factors = metadata.vector("rope_freqs.weight")
    if factors is not None and any(factor != 1 for factor in factors):
        return {"rope_type": "factors", "factors": list(factors)}
    # Ollama's converter writes an empty one where there is none.
    kind = metadata.text("rope.scaling.type") or None
    factor = metadata.real("rope.scaling.factor") or metadata.real("rope.scale_linear") or 0.0
    if kind in (None, "linear") and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or not factor:
        return None if kind in (None, "none", "linear", "yarn") else {"rope_type": kind, "factor": factor}
    scaling: dict[str, JSON] = {"rope_type": "yarn", "factor": factor}
    original = metadata.integer("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    attention = metadata.real("rope.scaling.attn_factor") or metadata.real("rope.scaling.yarn_attn_factor")
    if attention and attention != 1:
        # llama.cpp multiplies YaRN's own factor by this; Hugging Face's attention_factor replaces it.
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    for key in ("beta_fast", "beta_slow"):
        beta = metadata.real(f"rope.scaling.yarn_{key}")
        if beta:
            scaling[key] = beta
    return scaling


def _always(_: GGUFMetadata) -> bool:
    return True


def _no_numbers(_: GGUFMetadata) -> Mapping[str, Array]:
    return {}


@dataclass(frozen=True, slots=True)
class GGUFLayout:
    """How llama.cpp's converter writes an architecture."""

    architectures: tuple[str, ...]
    """Values of `general.architecture`."""
    hf: str
    """What config.json's `architectures` would say."""
    model_type: str
    top: Mapping[str, str]
    """Hugging Face's names of the tensors outside of layers, without `.weight`, by GGUF's."""
    layer: Mapping[str, str]
    """The same within a layer."""
    interleaved: tuple[str, ...] = ()
    """Tensors of a layer whose heads have their rows interleaved (a rope that pairs neighbours; ours pairs halves)."""
    bare: tuple[str, ...] = ()
    """Tensors of a layer whose Hugging Face names are whole, without `.weight`."""
    config: Callable[[GGUFMetadata], Config] = windowed_config
    """The rest of config.json. Raises CheckpointError."""
    applies: Callable[[GGUFMetadata], bool] = _always
    """Whether a file of one of `architectures` is of this kind; the converter writes several models under one name."""
    norm_shift: float = 0.0
    """What the converter adds to the weights of norms."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of names of tensors that are no part of the text model: Ollama's converter writes a whole model."""
    layers: str = "model.layers"
    """What the names within layers begin with, before the layer's number."""
    half: str = "float16"
    """The type of 16 bits to compute in; some activations leave float16's range."""
    rates: tuple[str, ...] = ()
    """Tensors of a layer that are stored as -exp(x) of what Hugging Face has."""
    numbers: Callable[[GGUFMetadata], Mapping[str, Array]] = _no_numbers
    """Small tensors, by Hugging Face's whole names, that the file has among its metadata. Raises CheckpointError."""
    dense: tuple[str, ...] = ()
    """Matrices behind pooling, in order, where a file has them; each is a component `linear` of that name."""


def layout(
    *architectures: str,
    hf: str,
    model_type: str,
    interleaved: tuple[str, ...] = (),
    bare: tuple[str, ...] = (),
    config: Callable[[GGUFMetadata], Config] = windowed_config,
    applies: Callable[[GGUFMetadata], bool] = _always,
    norm_shift: float = 0.0,
    other_parts: tuple[str, ...] = (),
    half: str = "float16",
    rates: tuple[str, ...] = (),
    numbers: Callable[[GGUFMetadata], Mapping[str, Array]] = _no_numbers,
    dense: tuple[str, ...] = (),
    top: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    **layer: str,
) -> GGUFLayout:
    """The layout of a decoder; `names` and `layer` name the layer's tensors that it has besides, or otherwise.

    `top` names those outside of layers that it has besides.

    An empty name is of a tensor that it lacks.
    """
    own = {gguf: hf for gguf, hf in (_LAYER | dict(names or {}) | layer).items() if hf}
    whole = _TOP | dict(top or {})
    return GGUFLayout(
        architectures,
        hf,
        model_type,
        whole,
        own,
        interleaved=interleaved,
        bare=bare,
        config=config,
        applies=applies,
        norm_shift=norm_shift,
        other_parts=other_parts,
        half=half,
        rates=rates,
        numbers=numbers,
        dense=dense,
    )
