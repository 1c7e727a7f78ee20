"""Orders as they travel."""

import json

import numpy as np
import pytest

from models.executors import orders
from models.executors.base import EncodedPicture, Row, Span, Step

PICTURE = EncodedPicture(np.ones((6, 4), np.float32), (np.ones((6, 4), np.float32),))
PLAIN = [
    orders.Forward(Step((Row(1, 2, (3, 4), 2), Row(5, 6, (), 1)))),
    orders.Sample((1, 2)),
    orders.Copy(1, 2, 3, 4, 5),
    orders.Part(1, 2, 3, 4),
    orders.Keep(1, 2, 3),
    orders.Restore(1, (2, 3), None),
    orders.Restore(1, (2, 3), 4),
    orders.Forget((1, 2)),
    orders.Release(1),
    orders.GiveBack(),
    orders.Close(),
]


@pytest.mark.parametrize("order", PLAIN, ids=lambda order: type(order).__name__)
def test_an_order_arrives_as_it_was_given(order):
    assert orders.from_json(json.loads(json.dumps(orders.to_json(order)))) == order


def test_of_pictures_the_places_travel_alone():
    row = Row(1, 0, (2,) * 8, 1, -3, ((0, 1, 2),) * 8, (Span(1, PICTURE, 0, 6),), ((1, 7),))
    order = orders.from_json(json.loads(json.dumps(orders.to_json(orders.Forward(Step((row,)))))))
    assert isinstance(order, orders.Forward)
    (told,) = order.step.rows
    assert (told.shift, told.positions, told.runs) == (row.shift, row.positions, row.runs)
    (span,) = told.spans
    assert (span.at, span.begin, span.end) == (1, 0, 6)
    assert span.picture.rows.shape == (6, 4)
    assert len(span.picture.deep) == 1
    assert not span.picture.rows.any()


@pytest.mark.parametrize(
    "value", [["dance"], ["release"], ["release", 1, 2], {"release": 1}, ["forward", [1, 2]], None]
)
def test_what_is_no_order_is_refused(value):
    with pytest.raises(ValueError, match=r"no (order|row) is"):
        orders.from_json(value)
