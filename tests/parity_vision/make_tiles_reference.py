"""Write what transformers makes of pictures' sizes: Gemma 3's crops, and Idefics3's tiles and positions.

python tests/parity_vision/make_tiles_reference.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

PATH = Path(__file__).parents[1] / "models" / "vision" / "tiles_reference.json"
SIZES = ((1, 1), (1, 300), (300, 1), (43, 61), (90, 37), (60, 60), (61, 60), (37, 55), (250, 101), (99, 260), (81, 400))
SCANS = ((20, 3, 1.45), (16, 4, 1.2), (40, 9, 1.5), (1, 6, 1.0))
EDGES = ((50, 24), (46, 24), (24, 24), (100, 36), (20, 24))
BUCKETS = ((26, 26), (32, 32), (27, 27), (6, 4), (6, 6), (14, 26), (26, 14), (8, 5))


def crops(height: int, width: int, scan: tuple[int, int, float]) -> list[list[int]]:
    """Of a picture whose values tell where they were: first row and column, height and width of each part."""
    where = np.stack([*np.mgrid[:height, :width], np.zeros((height, width))])
    parts = Gemma3ImageProcessorPil().pan_and_scan(where, *scan)
    return [[int(part[0, 0, 0]), int(part[1, 0, 0]), *part.shape[1:]] for part in parts if part.size]


def tiles(height: int, width: int, longest: int, tile: int) -> list[int]:
    """Height and width once it is scaled, then those of whole tiles, and how many rows and columns of them."""
    processor = Idefics3ImageProcessorPil()
    picture = np.zeros((3, height, width), np.uint8)
    scaled = get_resize_output_image_size(picture, longest)
    whole = processor.resize_for_vision_encoder(np.zeros((3, *scaled), np.uint8), tile)
    _, rows, columns = processor.split_images(whole, {"longest_edge": tile})
    return [*scaled, *whole.shape[1:], rows, columns]


@torch.inference_mode()
def buckets(per_side: int, count: int) -> list[int]:
    """The rows of a table of positions that a square of `count` x `count` patches takes."""
    config = Idefics3VisionConfig(hidden_size=1, image_size=per_side, patch_size=1, num_attention_heads=1)
    embeddings = Idefics3VisionEmbeddings(config)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.copy_(torch.arange(per_side**2)[:, None])
    picture, mask = torch.zeros(1, 3, count, count), torch.ones(1, count, count, dtype=torch.bool)
    return embeddings(picture, mask).flatten().int().tolist()


def main() -> None:
    """Write the file."""
    found = {
        "crops": [{"size": size, "scan": scan, "crops": crops(*size, scan)} for size in SIZES for scan in SCANS],
        "tiles": [{"size": size, "edges": edges, "tiles": tiles(*size, *edges)} for size in SIZES for edges in EDGES],
        "buckets": [{"of": pair, "buckets": buckets(*pair)} for pair in BUCKETS],
    }
    PATH.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
