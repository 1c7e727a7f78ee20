"""Buckets of relative positions, by their definition."""

import math

import pytest

from models.ops import Embedding, RelativeBias


def bucket(distance: int, buckets: int, most: int) -> int:
    """One key's bucket, by the paper's formula in plain numbers."""
    half = buckets // 2
    near, far = half // 2, abs(distance)
    if far >= near:
        far = min(near + int(math.log(far / near) / math.log(most / near) * (half - near) + 1e-6), half - 1)
    return far + half * (distance > 0)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20)])
def test_every_pair_has_the_bucket_of_its_distance(buckets, most):
    made = RelativeBias(Embedding("b", buckets, 1), most).buckets(150)
    assert made.shape == (150, 150)
    assert [made[0, key] for key in range(150)] == [bucket(key, buckets, most) for key in range(150)]
    assert [made[149, key] for key in range(150)] == [bucket(key - 149, buckets, most) for key in range(150)]
