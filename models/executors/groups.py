"""Consecutive tokens that look at each other alone, as rows of one length: where each stands, and what is seen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Groups of tokens, padded to the longest."""

    count: int
    longest: int
    pad: npt.NDArray[np.int64]
    """The token in each place, the first one in padding. Shapes: (count * longest,)."""
    unpad: npt.NDArray[np.int64]
    """The place of each token. Shapes: (T,)."""
    visible: npt.NDArray[np.bool_]
    """Which places are tokens. Shapes: (count, longest)."""


def grouped(lengths: npt.NDArray[np.int64]) -> Groups:
    """Groups of these lengths, none of them 0. Shapes: (G,). Thread: any."""
    longest = int(lengths.max())
    visible = np.arange(longest) < lengths[:, None]
    unpad = np.flatnonzero(visible)
    pad = np.zeros(visible.size, np.int64)
    pad[unpad] = np.arange(len(unpad))
    return Groups(len(lengths), longest, pad, unpad, visible)
