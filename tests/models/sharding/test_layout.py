"""How axes lie on ranks."""

from models.sharding.layout import Span, cut, divided, is_whole, joined, local_width, ranges, whole


def test_each_rank_has_its_piece():
    assert [ranges(cut(8, 4), rank, 4) for rank in range(4)] == [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)]]


def test_neighbours_share_what_there_are_fewer_pieces_of():
    assert [ranges(cut(8, 2), rank, 4) for rank in range(4)] == [[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]]


def test_the_last_piece_may_be_shorter_and_is_as_wide():
    assert [ranges(cut(7, 3), rank, 3) for rank in range(3)] == [[(0, 3)], [(3, 6)], [(6, 7)]]
    assert local_width(cut(7, 3)) == 3
    assert ranges(cut(5, 4), 3, 4) == [(5, 5)]


def test_spans_lie_one_behind_the_other():
    layout = joined([cut(8, 2), whole(3), whole(2), cut(4, 2)])
    assert layout == (Span(8, 2), Span(5), Span(4, 2))
    assert ranges(layout, 1, 2) == [(4, 8), (8, 13), (15, 17)]
    assert local_width(layout) == 4 + 5 + 2
    assert not is_whole(layout)


def test_parts_end_where_spans_do_or_within_what_is_whole():
    layout = (Span(8, 2), Span(5))
    assert divided(layout, (8, 5)) == [(Span(8, 2),), (Span(5),)]
    assert divided(layout, (10, 3)) == [(Span(8, 2), Span(2)), (Span(3),)]
    assert divided(layout, (4, 9)) is None
