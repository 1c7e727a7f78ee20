"""What an architecture may say: weights and state declared, and the operations between them.

Imports no array library but numpy, and that for constants. Executors (`models.executors`) implement `Ops`.
"""

from models.ops.base import Activation, Attention, Ops, RelativeBias
from models.ops.rope import RopeConfig
from models.ops.state import KV, LayerState
from models.ops.weights import Embedding, Joined, LayerNorm, Linear, Matrix, Norm, Weight, weights_in

__all__ = [
    "KV",
    "Activation",
    "Attention",
    "Embedding",
    "Joined",
    "LayerNorm",
    "LayerState",
    "Linear",
    "Matrix",
    "Norm",
    "Ops",
    "RelativeBias",
    "RopeConfig",
    "Weight",
    "weights_in",
]
