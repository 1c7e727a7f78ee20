import threading
from collections.abc import Callable

import pytest

from models.executors.onnx import filling
from models.executors.onnx.filling import _each_made
from models.executors.onnx.graph import Graph


class Maker:
    """Makes what it is told to when it may, and knows what was being made together."""

    def __init__(self, together: int = 1) -> None:
        self.made: list[int] = []
        self.most = 0
        self._making = 0
        self._lock = threading.Lock()
        self._meeting = threading.Barrier(together) if together > 1 else None

    def __call__(self, index: int) -> None:
        with self._lock:
            self._making += 1
            self.most = max(self.most, self._making)
        if self._meeting is not None:
            self._meeting.wait(timeout=30)
        with self._lock:
            self._making -= 1
            self.made.append(index)


def test_all_are_made_once_in_their_order_where_there_is_room_for_one():
    maker = Maker()
    assert list(_each_made(maker, [3, 1, 0, 2], [9, 9, 9, 9], room=17, at_once=4)) == [3, 1, 0, 2]
    assert (maker.made, maker.most) == ([3, 1, 0, 2], 1)


def test_where_one_is_made_at_a_time_no_other_thread_takes_memory():
    threads: list[int] = []
    made = _each_made(lambda _: threads.append(threading.get_ident()), range(3), [1] * 3, room=9, at_once=1)
    assert list(made) == [0, 1, 2]
    assert set(threads) == {threading.get_ident()}


def test_what_alone_is_more_than_the_room_is_made_alone():
    maker = Maker()
    assert list(_each_made(maker, [0, 1], [99, 1], room=10, at_once=2)) == [0, 1]
    assert maker.most == 1


def test_as_many_are_made_side_by_side_as_there_is_room_for():
    maker = Maker(together=3)
    assert sorted(_each_made(maker, range(6), [5] * 6, room=15, at_once=8)) == [0, 1, 2, 3, 4, 5]
    assert maker.most == 3


def test_no_more_are_made_side_by_side_than_there_are_cores_for():
    maker = Maker(together=2)
    assert sorted(_each_made(maker, range(4), [1] * 4, room=100, at_once=2)) == [0, 1, 2, 3]
    assert maker.most == 2


def failing(at: int, made: list[int]) -> Callable[[int], None]:
    def make(index: int) -> None:
        if index == at:
            raise MemoryError
        made.append(index)

    return make


def test_after_one_that_fails_none_is_begun():
    made: list[int] = []
    with pytest.raises(MemoryError):
        list(_each_made(failing(1, made), range(4), [1] * 4, room=1, at_once=2))
    assert made == [0]


def test_after_one_that_fails_none_waits_its_turn_even_where_there_is_room():
    made: list[int] = []
    with pytest.raises(MemoryError):
        list(_each_made(failing(0, made), range(9), [1] * 9, room=100, at_once=2))
    assert set(made) <= {1}


def test_who_stops_listening_has_no_more_made():
    maker = Maker()
    telling = _each_made(maker, range(4), [1] * 4, room=1, at_once=2)
    assert next(telling) == 0
    telling.close()
    assert maker.made == [0]


def test_a_second_part_is_planned_for_in_a_large_model_where_there_are_cores(monkeypatch: pytest.MonkeyPatch):
    graph = Graph(weights={"a": 900, "b": 300})
    monkeypatch.setattr(filling, "PART_BYTES", 1000)
    one, two, eight = (filling.transient_bytes(graph, 2000, threads) for threads in (1, 2, 8))
    assert (two - one, eight - one) == (2000, 2000)
    assert filling.transient_bytes(graph, 1000, 8) == filling.transient_bytes(graph, 1000, 1)
