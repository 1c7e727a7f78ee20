"""From the hidden states of a text to its vector: pooling, dense layers, cutting, normalising. On the host, in float32.

Each text by itself, so that its bits do not depend on its company.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.checkpoint import Checkpoint
from models.embedding.settings import Dense, DenseActivation, EmbeddingSettings, Pooling
from models.errors import CheckpointError
from models.quantization import dequantize

Floats = npt.NDArray[np.float32]

_LEAST_LENGTH = 1e-12
"""What a vector's length is taken for at least, as torch does."""


def pooled(hidden: Floats, pooling: Pooling) -> Floats:
    """The vector of a text. Shapes: hidden (L, D), L above 0; returns (D,). Thread: any."""
    match pooling:
        case "cls":
            return _floats(hidden[0])
        case "last":
            return _floats(hidden[-1])
        case "max":
            return _floats(hidden.max(axis=0))
        case "mean":
            return _floats(hidden.sum(axis=0) / np.float32(len(hidden)))
        case "mean_sqrt_len":
            return _floats(hidden.sum(axis=0) / np.float32(math.sqrt(len(hidden))))
        case "weightedmean":
            weights = np.arange(1, len(hidden) + 1, dtype=np.float32)
            return _floats((hidden * weights[:, None]).sum(axis=0) / weights.sum())


def _floats(value: npt.NDArray[np.floating]) -> Floats:
    return value.astype(np.float32, copy=False)


def _gelu(x: Floats) -> Floats:
    return np.array([0.5 * value * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x.tolist()], np.float32)


_ACTIVATIONS: Mapping[DenseActivation, Callable[[Floats], Floats]] = {
    "identity": lambda x: x,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "gelu": _gelu,
    "sigmoid": lambda x: _floats(1 / (1 + np.exp(-x))),
}


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A dense layer's weights. Shapes: weight (outputs, inputs), bias (outputs,) or None."""

    weight: Floats
    bias: Floats | None
    activation: DenseActivation

    def __call__(self, x: Floats) -> Floats:
        """Shapes: x (inputs,); returns (outputs,)."""
        y = self.weight @ x
        return _ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)


@dataclass(frozen=True, slots=True)
class Head:
    """What makes a vector of hidden states. Thread: any."""

    settings: EmbeddingSettings
    layers: Sequence[DenseLayer] = ()

    def vector(self, hidden: Floats, width: int | None) -> Floats:
        """The vector of a text, cut to `width` values if that is a number. Shapes: hidden (L, D); returns (W,)."""
        vector = pooled(hidden, self.settings.pooling)
        for layer in self.layers:
            vector = layer(vector)
        vector = vector[: width or self.settings.default_width]
        if self.settings.normalize:
            length = np.float32(math.sqrt(float(np.dot(vector, vector))))
            vector = vector / max(length, np.float32(_LEAST_LENGTH))
        return vector

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.weight.nbytes for layer in self.layers)


def load_head(checkpoint: Checkpoint, settings: EmbeddingSettings) -> Head:
    """Read the dense layers. Thread: any. Raises CheckpointError."""
    return Head(settings, [_loaded(checkpoint, dense) for dense in settings.dense])


def _loaded(checkpoint: Checkpoint, dense: Dense) -> DenseLayer:
    found = {tensor.name: tensor for tensor in checkpoint.tensors(dense.component)}
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (dense.outputs, dense.inputs)}
    if dense.bias:
        wanted["linear.bias"] = (dense.outputs,)
    arrays: dict[str, Floats] = {}
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError("is missing", file=dense.component, tensor=name)
        value = found[name].value
        array = value if isinstance(value, np.ndarray) else dequantize(value)
        if array.shape != shape:
            raise CheckpointError(
                f"its shape is {list(array.shape)}, and config.json asks for {list(shape)}",
                file=found[name].file,
                tensor=name,
            )
        arrays[name] = array.astype(np.float32)
    return DenseLayer(arrays["linear.weight"], arrays.get("linear.bias"), dense.activation)
