"""Make the GGUF twins of Qwens that see: a folder's text model and its projector, with the folder's own reference.

python tests/parity_vision/make_twins.py [NAME ...]

A folder `projectors/NAME` is a twin of the folder NAME, which must be there: all that its files say, a GGUF file says
too. Needs gguf, safetensors and tokenizers alone.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from safetensors.numpy import load_file
from tokenizers import Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))

import gguf_twin  # noqa: E402 - lies in another folder of scripts
import mmproj_twin  # noqa: E402
from cases.gated_delta import CASES  # noqa: E402

JSONFile = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """How a folder's two files are written."""

    text: gguf_twin.Twin
    projector: mmproj_twin.Projector
    vision: Callable[[JSONFile], JSONFile]
    """`vision_config` as the converter takes it."""


def _sections(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    writer.add_rope_dimension_sections([*config["rope_scaling"]["mrope_section"], 0])


def _text3(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    _sections(writer, config)
    writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))


def _with_sections(twin: gguf_twin.Twin) -> gguf_twin.Twin:
    """Qwen3.5's with what turns by which axis."""

    def write_both(writer: gguf.GGUFWriter, config: JSONFile) -> None:
        twin.metadata(writer, config)
        writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])

    return replace(twin, metadata=write_both)


def _tower2(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    writer.add_vision_attention_layernorm_eps(config["rms_norm_eps"])


def _tower3(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    vision = config["vision_config"]
    writer.add_vision_use_gelu(True)
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    writer.add_vision_attention_layernorm_eps(config["text_config"]["rms_norm_eps"])
    exits = vision["deepstack_visual_indexes"]
    writer.add_vision_is_deepstack_layers([layer in exits for layer in range(vision["depth"])])


def _vision2(vision: JSONFile) -> JSONFile:
    """Its width by another name, and the text model's for that of an MLP, as the converter has it."""
    return {**vision, "hidden_size": vision["embed_dim"], "intermediate_size": vision["hidden_size"]}


def _vision3(vision: JSONFile) -> JSONFile:
    return {**vision, "image_size": math.isqrt(vision["num_position_embeddings"]) * vision["patch_size"]}


QWEN2_VL = Pair(
    gguf_twin.Twin("qwen2vl", metadata=_sections),
    mmproj_twin.Projector("qwen2vl_merger", mmproj_twin.QWEN2_VL, _tower2, mmproj_twin.in_frames),
    _vision2,
)
QWEN3_VL = Pair(
    gguf_twin.Twin("qwen3vl", metadata=_text3),
    mmproj_twin.Projector("qwen3vl_merger", mmproj_twin.QWEN3_VL, _tower3, mmproj_twin.at_their_layers),
    _vision3,
)
PAIRS = {
    "qwen2_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_5_vl": replace(QWEN3_VL, text=_with_sections(next(each.gguf for each in CASES if each.name == "qwen3_5"))),
}


def _with_limits(projector: mmproj_twin.Projector, images: JSONFile) -> Callable[[gguf.GGUFWriter, JSONFile], None]:
    """What the projector says, and how many pixels a picture has, as Ollama's converter says it."""
    size = images.get("size", {})

    def write_both(writer: gguf.GGUFWriter, config: JSONFile) -> None:
        projector.metadata(writer, config)
        writer.add_vision_min_pixels(images.get("min_pixels", size.get("shortest_edge")))
        writer.add_vision_max_pixels(images.get("max_pixels", size.get("longest_edge")))

    return write_both


def write(name: str, pair: Pair) -> None:
    """Write a twin's folder."""
    source, target = HERE / name, HERE / "projectors" / name
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    images = json.loads((source / "preprocessor_config.json").read_text())
    said = {**config, **config.get("text_config", {})}
    weights = load_file(source / "model.safetensors")
    text, seen = mmproj_twin.halves({name.replace("model.visual.", "visual."): each for name, each in weights.items()})
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    gguf_twin.write(target / "model.gguf", pair.text, said, text, tokenizer)
    kind = pair.projector
    projector = mmproj_twin.Projector(kind.kind, kind.names, _with_limits(kind, images), kind.stored)
    whole = {**config, "vision_config": pair.vision(config["vision_config"])}
    mmproj_twin.write(target / "mmproj.gguf", projector, whole, images, seen, said["hidden_size"])
    shutil.copyfile(source / "reference.safetensors", target / "reference.safetensors")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for each, files in PAIRS.items():
        if not wanted or each in wanted:
            write(each, files)
