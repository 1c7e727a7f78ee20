"""Positions along three axes."""

import pytest

from models.vision.positions import positions_of


def test_without_pictures_a_tokens_position_is_its_place():
    assert positions_of(3, []) == (((0, 0, 0), (1, 1, 1), (2, 2, 2)), 0)


def test_a_pictures_places_share_a_time_and_text_goes_on_behind_the_longer_side():
    positions, shift = positions_of(9, [(1, (2, 3))])
    assert positions[1:7] == ((1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 1), (1, 2, 2), (1, 2, 3))
    assert positions[7:] == ((4, 4, 4), (5, 5, 5))
    assert shift == 6 - 9


def test_the_shift_counts_a_picture_that_nothing_follows():
    assert positions_of(4, [(0, (4, 1))])[1] == 0
    assert positions_of(5, [(1, (2, 2))])[1] == -2


def test_pictures_one_right_behind_the_other_each_begin_where_the_one_before_ends():
    positions, shift = positions_of(6, [(0, (2, 2)), (4, (1, 2))])
    assert positions[4:] == ((2, 2, 2), (2, 2, 3))
    assert shift == 4 - 6


def test_the_positions_of_a_rows_beginning_are_the_beginning_of_its_positions():
    pictures = [(3, (2, 3)), (12, (4, 1))]
    whole, _ = positions_of(30, pictures)
    for length in (3, 9, 12, 16, 29):
        within = [(first, grid) for first, grid in pictures if first + grid[0] * grid[1] <= length]
        assert positions_of(length, within)[0] == whole[:length]


@pytest.mark.parametrize("runs", [[(4, (2, 2))], [(2, (1, 2)), (1, (1, 1))], [(0, (1, 3)), (2, (1, 2))]])
def test_pictures_that_leave_the_row_or_overlap_are_refused(runs: list[tuple[int, tuple[int, int]]]):
    with pytest.raises(ValueError, match="cannot begin at"):
        positions_of(6, runs)
