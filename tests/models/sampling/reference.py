"""Sampling as plainly as it can be said: everything sorted, in float64."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from models.sampling import Sampling

OFF = Sampling(temperature=1.0, top_k=0, top_p=0.0)
LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -3.0, -9.0], dtype=np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def only(tokens: Sequence[int], probabilities: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(probabilities)
    kept[tokens] = probabilities[tokens]
    return kept / kept.sum()


def penalized(logits: np.ndarray, sampling: Sampling, history: Sequence[int]) -> np.ndarray:
    scores = logits.astype(np.float64)
    for token, count in Counter(history).items():
        if sampling.repeat_penalty not in (0, 1):
            negative = scores[token] < 0
            scores[token] *= sampling.repeat_penalty if negative else 1 / sampling.repeat_penalty
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return scores


def distribution(logits: np.ndarray, sampling: Sampling, history: Sequence[int] = ()) -> np.ndarray:
    """The probability of each token, 0 for those that were ruled out."""
    scores = penalized(logits, sampling, history)
    order = np.argsort(-scores, kind="stable")
    if sampling.temperature <= 0:
        return np.eye(scores.size)[order[0]]
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    probabilities = only(order, softmax(scores / max(sampling.temperature, 1e-7)))
    if 0 < sampling.typical_p < 1:
        possible = np.flatnonzero(probabilities > 0)
        surprise = -np.log(probabilities[possible])
        distance = np.abs(surprise - (probabilities[possible] * surprise).sum())
        probabilities = fewest(possible[np.argsort(distance, kind="stable")], probabilities, sampling.typical_p)
    kept = probabilities
    if 0 < sampling.top_p < 1:
        kept = fewest(np.argsort(-probabilities, kind="stable"), probabilities, sampling.top_p)
    if sampling.min_p > 0:
        least = min(sampling.min_p, 1) * probabilities.max()
        kept = np.where(probabilities >= least, kept, 0)
    return kept / kept.sum()


def fewest(order: np.ndarray, probabilities: np.ndarray, mass: float) -> np.ndarray:
    """Only the first of `order`, up to the one that reaches the mass."""
    before = np.cumsum(probabilities[order]) - probabilities[order]
    return only(order[before < mass], probabilities)


def agrees(token: int, expected: np.ndarray, uniform: float, rounding: float) -> bool:
    """The token is the one at `uniform` in the cumulative distribution, but for rounding."""
    end = np.cumsum(expected)[token]
    return bool(expected[token] > 0 and end - expected[token] - rounding <= uniform <= end + rounding)
