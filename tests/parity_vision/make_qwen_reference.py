"""Write tests/models/vision/qwen_reference.json: what transformers makes of sizes, squares and positions.

python tests/parity_vision/make_qwen_reference.py, behind the fixtures of the Qwens
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fixture import PROMPTS, pictures_of
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, logging
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_window_index

HERE = Path(__file__).parent
TARGET = HERE.parents[0] / "models" / "vision" / "qwen_reference.json"
FOLDERS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_vl")
LIMITS = ((14, 2, 3136, 12845056), (16, 2, 65536, 16777216), (4, 3, 2900, 3300))
HEIGHTS, WIDTHS = (1, 17, 42, 61, 70, 200, 999, 6000), (1, 37, 98, 200, 513, 4321)
SQUARES = ((3, 5, 3), (4, 4, 2), (1, 7, 4), (6, 9, 3), (2, 2, 5))


def sizes() -> list[list[int]]:
    found = []
    for (patch, merge, least, most), height, width in product(LIMITS, HEIGHTS, WIDTHS):
        if max(height, width) <= 200 * min(height, width):
            made = smart_resize(height, width, patch * merge, least, most)
            found.append([patch, merge, least, most, height, width, *map(int, made)])
    return found


def squares() -> list[dict[str, Any]]:
    found = []
    for rows, columns, side in SQUARES:
        grid = torch.tensor([[1, rows * 2, columns * 2]])
        order, ends = get_vision_window_index(grid, 2, side * 2 * 7, 7)
        lengths = (ends[1:] - ends[:-1]) // 4
        found.append({"grid": [rows, columns, side], "order": order.tolist(), "lengths": lengths.tolist()})
    return found


def positions(name: str) -> list[dict[str, Any]]:
    """Of each prompt of a fixture, and what is added to the place of the token behind it."""
    reference = load_file(HERE / name / "reference.safetensors")
    config = AutoConfig.from_pretrained(HERE / name)
    model = AutoModelForImageTextToText.from_config(config).model
    found = []
    for number, prompt in enumerate(PROMPTS):
        ids = torch.from_numpy(reference[f"ids.{number}"]).long()[None]
        grids = [torch.from_numpy(reference[f"image_grid_thw.{picture}"]).long() for picture in pictures_of(prompt)]
        kinds = (ids == config.image_token_id).int()
        made, shift = model.get_rope_index(ids, kinds, image_grid_thw=torch.cat(grids) if grids else None)
        merge = config.vision_config.spatial_merge_size
        found.append(
            {
                "name": name,
                "prompt": number,
                "grids": [(grid[0, 1:] // merge).tolist() for grid in grids],
                "positions": made[:, 0].T.tolist(),
                "shift": int(shift),
            }
        )
    return found


def main() -> None:
    logging.set_verbosity_error()
    made = {"sizes": sizes(), "squares": squares(), "positions": [each for name in FOLDERS for each in positions(name)]}
    lines = (f'"{key}": [\n' + ",\n".join(json.dumps(each) for each in values) + "\n]" for key, values in made.items())
    TARGET.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
