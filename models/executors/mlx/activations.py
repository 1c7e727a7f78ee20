"""The activations on MLX, and gated ones as one kernel."""

import math
from collections.abc import Callable, Mapping

import mlx.core as mx

from models.ops import Activation, ClampedSwish, Gate

Unary = Callable[[mx.array], mx.array]


def _gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS: Mapping[Activation, Unary] = {
    "silu": lambda x: x * mx.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
    "sigmoid": mx.sigmoid,
    "softplus": lambda x: mx.logaddexp(x, mx.array(0, x.dtype)),
    "tanh": mx.tanh,
}


def _glu(activation: Gate) -> Callable[[mx.array, mx.array], mx.array]:
    if isinstance(activation, ClampedSwish):
        limit, alpha, shift = activation.limit, activation.alpha, activation.shift

        def clamped(gate: mx.array, up: mx.array) -> mx.array:
            gate = mx.minimum(gate, limit)
            return gate * mx.sigmoid(alpha * gate) * (mx.clip(up, -limit, limit) + shift)

        return clamped
    unary = _ACTIVATIONS[activation]
    return lambda gate, up: unary(gate) * up


class Activations:
    """The activations, and gated ones as one kernel where they are compiled. Thread: the executor's."""

    def __init__(self, *, compiled: bool = False) -> None:
        """`compiled` calls a compiler at run time on MLX's CPU backend, which may not be there."""
        self._compiled = compiled
        self._gated: dict[Gate, Callable[[mx.array, mx.array], mx.array]] = {}

    def unary(self, activation: Activation) -> Unary:
        """The activation by itself."""
        return _ACTIVATIONS[activation]

    def gated(self, activation: Gate) -> Callable[[mx.array, mx.array], mx.array]:
        """The activated first times the second. Shapes: both (T, F); returns (T, F)."""
        if activation not in self._gated:
            glu = _glu(activation)
            self._gated[activation] = mx.compile(glu, shapeless=True) if self._compiled else glu
        return self._gated[activation]
