"""Make the GGUF twins: a text model, its projector, and what transformers says of the two as one checkpoint.

python tests/parity_vision/make_gguf.py [NAME ...]

A folder `projectors/NAME` has `model.gguf`, `mmproj.gguf` and the `reference.safetensors` that `making.py` writes. They
are of their own, and not twins of the folders beside them, for what these have on purpose (a scale of the scores, a
processor's rules) a GGUF file does not say: it is what llama.cpp takes it for.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
from fixture import HERE, Fixture, JSONFile, merged
from make_gemma3 import GEMMA3
from make_llava import FULL
from make_mistral3 import MISTRAL3, PIXTRAL
from make_qwen2_5_vl import FIXTURE as QWEN2_5_VL
from making import make
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import gguf_twin  # isort: skip - found by what `fixture` adds to the path
import mmproj_twin  # isort: skip
from cases.gemma import NORMS, write_windows  # isort: skip
from cases.llama import TWIN as LLAMA  # isort: skip

FOLDER = "projectors"
BICUBIC = 3
"""What is done where a file does not say, but for Gemma 3."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A fixture, and how its two files are written."""

    fixture: Fixture
    text: gguf_twin.Twin
    projector: mmproj_twin.Projector


def _pixtral(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    writer.add_vision_attention_layernorm_eps(1e-5)
    vision = config["vision_config"]
    writer.add_bool(f"clip.use_{vision['hidden_act']}", True)
    if "spatial_merge_size" in config:
        writer.add_vision_spatial_merge_size(config["spatial_merge_size"])
    # Of those that are converted from Mistral's own files.
    writer.add_float32("clip.rope.freq_base", vision.get("rope_parameters", vision)["rope_theta"])


def _qwen(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    vision = config["vision_config"]
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    writer.add_vision_attention_layernorm_eps(config["rms_norm_eps"])
    # llama.cpp has a name for it, and takes it to be 112.
    writer.add_uint32("clip.vision.window_size", vision["window_size"])


def _sections(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    writer.add_rope_dimension_sections([*config["rope_scaling"]["mrope_section"], 0])


def _llava(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", config["vision_config"].get("hidden_act") == "gelu")
    writer.add_vision_attention_layernorm_eps(config["vision_config"]["layer_norm_eps"])
    writer.add_array("clip.vision.feature_layer", [config["vision_config"]["num_hidden_layers"]])


def changed(fixture: Fixture, config: JSONFile, images: JSONFile) -> Fixture:
    """A fixture with another config.json and preprocessor_config.json, looked at no more closely than need be."""
    name = "preprocessor_config.json"
    files = {**fixture.files, name: {**fixture.files[name], **images}}
    named = f"{FOLDER}/{fixture.name}"
    return replace(
        fixture, name=named, config=merged(fixture.config, config), files=files, matters=(), processor_matters=()
    )


def llava() -> Fixture:
    """As llama.cpp knows it: the last but one layer, patches alone, squares with the mean's colour around."""
    config = {
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "tie_word_embeddings": False},
        "vision_config": {"hidden_act": "quick_gelu"},
        "tie_word_embeddings": False,
    }
    made = changed(FULL, config, {"size": {"shortest_edge": 20}, "resample": BICUBIC})
    name = "processor_config.json"
    files = {**made.files, name: {**made.files[name], "vision_feature_select_strategy": "default"}}
    return replace(made, name=f"{FOLDER}/llava", files=files, idle=r"post_layernorm|encoder\.layers\.2\.")


PAIRS = (
    Pair(
        changed(GEMMA3, {"text_config": {"query_pre_attn_scalar": 16, "rope_theta": 8000.0, "sliding_window": 10}}, {}),
        gguf_twin.Twin("gemma3", NORMS, metadata=write_windows, norm_shift=1.0),
        mmproj_twin.Projector("gemma3", mmproj_twin.GEMMA3, mmproj_twin.write_gemma3, mmproj_twin.with_one_added),
    ),
    Pair(
        changed(
            MISTRAL3,
            {"projector_hidden_act": "gelu", "vision_config": {"image_size": 52}},
            {"size": {"longest_edge": 52}, "resample": BICUBIC},
        ),
        gguf_twin.Twin("mistral3", interleaved=("q_proj", "k_proj")),
        mmproj_twin.Projector("pixtral", mmproj_twin.PIXTRAL, _pixtral, mmproj_twin.in_pairs),
    ),
    Pair(
        changed(
            PIXTRAL,
            {
                "vision_feature_layer": -1,
                "text_config": {"sliding_window": None},
                "vision_config": {"num_hidden_layers": 2, "image_size": 60},
            },
            {},
        ),
        LLAMA,
        mmproj_twin.Projector("pixtral", mmproj_twin.PIXTRAL, _pixtral, mmproj_twin.in_pairs),
    ),
    Pair(llava(), LLAMA, mmproj_twin.Projector("mlp", mmproj_twin.CLIP, _llava, mmproj_twin.without_the_last)),
    Pair(
        changed(
            QWEN2_5_VL,
            {"vision_config": {"fullatt_block_indexes": [1, 3]}},
            {"min_pixels": 3136, "max_pixels": 12845056},
        ),
        gguf_twin.Twin("qwen2vl", metadata=_sections),
        mmproj_twin.Projector("qwen2.5vl_merger", mmproj_twin.QWEN2_5_VL, _qwen, mmproj_twin.in_frames),
    ),
)


def text_of(config: JSONFile) -> dict[str, object]:
    """The config.json of the text model alone."""
    return {**config, **config.get("text_config", {})}


def write(pair: Pair, cut: Callable[[JSONFile], JSONFile]) -> None:
    """Make the fixture, write its two files, and take away what they stand for."""
    folder = HERE / pair.fixture.name
    folder.parent.mkdir(exist_ok=True)
    make(pair.fixture)
    config = cut(pair.fixture.config)
    text, seen = mmproj_twin.halves(load_file(folder / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    images = json.loads((folder / "preprocessor_config.json").read_text())
    said = text_of(pair.fixture.config)
    gguf_twin.write(folder / "model.gguf", pair.text, said, text, tokenizer, bos=pair.fixture.bos)
    width = said["hidden_size"]
    assert isinstance(width, int)
    mmproj_twin.write(folder / "mmproj.gguf", pair.projector, config, images, seen, width)
    for file in folder.iterdir():
        if file.suffix != ".gguf" and file.name != "reference.safetensors":
            file.unlink()


def counted(config: JSONFile) -> JSONFile:
    """A config.json whose tower has the layers alone that count."""
    layer = config.get("vision_feature_layer", -1)
    if "num_hidden_layers" not in config["vision_config"]:
        return config
    layers = config["vision_config"]["num_hidden_layers"] + 1 + layer
    return merged(config, {"vision_config": {"num_hidden_layers": layers}})


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for each in PAIRS:
        if not wanted or Path(each.fixture.name).name in wanted:
            write(each, counted)
