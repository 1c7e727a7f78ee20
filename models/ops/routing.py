"""How a token chooses its experts."""

from dataclasses import dataclass
from typing import Literal

from models.ops.weights import Vector


@dataclass(frozen=True, slots=True)
class Routing:
    """From a router's logits to the picked experts and their weights.

    Sources: Mixtral (arXiv 2401.04088) for softmax; DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437) for groups,
    sigmoid and the bias that balances load.
    """

    picked: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Over all experts."""
    by_logits: bool = False
    """The choice is by the logits: of two that are large, sigmoid may make the same score. There are no groups then."""
    normalized: bool = True
    """The picked weights are divided by their sum."""
    floor: float = 0.0
    """Added to that sum."""
    scale: float = 1.0
    """On the weights, last."""
    expert_scales: Vector | None = None
    """On the weights, each expert's own, after everything else. Source: Gemma 4."""
    bias: Vector | None = None
    """Added to the scores for the choice, not for the weights."""
    groups: int = 1
    """The experts are divided into so many groups, in order,"""
    kept_groups: int = 1
    """of which so many are chosen from."""
    best_of_group: int = 1
    """A group is as good as the sum of so many of its best scores."""
