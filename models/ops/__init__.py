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
from models.ops.recurrent import DeltaRule, StateSpace
from models.ops.rope import RopeConfig
from models.ops.routing import Routing
from models.ops.state import KV, LayerState, Recurrent
from models.ops.vision import TowerOps
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
    ShortConv,
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
    "DeltaRule",
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
    "Recurrent",
    "RelativeBias",
    "RopeConfig",
    "Routing",
    "ShortConv",
    "StateSpace",
    "TowerOps",
    "Vector",
    "Weight",
    "Xielu",
    "weights_in",
]
