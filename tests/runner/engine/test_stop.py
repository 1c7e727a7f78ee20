import itertools
import random
import time

import pytest

from runner.engine.stop import MAX_STOPS, StopMatcher, build_stops
from runner.errors import BadRequest


def shown(stops: tuple[str, ...], *pieces: str) -> tuple[list[str], bool]:
    matcher = StopMatcher(build_stops(stops))
    out = [matcher.push(piece) for piece in pieces]
    if not matcher.matched:
        out.append(matcher.finish())
    return out, matcher.matched


def test_without_stops_everything_is_shown_at_once():
    assert shown((), "a", "b") == (["a", "b", ""], False)


def test_a_stop_string_inside_one_piece_is_cut_out_with_all_that_follows():
    assert shown(("STOP",), "one STOP two") == (["one "], True)


def test_a_stop_string_across_two_pieces_is_found():
    assert shown(("STOP",), "one ST", "OP two") == (["one ", ""], True)


def test_a_stop_string_across_many_pieces_is_found():
    assert shown(("<|end|>",), "a<", "|", "e", "nd", "|>b") == (["a", "", "", "", ""], True)


def test_what_looked_like_a_stop_string_is_shown_as_soon_as_it_cannot_be_one():
    assert shown(("STOP",), "ST", "O", "RE") == (["", "", "STORE", ""], False)


def test_only_the_part_that_can_still_become_a_stop_string_is_held_back():
    assert shown(("aab",), "xaa", "a") == (["x", "a", "aa"], False)


def test_held_back_text_is_shown_at_the_end():
    assert shown(("STOP",), "good ST") == (["good ", "ST"], False)


def test_nothing_comes_after_a_match():
    matcher = StopMatcher(build_stops(("x",)))
    assert [matcher.push("axb"), matcher.push("more"), matcher.finish()] == ["a", "", ""]


def test_the_stop_string_that_is_complete_first_wins():
    assert shown(("abcdef", "cd"), "abcdef") == (["ab"], True)


def test_of_stop_strings_that_end_together_the_longest_is_cut():
    assert shown(("c", "abc"), "xabc") == (["x"], True)


def test_a_stop_string_that_overlaps_itself_is_found_after_a_false_start():
    assert shown(("abab",), "aba", "abab") == (["", "aba"], True)


def test_an_empty_stop_string_stops_nothing():
    assert shown(("",), "abc") == (["abc", ""], False)


def test_the_outcome_does_not_depend_on_how_the_text_is_cut():
    rng = random.Random(5)
    for _ in range(300):
        stops = tuple("".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(3))
        text = "".join(rng.choices("abc", k=12))
        cuts = sorted(rng.sample(range(1, 12), k=rng.randint(0, 5)))
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts, 12])]
        ends = [(end, start) for start in range(12) for end in range(start + 1, 13) if text[start:end] in stops]
        expected = text[: min(ends)[1]] if ends else text
        out, matched = shown(stops, *pieces)
        assert ("".join(out), matched) == (expected, bool(ends)), (stops, pieces)


def test_too_many_stop_strings_are_refused():
    with pytest.raises(BadRequest, match="too many stop strings: 20000"):
        build_stops(tuple(str(n) for n in range(20_000)))


def test_the_same_stop_string_many_times_counts_once():
    assert build_stops(("x",) * 20_000) is not None


def test_stop_strings_that_are_too_long_are_refused():
    with pytest.raises(BadRequest, match="too long"):
        build_stops(("x" * 300_000,))


def test_thousands_of_stop_strings_cost_little_per_character():
    rng = random.Random(1)
    matcher = StopMatcher(build_stops(tuple("a" * 40 + str(rng.random()) for _ in range(MAX_STOPS))))
    began = time.process_time()
    for _ in range(2_000):
        matcher.push("aaaaaaaaab")
    # A comparison with every stop string would take minutes.
    assert time.process_time() - began < 2
