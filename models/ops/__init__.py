"""What an architecture may say: weights and state declared, and the operations between them.

Imports no array library but numpy, and that for constants. Executors (`models.executors`) implement `Ops`.
"""

from models.ops.base import (
    Activation,
    Attention,
    ClampedSwish,
    Gate,
    LatentAttention,
    Ops,
    PositionScale,
    RelativeBias,
)
from models.ops.rope import RopeConfig
from models.ops.routing import Routing
from models.ops.state import KV, LayerState
from models.ops.weights import (
    Embedding,
    Expert,
    Experts,
    Joined,
    LatentUp,
    LayerNorm,
    Linear,
    Matrix,
    Norm,
    Vector,
    Weight,
    Xielu,
    weights_in,
)

__all__ = [
    "KV",
    "Activation",
    "Attention",
    "ClampedSwish",
    "Embedding",
    "Expert",
    "Experts",
    "Gate",
    "Joined",
    "LatentAttention",
    "LatentUp",
    "LayerNorm",
    "LayerState",
    "Linear",
    "Matrix",
    "Norm",
    "Ops",
    "PositionScale",
    "RelativeBias",
    "RopeConfig",
    "Routing",
    "Vector",
    "Weight",
    "Xielu",
    "weights_in",
]
