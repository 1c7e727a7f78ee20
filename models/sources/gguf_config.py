"""GGUF's metadata and tensor names in Hugging Face's words."""

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from models.arch import GGUFNames, gguf_names
from models.errors import CheckpointError
from models.sources.base import JSON
from models.sources.gguf_header import GGUFHeader, MetadataValue

# Constants of the rotary embedding; they reach the model by the configuration.
_FOLDED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str, names: GGUFNames | None) -> str | None:
    """A tensor's Hugging Face name; None for one that is no weight. An unknown name stays, for the loader to refuse."""
    if _FOLDED.fullmatch(name):
        return None
    if names is None:
        return name
    match = _IN_LAYER.fullmatch(name)
    if match and match[2] in names.layer:
        return f"{names.layers}.{match[1]}.{names.layer[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{names.top[stem]}.{kind}" if stem in names.top else name


def unpermuted_rows(name: str, rows: int, config: Mapping[str, JSON], file: str) -> npt.NDArray[np.intp] | None:
    """The order of rows that undoes llama.cpp's reordering of a q or k projection; None where nothing was reordered.

    llama.cpp interleaves the two halves of each head. Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.

    Raises:
        CheckpointError: the rows do not divide into the heads.
    """
    match = _IN_LAYER.fullmatch(name)
    names = gguf_names(str(config.get("gguf_architecture")))
    if match is None or names is None or match[2] not in names.interleaved:
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
    window = metadata.integer("attention.sliding_window")
    experts = metadata.integer("expert_count") or 0
    names = _names(metadata.arch, windowed=bool(window))
    tensors = header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("is missing or no matrix", file=file, tensor="token_embd.weight")
    config: dict[str, JSON] = {
        "gguf_architecture": metadata.arch,
        "architectures": [_architecture(metadata.arch, names, experts)],
        "model_type": names.model_type if names else metadata.arch,
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
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "torch_dtype": _dtype({each.kind.name for each in tensors.values() if len(each.shape) > 1}),
    }
    rotated = metadata.integer("rope.dimension_count") or head_dim
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if window:
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": metadata.count("expert_used_count")}
    config |= _of_embeddings(metadata)
    if names is not None and names.is_encoder:
        config |= _of_encoder(metadata, header, config)
    for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        value = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if isinstance(value, int):
            config[key] = value
    return config


def _of_embeddings(metadata: "_Metadata") -> dict[str, JSON]:
    """What the file says of how a text becomes one vector."""
    config: dict[str, JSON] = {}
    if (pooling := metadata.integer("pooling_type")) is not None:
        config["gguf_pooling_type"] = pooling
    if (normalize := metadata.flag("normalize_embeddings")) is not None:
        config["gguf_normalize_embeddings"] = normalize
    return config


def _of_encoder(metadata: "_Metadata", header: GGUFHeader, config: Mapping[str, JSON]) -> dict[str, JSON]:
    """BERT's words, and GPT-2's, which Nomic BERT's configuration speaks."""
    kinds = header.tensors.get("token_types.weight")
    eps = metadata.real("attention.layer_norm_epsilon") or 1e-12
    return {
        "hidden_act": "gelu",
        "layer_norm_eps": eps,
        "type_vocab_size": 0 if kinds is None else kinds.shape[0] if len(kinds.shape) > 1 else 1,
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": eps,
        "rotary_emb_base": metadata.real("rope.freq_base") or 1000.0,
    }


def _dtype(kinds: set[str]) -> str:
    """The type of the matrices; the scales of block formats are float16."""
    if kinds == {"F32"}:
        return "float32"
    return "bfloat16" if "BF16" in kinds else "float16"


def _names(arch: str, *, windowed: bool) -> GGUFNames | None:
    """The names of an architecture. llama.cpp writes a Mistral as a Llama; only Mistral has a window."""
    return gguf_names("mistral" if arch == "llama" and windowed else arch)


def _architecture(arch: str, names: GGUFNames | None, experts: int) -> str:
    if names is None:
        return arch
    # llama.cpp writes a Mixtral as a Llama with experts.
    return "MixtralForCausalLM" if experts and arch in ("llama", "mistral") else names.hf


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

    def flag(self, name: str) -> bool | None:
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value)
        return value

    def text(self, name: str) -> str | None:
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value)
        return value
