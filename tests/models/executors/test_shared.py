"""What the first of several ranks tells the others: played by one that keeps every order and obeys it."""

import gc

import numpy as np

from models.arch import build_model
from models.errors import ExecutionError
from models.executors import orders
from models.executors.base import Row, Step
from models.executors.mlx import load
from models.executors.shared import Follower, SharedExecutor
from tests.models.executors.checkpoints import CONFIG, RandomCheckpoint

TOKENS = tuple(range(3, 23))


class Obedient:
    """Implements `Others`: one other rank, in this process, with the whole model."""

    def __init__(self, own):
        self.told = []
        self.follower = Follower(own)

    def tell(self, order):
        self.told.append(order)
        self.follower.obey(order)

    def explain(self, error):
        return ExecutionError(str(error))


def shared():
    checkpoint = RandomCheckpoint("F32", CONFIG)
    own, other = (load(checkpoint, build_model(checkpoint.config), policy="float32", longest_step=64) for _ in range(2))
    others = Obedient(other)
    return SharedExecutor(own, others), others, other


def forward(executor, slot, begin, *tokens):
    logits = executor.forward(Step((Row(slot, begin, tokens, 1),)))
    assert logits is not None
    return np.array(logits.read())


def test_what_nobody_holds_any_more_is_forgotten_by_the_others():
    executor, others, _ = shared()
    forward(executor, 0, 0, *TOKENS)
    segment = executor.segment(0, len(TOKENS), 0, len(TOKENS))
    part = segment.part(0, 5)
    assert len(others.follower._segments) == 2
    del segment
    gc.collect()
    forward(executor, 0, len(TOKENS), 7)
    assert list(others.follower._segments) == [part.ticket.number]
    assert sum(isinstance(order, orders.Forget) for order in others.told) == 1


def test_the_others_rows_go_where_the_first_ones_do():
    executor, _, other = shared()
    forward(executor, 0, 0, *TOKENS)
    segment = executor.segment(0, len(TOKENS), 0, len(TOKENS))
    executor.release(0)
    executor.restore(1, [segment])
    said = forward(executor, 1, len(TOKENS), 7)
    followed = other.forward(Step((Row(1, len(TOKENS), (7,), 1),)))
    assert followed is not None
    np.testing.assert_array_equal(np.array(followed.read()), said)
