"""The same weights as a GGUF file, the way llama.cpp's converter lays them out.

Facts of the format: dimension names and metadata keys of llama.cpp b4000 and later; the `llama` architecture rotates
neighbouring pairs where Hugging Face rotates halves, so the rows of q and k are reordered in each head; the llama3
scaling of rope becomes a tensor of divisors; yarn and linear become metadata.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants
from tiny_tokenizer import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL
from tokenizers import Tokenizer

Arrays = dict[str, np.ndarray]
BLOCK = 32

TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# Numbers of recurrent layers that only look like matrices.
NEVER_QUANTIZED = ("conv1d.weight", "conv.weight", "norm.weight", "ssm_a", "ssm_d")


def _nothing(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Nothing besides."""


def _no_numbers(writer: gguf.GGUFWriter, weights: Arrays) -> Arrays:
    """None of them is metadata."""
    return {}


def as_they_are(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return weights


@dataclass(frozen=True, slots=True)
class Twin:
    """How llama.cpp's converter writes a family."""

    arch: str
    """`general.architecture`."""
    layer: Mapping[str, str] = field(default_factory=dict)
    """GGUF's names of a layer's tensors that are not in LAYER, or otherwise, by Hugging Face's; "" is left out."""
    interleaved: tuple[str, ...] = ()
    """Projections whose rows are reordered in each head."""
    metadata: Callable[[gguf.GGUFWriter, Mapping[str, Any]], None] = _nothing
    """Writes the keys that not every architecture has."""
    numbers: Callable[[gguf.GGUFWriter, Arrays], Arrays] = _no_numbers
    """Writes those weights that are metadata there, and returns them."""
    stored: Callable[[Arrays, Mapping[str, Any]], Arrays] = as_they_are
    """The weights as they are stored, under Hugging Face's names or GGUF's; what changes their values or shapes."""
    restored: Callable[[Arrays, Mapping[str, Any]], Arrays] = as_they_are
    """The other way round."""

    norm_shift: float = 0.0
    """What is added to the weights of norms."""
    top: Mapping[str, str] = field(default_factory=dict)
    """GGUF's names of tensors outside of layers that are not in TOP, by Hugging Face's."""
    layers: str = "model.layers."
    """What Hugging Face's names of a layer's tensors begin with."""
    own_dims: bool = False
    """`metadata` writes all keys but those of the vocabulary."""

    def name(self, name: str) -> str:
        """GGUF's name of a tensor."""
        module, _, kind = name.rpartition(".")
        top, layer = TOP | self.top, LAYER | self.layer
        if module in top:
            return f"{top[module]}.{kind}"
        if not name.startswith(self.layers):
            return name
        number, _, whole = name.removeprefix(self.layers).partition(".")
        inner = whole.removesuffix(f".{kind}")
        # Numbers that are no matrix have a name of their own for all of theirs.
        return f"blk.{number}.{layer[whole]}" if whole in layer else f"blk.{number}.{layer[inner]}.{kind}"

    def heads(self, name: str, config: Mapping[str, Any]) -> int:
        """How many heads this tensor's rows are, if the format reorders them; else 0."""
        if not any(part in name for part in self.interleaved):
            return 0
        return int(config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])


def halves_to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows: 0, d/2, 1, d/2 + 1, ... Shapes: (heads * d, ...) both ways."""
    head_dim = rows.shape[0] // heads
    order = np.arange(head_dim).reshape(2, head_dim // 2).T.ravel()
    return rows.reshape(heads, head_dim, -1)[:, order].reshape(rows.shape)


def pairs_to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    head_dim = rows.shape[0] // heads
    order = np.arange(head_dim).reshape(head_dim // 2, 2).T.ravel()
    return rows.reshape(heads, head_dim, -1)[:, order].reshape(rows.shape)


def rope_divisors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Llama 3's scaling as what each frequency is divided by. Source: the Llama 3.1 release's description."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / (kept + (1 - kept) / scaling["factor"])).astype(np.float32)


def write_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any], head_dim: int) -> None:
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    scaling = (scaling or {}).get("full_attention", scaling)
    theta = float(config["rope_theta"] if "rope_theta" in config else scaling["rope_theta"])
    if scaling and "alpha" in scaling:
        theta *= scaling["alpha"] ** (head_dim / (head_dim - 2))
    writer.add_rope_freq_base(theta)
    share = (scaling or {}).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(int(head_dim * share))
    match scaling and (scaling.get("rope_type") or scaling["type"]):
        case None | "default" | "mrope":
            pass
        case "llama3":
            writer.add_tensor("rope_freqs.weight", rope_divisors(scaling, config["rope_theta"], head_dim))
        case "proportional":
            pairs = head_dim // 2
            turning = np.arange(pairs) < int(pairs * scaling["partial_rotary_factor"])
            writer.add_tensor("rope_freqs.weight", np.where(turning, 1.0, 1e30).astype(np.float32))
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling["factor"])
        case "dynamic" if "alpha" in scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
            writer.add_rope_scaling_factor(1.0)
        case "longrope":
            writer.add_rope_scaling_attn_factors(scaling["attention_factor"])
            for reach in ("long", "short"):
                factors = np.array(scaling[f"{reach}_factor"], np.float32)
                writer.add_tensor(f"rope_factors_{reach}.weight", factors)
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(scaling["factor"])
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        case other:
            raise SystemExit(f"no GGUF twin for rope scaling {other}")


def write_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], head_dim: int) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    if "intermediate_size" in config:
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        names = ("layer_norm_eps", "norm_epsilon", "norm_eps")
        writer.add_layer_norm_eps(next(config[name] for name in names if name in config))
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["model_type"] == "llama":
        writer.add_vocab_size(config["vocab_size"])


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, *, bos: bool = False) -> None:
    state = json.loads(tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {*SPECIAL, *(each.content for each in tokenizer.get_added_tokens_decoder().values() if each.special)}
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(CHAT_TEMPLATE)


def write(
    path: Path,
    twin: Twin,
    config: Mapping[str, Any],
    weights: Arrays,
    tokenizer: Tokenizer,
    kind: str = "F32",
    *,
    bos: bool = False,
) -> Arrays:
    """Write the file; returns the weights as a reader gets them back, under their Hugging Face names."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config.get("num_attention_heads", 1)
    head_dim = config.get("global_head_dim") or head_dim
    writer = gguf.GGUFWriter(path, twin.arch)
    if not twin.own_dims:
        write_metadata(writer, config, head_dim)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind}"])
    if not twin.own_dims:
        write_rope(writer, config, head_dim)
    twin.metadata(writer, config)
    write_vocabulary(writer, tokenizer, bos=bos)
    stored: Arrays = {}
    numbers = twin.numbers(writer, weights)
    tensors = {name: weight for name, weight in weights.items() if name not in numbers}
    for name, weight in twin.stored(tensors, config).items():
        heads = twin.heads(name, config)
        shift = twin.norm_shift if name.endswith("norm.weight") else 0.0
        value = halves_to_pairs(weight, heads) if heads else weight + np.float32(shift)
        # A row that does not divide into blocks stays as it is.
        divides = value.ndim == 2 and value.shape[1] % BLOCK == 0
        if kind != "F32" and divides and not twin.name(name).endswith(NEVER_QUANTIZED):
            blocks = gguf.GGMLQuantizationType[kind]
            packed = quants.quantize(value, blocks)
            writer.add_tensor(twin.name(name), packed, raw_dtype=blocks)
            value = quants.dequantize(packed, blocks)
        else:
            writer.add_tensor(twin.name(name), np.ascontiguousarray(value))
        stored[name] = pairs_to_halves(value, heads) if heads else value - np.float32(shift)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return twin.restored(stored, config) | numbers
