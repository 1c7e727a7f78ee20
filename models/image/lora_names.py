"""What LoRA files call the layers of a pipeline.

Three ways of naming are in use: diffusers' and PEFT's, which are the checkpoint's own names behind a prefix; those of
the models' first authors, which ComfyUI and most training tools took over; and kohya's, which are either of these with
every dot made an underscore. So the checkpoint's names are the key: each is listed with all that it may be called.

Source: the tables of diffusers v0.42.1, loaders/lora_conversion_utils.py and loaders/single_file_utils.py.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_PREFIXES = (
    ("transformer.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("model.diffusion_model.", "transformer"),
    ("lora_unet_", "transformer"),
    ("text_encoder.", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
)
# What PEFT puts before everything.
_WRAPPED = "base_model.model."


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer of a file goes: a layer of the checkpoint, or an equal part of a fused one's rows."""

    layer: str
    part: int = 0
    parts: int = 1


# The checkpoint's name, what the first authors called it, and the part that it is of that.
_FOREIGN = tuple(
    (re.compile(pattern), name, part, parts)
    for pattern, name, part, parts in (
        # Z-Image.
        (r"(.+\.attention)\.to_q", r"\1.qkv", 0, 3),
        (r"(.+\.attention)\.to_k", r"\1.qkv", 1, 3),
        (r"(.+\.attention)\.to_v", r"\1.qkv", 2, 3),
        (r"(.+\.attention)\.to_out\.0", r"\1.out", 0, 1),
        (r"all_x_embedder\.2-1", "x_embedder", 0, 1),
        (r"all_final_layer\.2-1\.(.+)", r"final_layer.\1", 0, 1),
        # FLUX.2. Its final modulation is not here: the halves of its rows have changed places.
        (r"transformer_blocks\.(\d+)\.attn\.to_q", r"double_blocks.\1.img_attn.qkv", 0, 3),
        (r"transformer_blocks\.(\d+)\.attn\.to_k", r"double_blocks.\1.img_attn.qkv", 1, 3),
        (r"transformer_blocks\.(\d+)\.attn\.to_v", r"double_blocks.\1.img_attn.qkv", 2, 3),
        (r"transformer_blocks\.(\d+)\.attn\.add_q_proj", r"double_blocks.\1.txt_attn.qkv", 0, 3),
        (r"transformer_blocks\.(\d+)\.attn\.add_k_proj", r"double_blocks.\1.txt_attn.qkv", 1, 3),
        (r"transformer_blocks\.(\d+)\.attn\.add_v_proj", r"double_blocks.\1.txt_attn.qkv", 2, 3),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj", 0, 1),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj", 0, 1),
        (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0", 0, 1),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2", 0, 1),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0", 0, 1),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2", 0, 1),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1", 0, 1),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2", 0, 1),
        (r"x_embedder", "img_in", 0, 1),
        (r"context_embedder", "txt_in", 0, 1),
        (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer", 0, 1),
        (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer", 0, 1),
        (r"((?:double|single)_stream_modulation\w*)\.linear", r"\1.lin", 0, 1),
        (r"proj_out", "final_layer.linear", 0, 1),
    )
)


def split_component(name: str) -> tuple[str, str]:
    """The component that a file's layer belongs to, and its name there; a name without a prefix is a transformer's."""
    name = name.removeprefix(_WRAPPED)
    for prefix, component in _PREFIXES:
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return "transformer", name


def places(layers: Iterable[str]) -> Mapping[str, tuple[Place, ...]]:
    """Everything that the layers of one component of a checkpoint may be called, and where it goes.

    A name of a fused layer has as many places as the checkpoint has layers for it.
    """
    found: defaultdict[str, list[Place]] = defaultdict(list)
    for layer in layers:
        for name, part, parts in _names(layer):
            place = Place(layer, part, parts)
            for each in {name, name.replace(".", "_")}:
                found[each].append(place)
    return {name: tuple(each) for name, each in found.items()}


def _names(layer: str) -> Iterator[tuple[str, int, int]]:
    bare = layer.removeprefix("model.")
    yield bare, 0, 1
    yield f"model.{bare}", 0, 1
    for pattern, name, part, parts in _FOREIGN:
        if match := pattern.fullmatch(layer):
            yield match.expand(name), part, parts
