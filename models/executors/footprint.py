"""What a model takes on an executor, predicted from declarations and headers: the one predictor of bytes."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. Thread: any."""

    embedding: int
    """Tables of embeddings."""
    layers: tuple[int, ...]
    output: int
    """The output matrix and the final norm."""
    transient: int
    """What loading holds besides for a while."""
    library: int
    """What the executor's library takes for itself once a model is loaded."""
    state: Callable[[int], tuple[int, ...]]
    """What one row of so many tokens takes, a number for each layer with a state of its own."""
    scored: int | None = None
    """The tokens of the longest text of which a pass holds a layer's scores, as many as their square; None: of any."""

    @property
    def weights(self) -> int:
        """All weights."""
        return self.embedding + sum(self.layers) + self.output


def by_layer(sizes: Iterable[tuple[str, int]], num_layers: int) -> tuple[tuple[int, ...], int]:
    """The bytes of named weights, summed for each layer, and of those that are in none."""
    layers, rest = [0] * num_layers, 0
    for name, nbytes in sizes:
        found = _LAYER.search(name)
        if found is not None and int(found[1]) < num_layers:
            layers[int(found[1])] += nbytes
        else:
            rest += nbytes
    return tuple(layers), rest
