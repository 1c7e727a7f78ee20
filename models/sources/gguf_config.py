"""A GGUF file in Hugging Face's words: names, order of rows and configuration, as the architecture's layout says."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from models.arch import GGUFLayout
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.sources.base import JSON
from models.sources.gguf_header import GGUFHeader

# Constants of the rotary embedding; they reach the model by the configuration.
_FOLDED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
# Numbers that are no matrix, as a state space's rates, have no `.weight`.
_IN_LAYER = re.compile(r"blk\.(\d+)\.([\w.]+?)(?:\.(weight|bias|scale))?")


def hf_name(name: str, layout: GGUFLayout | None) -> str | None:
    """A tensor's Hugging Face name; None for one that is no weight. An unknown name stays, for the loader to refuse."""
    if _FOLDED.fullmatch(name):
        return None
    if layout is None:
        return name
    if name.startswith(layout.other_parts) or name.removesuffix(".weight") in layout.dense:
        return None
    match = _IN_LAYER.fullmatch(name)
    stem = name.split(".", 2)[2].removesuffix(".weight").removesuffix(".bias") if match else ""
    if match and stem in layout.layer:
        full = f"{layout.layers}.{match[1]}.{layout.layer[stem]}"
        return full if stem in layout.bare or match[3] is None else f"{full}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{layout.top[stem]}.{kind}" if stem in layout.top else name


def stem_in_layer(name: str) -> str:
    """A tensor's name without its layer and its kind; empty for one outside of layers."""
    match = _IN_LAYER.fullmatch(name)
    return match[2] if match else ""


def unpermuted_rows(
    name: str, rows: int, layout: GGUFLayout | None, config: Mapping[str, JSON], file: str
) -> npt.NDArray[np.intp] | None:
    """The order of rows that undoes llama.cpp's reordering of a q or k projection; None where nothing was reordered.

    llama.cpp interleaves the two halves of each head. Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.

    Raises:
        CheckpointError: the rows do not divide into the heads.
    """
    match = _IN_LAYER.fullmatch(name)
    if match is None or layout is None or match[2] not in layout.interleaved:
        return None
    heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    assert isinstance(heads, int)
    if rows % (2 * heads):
        raise CheckpointError(f"{rows} rows do not divide into {heads} heads", file=file, tensor=name)
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def hf_config(header: GGUFHeader, metadata: GGUFMetadata, layout: GGUFLayout | None) -> dict[str, JSON]:
    """A config.json for the model. `gguf_architecture` holds GGUF's own word for it.

    Of an architecture without a layout it says no more than that.

    Raises:
        CheckpointError: the metadata lacks what every model needs, or holds impossible values.
    """
    config: dict[str, JSON] = {
        "gguf_architecture": metadata.arch,
        "architectures": [metadata.arch if layout is None else layout.hf],
        "model_type": metadata.arch if layout is None else layout.model_type,
        "torch_dtype": _dtype(
            {each.kind.name for each in header.tensors.values() if len(each.shape) > 1},
            "float16" if layout is None else layout.half,
        ),
    }
    if (pooling := metadata.integer("pooling_type")) is not None:
        config["gguf_pooling_type"] = pooling
    if (normalize := metadata.flag("normalize_embeddings")) is not None:
        config["gguf_normalize_embeddings"] = normalize
    if layout is not None and layout.dense:
        config["gguf_dense"] = _dense(metadata, layout.dense)
    for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        value = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
        if isinstance(value, int):
            config[key] = value
    return config if layout is None else config | layout.config(metadata)


def _dense(metadata: GGUFMetadata, names: Sequence[str]) -> JSON:
    """The matrices behind pooling that the file has."""
    shapes = {name: shape for name in names if (shape := metadata.shapes.get(f"{name}.weight")) is not None}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise CheckpointError("is no matrix", file=metadata.file, tensor=f"{name}.weight")
    return {name: {"in_features": shape[1], "out_features": shape[0]} for name, shape in shapes.items()}


def _dtype(kinds: set[str], half: str) -> str:
    """The type of the matrices; block formats, whose scales are float16, leave it to the architecture."""
    if kinds == {"F32"}:
        return "float32"
    return "bfloat16" if "BF16" in kinds else half
