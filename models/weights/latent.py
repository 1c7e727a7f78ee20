"""Each head's matrices of latent attention, from whatever a checkpoint stores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.ops import LatentUp


def latent_matrices(up: LatentUp, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """NAME.keys (H, key_dim, rank) and NAME.values (H, rank, value_dim), from the declared tensors. Thread: any."""
    if up.divided:
        keys = tensors[f"{up.name}.keys.weight"].swapaxes(1, 2)
        values = tensors[f"{up.name}.values.weight"]
    else:
        whole = tensors[f"{up.name}.weight"].reshape(up.heads, up.key_dim + up.value_dim, up.rank)
        keys, values = whole[:, : up.key_dim], whole[:, up.key_dim :]
    matrices = {f"{up.name}.keys": keys, f"{up.name}.values": values.swapaxes(1, 2)}
    return {name: np.ascontiguousarray(matrix) for name, matrix in matrices.items()}
