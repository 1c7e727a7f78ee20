"""How a checkpoint's model is shared by several ranks: a plan for each, or the numbers of ranks that could."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from models.arch import Model
from models.errors import ShareError
from models.sharding import pipeline, tensor
from models.sharding.builder import Indivisible
from models.sharding.cuts import Place
from models.sharding.program import RankPlan
from models.sources.base import TensorInfo
from models.weights.parts import group_of

Sharding: TypeAlias = Literal["tensor", "pipeline"]
MOST_RANKS = 16
"""Numbers of ranks that are tried for a message."""


def plans_of(
    model: Model, found: Mapping[str, TensorInfo], reference: str, ranks: int, sharding: Sharding
) -> tuple[RankPlan, ...]:
    """What each of so many ranks runs and holds. Thread: any.

    Args:
        model: with all of its weights declared.
        found: the tensor of every declared name.
        reference: what the user called it, for messages.
        ranks: how many there are.
        sharding: each a part of every layer, or each some of the layers.

    Raises:
        ShareError: heads, widths, groups of quantisation or layers do not divide; the message has numbers that do.
    """
    try:
        return tuple(_plan(model, found, Place(rank, ranks), sharding) for rank in range(ranks))
    except Indivisible as error:
        could = [count for count in range(2, MOST_RANKS + 1) if _can(model, found, count, sharding)]
        numbers = " or ".join(filter(None, (", ".join(map(str, could[:-1])), str(could[-1]) if could else "")))
        remedies = [f"{numbers} ranks can"] if could else []
        remedies += ["--shard=pipeline shares it by layers"] if sharding == "tensor" else []
        remedy = f"; {', '.join(remedies)}" if remedies else ""
        raise ShareError(f"{reference} cannot be shared by {ranks} ranks: {error}{remedy}") from error


def _plan(model: Model, found: Mapping[str, TensorInfo], place: Place, sharding: Sharding) -> RankPlan:
    if sharding == "pipeline":
        return pipeline.plan(model, place, lambda name: found[name].nbytes)
    return tensor.plan(model, place, lambda name: group_of(found[f"{name}.weight"]))


def _can(model: Model, found: Mapping[str, TensorInfo], ranks: int, sharding: Sharding) -> bool:
    try:
        _plan(model, found, Place(0, ranks), sharding)
    except Indivisible:
        return False
    return True
