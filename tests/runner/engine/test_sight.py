"""Where pictures stand in a row, and what steps are told of them."""

from dataclasses import replace

import numpy as np
import pytest

from models.executors.base import EncodedPicture, Row, Span
from models.vision import PLACE, Prepared
from models.vision.positions import positions_of
from runner.engine.sight import PlacedPicture, Sight, identified
from tests.fakes_vision import BEGIN, BREAK, END, FILLER, PASS_BYTES, SIDE, WIDTH, looked_at, vision


def picture(rows: int, columns: int, shade: int = 100, **options):
    pixels = np.full((rows * SIDE, columns * SIDE, 3), shade, np.uint8)
    return identified(vision(**options).prepare(pixels))


def sight(*placed, **options) -> Sight:
    return Sight(vision(**options), tuple(PlacedPicture(begin, each) for begin, each in placed))


def encoded(each) -> EncodedPicture:
    return looked_at(each.prepared.passes)


def tokens_of(length: int, *placed) -> list[int]:
    tokens = [65] * length
    for begin, each in placed:
        tokens[begin : begin + len(each.tokens)] = each.tokens
    return tokens


# --- what tells pictures apart


def test_the_same_picture_has_the_same_numbers_and_another_none_of_them():
    one, same, other = picture(2, 3), picture(2, 3), picture(2, 3, shade=101)
    assert one.tokens == same.tokens
    assert (one.tokens[0], one.tokens[-1]) == (BEGIN, END)
    assert not set(one.tokens[1:-1]) & set(other.tokens[1:-1])


def test_every_place_has_a_negative_number_of_its_own_that_fits_into_64_bits():
    places = picture(40, 40).tokens[1:-1]
    assert len(set(places)) == len(places) == 1600
    assert all(-(2**62) <= place < 0 for place in places)
    # Of random numbers of 62 bits: half of each bit's are set.
    bits = np.array([[(-1 - place) >> bit & 1 for bit in range(62)] for place in places])
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.1)


GIVEN = {"pixels": np.arange(12, dtype=np.float32).reshape(3, 4)}


@pytest.mark.parametrize(
    "other",
    [
        Prepared(({"pixels": GIVEN["pixels"].reshape(4, 3)},), 4, (PLACE, PLACE)),
        Prepared(({"pixels": GIVEN["pixels"].astype(np.float64)},), 4, (PLACE, PLACE)),
        Prepared(({"patches": GIVEN["pixels"]},), 4, (PLACE, PLACE)),
        Prepared((GIVEN, GIVEN), 4, (PLACE, PLACE)),
        Prepared((GIVEN,), 4, (PLACE, 7, PLACE)),
        Prepared((GIVEN,), 4, (PLACE, PLACE), grid=(1, 2)),
        Prepared(({"pixels": GIVEN["pixels"] + np.float32(1e-6)},), 4, (PLACE, PLACE)),
    ],
    ids=["shape", "type", "name", "passes", "expansion", "grid", "a value"],
)
def test_whatever_the_tower_is_given_tells_pictures_apart(other: Prepared):
    own = identified(Prepared((GIVEN,), 4, (PLACE, PLACE)))
    assert identified(other).digest != own.digest


def test_how_an_array_lies_in_memory_is_nothing_to_tell_by():
    strided = np.repeat(GIVEN["pixels"], 2, axis=1)[:, ::2]
    assert not strided.flags.c_contiguous
    same = identified(Prepared(({"pixels": strided},), 4, (PLACE, PLACE)))
    assert same.digest == identified(Prepared((GIVEN,), 4, (PLACE, PLACE))).digest


# --- what a step is told


def test_a_chunk_names_the_rows_that_stand_in_it_and_has_the_filler_for_its_tokens():
    one = picture(2, 3)
    own = sight((3, one))
    tokens, seen = tokens_of(20, (3, one)), {one.digest: encoded(one)}
    whole = own.row(5, 0, tokens, 1, seen)
    assert whole.tokens == (65, 65, 65, BEGIN, *[FILLER] * 6, END, *[65] * 9)
    assert whole.spans == (Span(4, seen[one.digest], 0, 6),)
    assert (whole.slot, whole.begin, whole.wanted, whole.runs, whole.positions) == (5, 0, 1, (), ())
    middle = own.row(5, 6, tokens[6:8], 0, seen)
    assert (middle.tokens, middle.spans) == ((FILLER, FILLER), (Span(0, seen[one.digest], 2, 4),))
    assert own.row(5, 10, tokens[10:], 1, {}) == Row(5, 10, (END, *[65] * 9), 1)


def test_places_that_tokens_divide_are_a_span_each():
    one = picture(2, 3, breaks=True)
    tokens = tokens_of(10, (0, one))
    row = sight((0, one), two_way=True).row(0, 0, tokens, 1, {one.digest: encoded(one)})
    assert row.tokens == (BEGIN, *[FILLER] * 3, BREAK, *[FILLER] * 3, END, 65)
    assert [(span.at, span.begin, span.end) for span in row.spans] == [(1, 0, 3), (5, 3, 6)]
    assert row.runs == ((1, 4), (5, 8))


def test_the_same_picture_twice_is_one_to_look_at_and_two_spans():
    one, other = picture(1, 2), picture(1, 1, shade=3)
    own = sight((0, one), (4, other), (8, one))
    assert own.distinct == [one, other]
    assert own.looked_at(0, 20) == [one, other]
    assert own.looked_at(4, 8) == [other]
    assert own.looked_at(8, 9) == [], "the token in front of it is none of its places"
    row = own.row(0, 0, tokens_of(12, (0, one), (4, other), (8, one)), 1, {p.digest: encoded(p) for p in (one, other)})
    assert [(span.at, span.end - span.begin) for span in row.spans] == [(1, 2), (5, 1), (9, 2)]


def test_two_pictures_side_by_side_without_a_token_between_them_are_two_runs():
    one = picture(1, 2, around=False)
    row = sight((0, one), (2, one), two_way=True).row(0, 0, [*one.tokens, *one.tokens], 1, {one.digest: encoded(one)})
    assert row.runs == ((0, 2), (2, 4))


def test_positions_are_those_of_the_whole_row_wherever_it_is_cut():
    one, other = picture(2, 3, axes=True), picture(4, 1, shade=7, axes=True)
    own = sight((3, one), (15, other), axes=True)
    tokens, seen = tokens_of(30, (3, one), (15, other)), {p.digest: encoded(p) for p in (one, other)}
    expected, shift = positions_of(30, [(4, (2, 3)), (16, (4, 1))])
    assert own.shift == shift == 3 - 6 + 4 - 4
    for size in (1, 2, 5, 30):
        told = []
        for begin in range(0, 30, size):
            row = own.row(0, begin, tokens[begin : begin + size], 0, seen)
            places = range(begin, begin + row.length)
            told += row.positions or [(place + row.shift,) * 3 for place in places]
            assert not (row.positions and row.shift)
        assert tuple(told) == expected
    assert own.row(0, 30, (), 1, {}) == Row(0, 30, (), 1, shift=shift)


def test_without_axes_nothing_is_said_of_positions():
    own = sight((3, picture(2, 3)))
    assert own.shift == 0
    assert own.row(0, 0, [65, 65], 1, {}).positions == ()


# --- where a row may be divided


def test_a_run_that_looks_both_ways_is_never_cut():
    one = picture(2, 5, two_way=True)
    own = sight((10, one), two_way=True)  # places [11, 21)
    assert [own.whole(place) for place in (0, 11, 12, 20, 21, 30)] == [0, 11, 11, 11, 21, 30]
    assert own.chunk_end(0, 11) == 11
    assert own.chunk_end(0, 16) == 11, "it ends before the run"
    assert own.chunk_end(11, 16) == 21, "or holds it whole, however long"
    assert own.chunk_end(0, 21) == 21
    assert own.long_runs(9) == (11,)
    assert own.long_runs(10) == ()


def test_other_pictures_may_be_cut_anywhere():
    own = sight((10, picture(2, 5)))
    assert own.whole(15) == 15
    assert own.chunk_end(0, 16) == 16
    assert own.long_runs(1) == ()


def test_dropped_tokens_take_whole_pictures_along():
    one, other = picture(1, 2), picture(1, 3, shade=9)
    own = sight((2, one), (10, other))  # [2, 6) and [10, 15)
    assert [own.outside(place, ahead=True) for place in (2, 3, 5, 6, 12)] == [2, 6, 6, 6, 15]
    assert [own.outside(place, ahead=False) for place in (2, 3, 5, 6, 12)] == [2, 2, 2, 6, 10]
    assert [(each.begin, each.picture) for each in own.without(1, 8).pictures] == [(3, other)]
    assert [(each.begin, each.picture) for each in own.without(6, 10).pictures] == [(2, one), (6, other)]
    assert own.without(0, 15).pictures == ()
    assert own.without(0, 15).end == 0


# --- what it takes


def test_pixels_rows_and_the_largest_pass_are_counted_once_for_each_picture():
    one, other = picture(1, 2), picture(3, 3, shade=9)
    own = sight((0, one), (10, other), (30, one))
    assert own.held_bytes == one.prepared.nbytes + other.prepared.nbytes
    assert own.needed_bytes == 4 * WIDTH * (2 + 9) + 9 * PASS_BYTES
    deep = Sight(vision(deep=2), own.pictures)
    assert deep.needed_bytes == 3 * 4 * WIDTH * (2 + 9) + 9 * PASS_BYTES
    assert replace(own, pictures=()).needed_bytes == 0
