import mlx.core as mx

from models import host


def test_integers_are_read_as_such():
    assert host.to_ints(mx.array([3, -1], dtype=mx.int32) + 1) == [4, 0]


def test_floats_are_read_as_such():
    assert host.to_floats(mx.array([0.5, 1.5]) * 2) == [1.0, 3.0]


def test_waiting_computes_without_reading():
    lazy = mx.arange(3) + 1
    host.wait([lazy])
    assert lazy.tolist() == [1, 2, 3]
