"""Which candidates are the greatest, so many or of so much mass, without sorting a vocabulary.

They are those whose key is at least some threshold. Some of the keys are sorted, and thresholds a bit to either side of
the right one are guessed from these; what lies above is counted in one pass, and only what lies between is sorted.
"""

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Ids: TypeAlias = npt.NDArray[np.intp]
Mask: TypeAlias = npt.NDArray[np.bool_]

_STRIDES = 64
_STEP = 16
_MARGIN = 64
"""Of so many sampled keys on either side; the rank of a median of 3072 is off by 28 once in three times."""
_FEW = 4096
_LEAST = 1e-300


def greatest(scores: Floats, count: int) -> Ids:
    """The ids of the greatest scores in rising order; of equal scores the first. Shapes: scores (V,), returns (count,).

    All ids where `count`, at least 1, is more than those.
    """
    if count >= scores.size:
        return np.arange(scores.size)
    if count * _STRIDES * 2 > scores.size:
        return np.flatnonzero(reaching(scores, None, scores.size, count))
    ids = np.flatnonzero(scores >= _reached_by(scores, count))
    few = scores[ids]
    return ids[_at_least(few, np.sort(few)[ids.size - count], count)]


def _reached_by(values: Floats, count: int) -> np.float32:
    """A value that at least `count` reach and few more: the greatest of so many strides do."""
    strides = values.size // _STRIDES
    tops = values[: strides * _STRIDES].reshape(_STRIDES, strides).max(axis=0)
    least: np.float32 = np.partition(tops, strides - count)[strides - count]
    return least


def reaching(keys: Floats, weights: Floats | None, total: float, mass: float) -> Mask:
    """The fewest candidates with the greatest keys that reach a mass; of equal keys the first. Shapes: all (K,).

    Args:
        keys: Not NaN.
        weights: At least 0; None: each counts 1. They may be the keys themselves, which costs less.
        total: The sum of the weights.
        mass: At least one candidate is kept, and all are if it is more than the total.
    """
    some, some_weights, kept = keys, weights, 0
    mass = max(mass, _LEAST)
    while some.size > _FEW:
        low, high = _bracket(some, some_weights, total - mass)
        above = some >= high
        heavy = _mass(some_weights, above)
        if heavy >= mass:
            places: Ids = np.flatnonzero(above)
        else:
            mass, kept = mass - heavy, kept + int(np.count_nonzero(above))
            places = np.flatnonzero((some < high) & (some >= low))
            heavy_between = float(places.size if some_weights is None else some_weights[places].sum())
            if heavy_between < mass:
                mass, kept = mass - heavy_between, kept + places.size
                places = np.flatnonzero(some < low)
                heavy = total - heavy - heavy_between
            else:
                heavy = heavy_between
        if not places.size:
            # All is less than the mass, if only by rounding.
            return np.ones(keys.size, dtype=np.bool_)
        if places.size == some.size:
            break
        some, some_weights, total = *_taken(some, some_weights, places), heavy
    least, before = _last(some, some_weights, mass)
    return _at_least(keys, least, kept + before + 1)


def _bracket(keys: Floats, weights: Floats | None, rest: float) -> tuple[np.float32, np.float32]:
    """Two thresholds between which the candidates turn from those of the lesser keys, of the mass `rest`."""
    some = keys[::_STEP]
    if weights is None:
        some = np.sort(some)
        place = int(rest / _STEP)
    elif weights is keys:
        some = np.sort(some)
        place = int(some.cumsum(dtype=np.float64).searchsorted(rest / _STEP))
    else:
        # The heaviest may be anywhere among the keys: they stand for themselves, the others for those left out too.
        least = _reached_by(weights, keys.size // (4 * _STRIDES))
        heavy = np.flatnonzero(weights > least)
        light = weights[::_STEP]
        some = np.concatenate([some, keys[heavy]])
        order = np.argsort(some)
        some = some[order]
        masses = np.concatenate([light * (light <= least) * np.float32(_STEP), weights[heavy]])
        place = int(masses[order].cumsum(dtype=np.float64).searchsorted(rest))
    low = some[place - _MARGIN] if place >= _MARGIN else np.float32(-math.inf)
    high = some[place + _MARGIN] if place + _MARGIN < some.size else np.float32(math.inf)
    return low, high


def _mass(weights: Floats | None, part: Mask) -> float:
    return float(np.count_nonzero(part) if weights is None else (weights * part).sum())


def _taken(keys: Floats, weights: Floats | None, places: Ids) -> tuple[Floats, Floats | None]:
    taken = keys[places]
    if weights is keys:
        return taken, taken
    return taken, None if weights is None else weights[places]


def _last(keys: Floats, weights: Floats | None, mass: float) -> tuple[np.float32, int]:
    """The least key of those that reach the mass, and how many are before it in falling order."""
    if weights is None:
        place = min(max(int(mass), 1), keys.size) - 1
        return np.sort(keys)[keys.size - 1 - place], place
    if weights is keys:
        falling = np.sort(keys)[::-1]
        reached = falling.cumsum(dtype=np.float64)
    else:
        order = np.argsort(-keys, kind="stable")
        falling = keys[order]
        reached = weights[order].cumsum(dtype=np.float64)
    place = min(int(reached.searchsorted(mass)), keys.size - 1)
    return falling[place], place


def _at_least(keys: Floats, least: np.float32, count: int) -> Mask:
    """Which are the `count` greatest, the least of whom is `least`: the first ones of equal keys. Shapes: (K,)."""
    kept = keys >= least
    excess = np.count_nonzero(kept) - count
    if excess > 0:
        kept[np.flatnonzero(keys == least)[-excess:]] = False
    return kept
