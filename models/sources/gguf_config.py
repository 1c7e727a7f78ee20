"""GGUF's metadata and tensor names in Hugging Face's words."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import CheckpointError
from models.sources.base import JSON
from models.sources.gguf_header import GGUFHeader, MetadataValue


@dataclass(frozen=True, slots=True)
class _Family:
    """What GGUF's `general.architecture` is called elsewhere."""

    hf: str
    model_type: str
    permuted: bool = False
    """Whether llama.cpp's converter reorders the rows of q and k (its rope pairs neighbours, ours halves)."""


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", "llama", permuted=True),
    "mistral": _Family("MistralForCausalLM", "mistral", permuted=True),
    "qwen2": _Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _Family("Qwen3ForCausalLM", "qwen3"),
}

_TOP: Mapping[str, str] = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Constants of the rotary embedding; they reach the model by the configuration.
_FOLDED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """A tensor's Hugging Face name; None for one that is no weight. An unknown name stays, for the loader to refuse."""
    if _FOLDED.fullmatch(name):
        return None
    match = _IN_LAYER.fullmatch(name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


def unpermuted_rows(name: str, rows: int, config: Mapping[str, JSON], file: str) -> npt.NDArray[np.intp] | None:
    """The order of rows that undoes llama.cpp's reordering of a q or k projection; None where nothing was reordered.

    llama.cpp interleaves the two halves of each head. Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.

    Raises:
        CheckpointError: the rows do not divide into the heads.
    """
    match = _IN_LAYER.fullmatch(name)
    family = _FAMILIES.get(str(config.get("gguf_architecture")))
    if match is None or family is None or not family.permuted or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    assert isinstance(heads, int)
    if rows % (2 * heads):
        raise CheckpointError(f"{rows} rows do not divide into {heads} heads", file=file, tensor=name)
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def hf_config(header: GGUFHeader, rope_factors: list[float] | None, file: str) -> dict[str, JSON]:
    """A config.json for the model. `gguf_architecture` holds GGUF's own word for it.

    `rope_factors` are the divisors of the rotary frequencies (Llama 3's scaling as llama.cpp stores it).

    Raises:
        CheckpointError: the metadata lacks what every model needs, or holds impossible values.
    """
    metadata = _Metadata(header.metadata, file)
    hidden, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    head_dim = metadata.integer("attention.key_length") or hidden // heads
    if head_dim == 0:
        raise CheckpointError(f"its metadata has {heads} attention heads for a width of {hidden}", file=file)
    family = _FAMILIES.get(metadata.arch)
    window = metadata.integer("attention.sliding_window")
    experts = metadata.integer("expert_count") or 0
    names = header.tensors
    embedding = names.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("is missing or no matrix", file=file, tensor="token_embd.weight")
    config: dict[str, JSON] = {
        "gguf_architecture": metadata.arch,
        "architectures": _architectures(metadata.arch, family, windowed=bool(window), experts=experts),
        "model_type": "mistral"
        if family and family.permuted and window
        else family.model_type
        if family
        else metadata.arch,
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "intermediate_size": metadata.count("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon") or 1e-5,
        "rope_theta": metadata.real("rope.freq_base") or 10000.0,
        "rope_scaling": _rope_scaling(metadata, rope_factors),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": metadata.count("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_down.bias" in names,
        "torch_dtype": _dtype({each.kind.name for each in names.values() if len(each.shape) > 1}),
    }
    rotated = metadata.integer("rope.dimension_count") or head_dim
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": metadata.count("expert_used_count")}
    for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        value = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if isinstance(value, int):
            config[key] = value
    return config


def _dtype(kinds: set[str]) -> str:
    """The type of the matrices; the scales of block formats are float16."""
    if kinds == {"F32"}:
        return "float32"
    return "bfloat16" if "BF16" in kinds else "float16"


def _architectures(arch: str, family: _Family | None, *, windowed: bool, experts: int) -> list[JSON]:
    if family is None:
        return [arch]
    if family.permuted and experts:
        return ["MixtralForCausalLM"]
    # llama.cpp has one name for both; only Mistral has a window.
    return ["MistralForCausalLM" if family.permuted and windowed else family.hf]


def _rope_scaling(metadata: "_Metadata", factors: list[float] | None) -> JSON:
    if factors is not None and any(factor != 1 for factor in factors):
        return {"rope_type": "factors", "factors": list(factors)}
    kind = metadata.text("rope.scaling.type")
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
        scaling["attention_factor"] = attention * (0.1 * float(np.log(factor)) + 1.0)
    for key in ("beta_fast", "beta_slow"):
        beta = metadata.real(f"rope.scaling.yarn_{key}")
        if beta:
            scaling[key] = beta
    return scaling


class _Metadata:
    """The values of one architecture, by their names without the prefix."""

    def __init__(self, values: Mapping[str, MetadataValue], file: str) -> None:
        arch = values.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise CheckpointError("its metadata has no general.architecture", file=file)
        self.arch = arch
        self._values = values
        self._file = file

    def _get(self, name: str) -> "MetadataValue | None":
        value = self._values.get(f"{self.arch}.{name}")
        # Some converters write one value a layer. Alike in every layer, it is one value.
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return value[0]
        return value

    def _wrong(self, name: str, value: "MetadataValue | None") -> CheckpointError:
        shown = repr(value)[:60]
        return CheckpointError(f"its metadata has {self.arch}.{name} = {shown}, which makes no sense", file=self._file)

    def integer(self, name: str) -> int | None:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name, value)
        return value

    def count(self, name: str) -> int:
        value = self.integer(name)
        if value is None:
            raise CheckpointError(f"its metadata has no {self.arch}.{name}", file=self._file)
        if value == 0:
            raise self._wrong(name, value)
        return value

    def real(self, name: str) -> float | None:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value) or value < 0:
            raise self._wrong(name, value)
        return float(value)

    def text(self, name: str) -> str | None:
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value)
        return value
