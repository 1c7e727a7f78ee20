"""Which steps are computed, by indicators made up for it."""

from collections.abc import Sequence

import mlx.core as mx
import pytest

from models.image.step_cache import StepCache


def steps_computed(threshold: float, indicators: Sequence[float]) -> list[bool]:
    """Whether each step was computed, with these indicators; the residual kept is the step's number."""
    cache, last, found = StepCache(threshold, len(indicators)), -1, []
    for step, indicator in enumerate(indicators):
        residual = cache.lookup(mx.full((2, 2), indicator))
        found.append(residual is None)
        if residual is None:
            cache.keep(mx.array([step]))
            last = step
        else:
            assert residual.item() == last
    assert cache.computed == sum(found)
    return found


def test_a_step_is_skipped_while_little_has_changed():
    assert steps_computed(0.1, [1.0, 1.05, 1.06, 1.0]) == [True, False, False, True]


def test_small_changes_add_up():
    assert steps_computed(0.1, [1.0, 1.04, 1.08, 1.12, 1.16, 1.2]) == [True, False, False, True, False, True]


def test_a_change_back_is_a_change():
    assert steps_computed(0.15, [1.0, 1.1, 1.0, 1.0, 1.0]) == [True, False, True, False, True]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_first_step_and_the_last_are_always_computed(steps: int):
    found = steps_computed(9.0, [1.0] * steps)
    assert found == [step in (0, steps - 1) for step in range(steps)]


def test_a_threshold_that_nothing_is_below_computes_everything():
    assert all(steps_computed(1e-9, [1.0, 1.1, 1.2, 1.3]))
