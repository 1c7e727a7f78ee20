"""How GGUF files hold a vision tower: in a projector file beside the text model, or among the latter's tensors.

llama.cpp's converter writes the former, Ollama's the latter. A family declares which tensors are which, how their
values go back, and what config.json and the processor's files would say. Source: llama.cpp `conversion/base.py`
(MmprojModel), `gguf-py/gguf/constants.py` and `tensor_mapping.py`, `tools/mtmd/clip.cpp`; Ollama v0.24.0 `convert`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from models.config_reader import JSON
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata

Config: TypeAlias = dict[str, JSON]
Tokens: TypeAlias = Callable[[str], int | None]
"""The id of a token of the text model's vocabulary by its text; None: there is none."""

PROJECTOR = "clip"
"""`general.architecture` of a projector file."""
_NUMBERED = re.compile(r"(v\.\w+\.)(\d+)(\..+)")
_LAYERS = "v.blk."
_UP, _DOWN = "v.blk.{n}.ffn_up", "v.blk.{n}.ffn_down"


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that a file has in several pieces; `{n}` in names is the layer."""

    name: str
    """Hugging Face's whole name."""
    pieces: tuple[str, ...]
    """GGUF's whole names, in order."""
    axis: int = 0
    stacked: bool = False
    """The pieces lie along a new axis; else along one that they have."""
    within: int = 0
    """How long the second axis is, where a piece's first one holds the first two; 0: it does not."""


def _always(_: GGUFMetadata) -> bool:
    return True


def _as_it_is(config: Mapping[str, JSON]) -> Config:
    return dict(config)


@dataclass(frozen=True, slots=True)
class ProjectorLayout:
    """How files hold the tower of a family."""

    hf: str
    """What config.json's `architectures` would say of the whole model."""
    model_type: str
    texts: tuple[str, ...]
    """Values of `general.architecture` of the text models it goes with."""
    names: Mapping[str, str]
    """Hugging Face's names by GGUF's, whole or without `.weight` and `.bias`; `{n}` is the layer, or another number."""
    width: tuple[str, int]
    """A tensor, and the axis of it that is as long as the text model is wide."""
    config: Callable[[GGUFMetadata, Tokens], Config]
    """What config.json says besides `text_config`, `vision_config` included. Raises CheckpointError."""
    files: Callable[[GGUFMetadata], Mapping[str, Config]]
    """The processor's files by name. Raises CheckpointError."""
    types: tuple[str, ...] = ()
    """Values of `clip.projector_type`; none: the tower is in the text model's own file."""
    applies: Callable[[GGUFMetadata], bool] = _always
    """Whether a file that says so is of this kind."""
    made: tuple[Made, ...] = ()
    norms: tuple[str, ...] = ()
    """Norms whose weights are stored with 1 added, by GGUF's whole names."""
    interleaved: tuple[str, ...] = ()
    """Ends of names, without `.weight`, of tensors whose heads have their rows interleaved."""
    unused: tuple[str, ...] = ()
    """Beginnings of names of tensors that nothing needs."""
    exits: str = ""
    """What the names begin with whose numbers are of layers, where Hugging Face counts those that have such tensors."""
    text: Callable[[Mapping[str, JSON]], Config] = _as_it_is
    """What the text model's config.json says within the whole one."""

    def hf_name(self, name: str, metadata: GGUFMetadata) -> str | None:
        """A tensor's Hugging Face name; None for a piece and for what nothing needs.

        Raises:
            CheckpointError: the layout knows no such tensor.
        """
        match = _NUMBERED.fullmatch(name)
        number, pattern = (match[2], f"{match[1]}{{n}}{match[3]}") if match else ("", name)
        if name.startswith(self.unused) or any(pattern in made.pieces for made in self.made):
            return None
        stem, dot, kind = pattern.rpartition(".")
        found = self.names.get(pattern)
        if found is None and (module := self.names.get(_uncrossed(stem, metadata))) is not None:
            found = f"{module}{dot}{kind}"
        if found is None:
            raise CheckpointError("the projector has no such tensor", file=metadata.file, tensor=name)
        if match and match[1] == self.exits:
            number = str(numbers_in(metadata, self.exits).index(int(number)))
        return found.replace("{n}", number)

    def made_in(self, metadata: GGUFMetadata) -> Mapping[str, tuple[Made, tuple[str, ...]]]:
        """The tensors in pieces that a file has: the pieces' whole names by Hugging Face's whole name."""
        numbers = [str(number) for number in numbers_in(metadata, _LAYERS)]
        found: dict[str, tuple[Made, tuple[str, ...]]] = {}
        for made in self.made:
            for number in numbers if "{n}" in made.name else ("",):
                pieces = tuple(piece.replace("{n}", number) for piece in made.pieces)
                if any(piece in metadata.shapes for piece in pieces):
                    found[made.name.replace("{n}", number)] = (made, pieces)
        return found


def _uncrossed(stem: str, metadata: GGUFMetadata) -> str:
    """The name that a part of an MLP should have: older converters call each matrix by the other's name.

    Source: llama.cpp `tools/mtmd/clip.cpp`, `is_ffn_swapped`.
    """
    if stem not in (_UP, _DOWN):
        return stem
    shape = metadata.shapes.get("v.blk.0.ffn_down.weight", ())
    crossed = len(shape) == 2 and shape[0] > shape[1] == metadata.integer("vision.embedding_length")
    return stem if not crossed else _DOWN if stem == _UP else _UP


def numbers_in(metadata: GGUFMetadata, start: str) -> list[int]:
    """The numbers, in order, that tensors have whose names begin so."""
    matches = (_NUMBERED.fullmatch(name) for name in metadata.shapes if name.startswith(start))
    return sorted({int(match[2]) for match in matches if match and match[1] == start})


def projector_type(metadata: GGUFMetadata) -> str:
    """What a projector file says it is. Source: llama.cpp `tools/mtmd/clip.cpp`, `load_hparams`."""
    return metadata.text("projector_type") or metadata.text("vision.projector_type") or "mlp"


def layout_in(layouts: tuple[ProjectorLayout, ...], metadata: GGUFMetadata, text: str) -> ProjectorLayout | None:
    """The layout of a projector file, or of a file that has text model and tower; None: none of these.

    Of several for a projector file, one that goes with a text model of this `general.architecture`.
    """
    if metadata.arch == PROJECTOR:
        kind = projector_type(metadata)
        fitting = [layout for layout in layouts if kind in layout.types]
    else:
        fitting = [layout for layout in layouts if not layout.types and metadata.arch in layout.texts]
    fitting = [layout for layout in fitting if layout.applies(metadata)]
    return next((layout for layout in fitting if text in layout.texts), fitting[0] if fitting else None)


def has_tower(metadata: GGUFMetadata) -> bool:
    """Whether a text model's file has a tower too."""
    return bool(metadata.integer("vision.block_count"))


def vision_dims(metadata: GGUFMetadata) -> Config:
    """What every `vision_config` says. Raises CheckpointError."""
    return {
        "hidden_size": metadata.count("vision.embedding_length"),
        "intermediate_size": metadata.count("vision.feed_forward_length"),
        "num_hidden_layers": metadata.count("vision.block_count"),
        "num_attention_heads": metadata.count("vision.attention.head_count"),
        "patch_size": metadata.count("vision.patch_size"),
        "num_channels": metadata.integer("vision.num_channels") or 3,
    }


def pixel_rules(metadata: GGUFMetadata, *, resample: int, mean: list[JSON], std: list[JSON]) -> Config:
    """What every preprocessor_config.json says; `mean` and `std` where a file does not. Raises CheckpointError."""
    rules: Config = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": std,
        "resample": resample,
        "rescale_factor": 1 / 255,
    }
    for key in ("image_mean", "image_std"):
        name = f"{metadata.arch}.vision.{key}"
        if metadata.has(name):
            rules[key] = list(metadata.reals(name, 3))
    return rules


def clip_layers(tower: str) -> dict[str, str]:
    """What llama.cpp calls the tensors within a layer of CLIP's kind, in a tower whose names begin so."""
    layer = f"{tower}encoder.layers.{{n}}."
    own = {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.out_proj",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }
    return {f"v.blk.{{n}}.{theirs}": layer + ours for theirs, ours in own.items()}
