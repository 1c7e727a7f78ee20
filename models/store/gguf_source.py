"""A GGUF file as a model of the store: one blob, and one of its projector, described by the file's own metadata."""

import math
from collections.abc import Mapping
from pathlib import Path

from models.errors import CheckpointError, QuantizationError
from models.gguf_metadata import GGUFValue
from models.sources.gguf_header import GGUFHeader, read_header
from models.sources.gguf_seeing import SeeingGGUF, open_gguf
from models.store.content import Content, span_of_file
from models.store.description import Rendering, description
from models.store.planned import GGUF_MODEL, PROJECTOR, PlannedLayer, PlannedModel, chat_layers
from models.vision.gguf import PROJECTOR as CLIP

# Source: the enum llama_ftype of llama.cpp; gaps are values that are no longer written.
_FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
}


def plan_gguf(path: Path, quantize: str | None, template: str | None) -> PlannedModel:
    """Plan a model whose weights are one GGUF file, which is stored as it is, with the projector beside it that fits.

    Raises:
        CheckpointError: the file is damaged, truncated, or only a part of a model.
        QuantizationError: it cannot be quantised as asked.
    """
    header = read_header(path)
    if quantize is not None:
        raise QuantizationError(f"{path}: a GGUF file is stored as it is; create it without --quantize")
    _check_whole_model(path, header)
    metadata = header.metadata
    architecture = str(metadata.get("general.architecture") or "unknown")
    elements = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    described = description(
        model_format="gguf",
        family=architecture,
        parameter_size=human_number(elements),
        file_type=gguf_file_type(metadata.get("general.file_type")),
    )
    chat_template = metadata.get("tokenizer.chat_template")
    own = chat_template if isinstance(chat_template, str) else ""
    layers, notes = chat_layers(template, own, Rendering("", ""), _eos_token(metadata))
    models = [PlannedLayer(GGUF_MODEL, Content((span_of_file(path),)))]
    opened = open_gguf(path, str(path), beside=True)
    if isinstance(opened, SeeingGGUF) and opened.projector_path is not None:
        models.append(PlannedLayer(PROJECTOR, Content((span_of_file(opened.projector_path),))))
        described["model_families"] = [architecture, CLIP]
        notes = [*notes, f"projector: {opened.projector_path.name}"]
    return PlannedModel("gguf", (), [*models, *layers], described, notes)


def _check_whole_model(path: Path, header: GGUFHeader) -> None:
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"it holds no model of its own, but a part of one: {kind}", file=str(path))
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"it is one of {parts} parts of a model; put them together with llama-gguf-split --merge", file=str(path)
        )


def _eos_token(metadata: Mapping[str, GGUFValue]) -> str | None:
    """The text of the token that ends an answer."""
    tokens, place = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.eos_token_id")
    token = tokens[place] if isinstance(tokens, list) and isinstance(place, int) and 0 <= place < len(tokens) else None
    return token if isinstance(token, str) else None


def gguf_file_type(value: object) -> str:
    """What Ollama calls the quantisation that a GGUF file declares."""
    return _FILE_TYPES.get(value, "unknown") if isinstance(value, int) else "unknown"


def human_number(count: int) -> str:
    """A count of parameters as Ollama shows it: 135M, 1.5B. Source: ollama v0.32.5 format/format.go."""
    if count >= 10**9:
        return f"{count // 10**9}B" if count % 10**9 == 0 else f"{count / 1e9:.1f}B"
    if count >= 10**6:
        return f"{count // 10**6}M" if count % 10**6 == 0 else f"{count / 1e6:.2f}M"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)
