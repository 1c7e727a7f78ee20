"""Resizing with Pillow for those of the reference's processors that can do it with torchvision alone."""

import numpy as np
import torch
from PIL import Image

FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3}


def resized(picture: torch.Tensor, height: int, width: int, resample: object) -> torch.Tensor:
    """Shapes: uint8 (3, H, W); returns uint8 (3, height, width). A filter is torchvision's or a number of Pillow's."""
    kind = resample if isinstance(resample, int) else FILTERS[resample.value]
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), int(kind))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
