"""An `Ops` that computes nothing and writes down which attention each layer asks for."""

from collections.abc import Sequence
from typing import Any

from models.arch import Model
from models.ops import (
    Activation,
    Attention,
    Embedding,
    Experts,
    Gate,
    LayerNorm,
    Matrix,
    Norm,
    PositionScale,
    Routing,
    Vector,
    Xielu,
)


class Noting:
    """Implements `Ops[str]`; a value is a name for what it is."""

    def __init__(self) -> None:
        self.attentions: dict[int, Attention] = {}
        self.normed: list[str] = []
        self.activations: list[str] = []
        self.factors: list[float] = []
        self.position_scales: list[PositionScale] = []
        self.residuals: list[int] = []
        self.deepened: list[int] = []

    def embed(self, table: Embedding) -> str:
        return table.name

    def linear(self, x: str, matrix: Matrix) -> str:
        return "product"

    def split(self, x: str, sizes: Sequence[int], heads: int = 1) -> tuple[str, ...]:
        return ("part",) * len(sizes)

    def rms_norm(self, x: str, norm: Norm) -> str:
        self.normed.append(norm.name)
        return "normed"

    def layer_norm(self, x: str, norm: LayerNorm) -> str:
        self.normed.append(norm.name)
        return "normed"

    def position_scale(self, x: str, scale: PositionScale) -> str:
        self.position_scales.append(scale)
        return "scaled"

    def attention(self, q: str, k: str, v: str, layer: int, spec: Attention) -> str:
        self.attentions[layer] = spec
        return "looked"

    def glu(self, gate: str, up: str, activation: Activation) -> str:
        self.activations.append(activation)
        return activation

    def activate(self, x: str, activation: Activation) -> str:
        self.activations.append(activation)
        return activation

    def xielu(self, x: str, numbers: Xielu) -> str:
        return "bent"

    def mul(self, x: str, y: str) -> str:
        return "product"

    def weigh(self, x: str, factors: Vector) -> str:
        return "weighed"

    def scale(self, x: str, factor: float) -> str:
        self.factors.append(factor)
        return "scaled"

    def add(self, x: str, y: str) -> str:
        return "sum"

    def residual(self, x: str, layers: int) -> str:
        self.residuals.append(layers)
        return x

    def deepen(self, x: str, layers: int) -> str:
        self.deepened.append(layers)
        return x

    def route(self, logits: str, routing: Routing) -> tuple[str, str]:
        return "picks", "weights"

    def experts(
        self, x: str, picks: str, weights: str, experts: Experts, activation: Gate, *, on_input: bool = False
    ) -> str:
        return "sum"


def noted(model: Model) -> Any:
    ops = Noting()
    model.forward(ops)
    return ops


def attentions(model: Model) -> list[Attention]:
    """The attention of each layer, in order."""
    found = noted(model).attentions
    assert list(found) == list(range(model.config.num_layers))
    return list(found.values())
