"""The grammar of flags, apart from which flags there are."""

import pytest

from runner.flags import Flag, Settings, UsageError, Value, debug_level, parse_bool, parse_flags

FLAGS = (
    Flag("name", "TEXT", "a text", ("NAME", "OLD_NAME")),
    Flag("count", "N", "a number"),
    Flag("loud", "", "a switch"),
    Flag("file", "FILE", "several files", ("FILES",), repeats=True),
)


def test_values_know_the_flag_they_came_from():
    values, words = parse_flags(["-name=a=b", "--count", "3", "-loud"], FLAGS)
    assert values == {
        "name": Value("a=b", "--name"),
        "count": Value("3", "--count"),
        "loud": Value("true", "--loud"),
    }
    assert words == []


def test_only_a_flag_that_repeats_keeps_all_its_values():
    values, _ = parse_flags(["--file", "a", "--count=1", "-file=b,c", "--count=2", "--file="], FLAGS)
    settings = Settings(values, FLAGS, {"FILES": "z"})
    assert settings.texts("file") == ["a", "b", "c"]
    assert values["count"].text == "2"
    assert Settings({}, FLAGS, {"FILES": "x,y"}).texts("file") == ["x", "y"]
    assert Settings({}, FLAGS, {}).texts("file") == []


def test_a_value_may_look_like_a_flag():
    assert parse_flags(["--count", "-5"], FLAGS)[0]["count"].text == "-5"


def test_the_first_word_ends_the_flags_unless_they_may_be_interspersed():
    assert parse_flags(["word", "--loud"], FLAGS) == ({}, ["word", "--loud"])
    values, words = parse_flags(["word", "--loud", "-", "more"], FLAGS, interspersed=True)
    assert list(values) == ["loud"]
    assert words == ["word", "-", "more"]


def test_two_dashes_end_the_flags_and_three_are_no_flag():
    assert parse_flags(["--", "--loud"], FLAGS) == ({}, ["--loud"])
    with pytest.raises(UsageError, match="unknown flag ---loud"):
        parse_flags(["---loud"], FLAGS)


def test_the_first_variable_that_is_set_stands_in_for_a_flag():
    assert Settings({}, FLAGS, {"NAME": "", "OLD_NAME": "old"}).text("name") == "old"
    assert Settings({}, FLAGS, {"NAME": "new", "OLD_NAME": "old"}).text("name") == "new"
    assert Settings({"name": Value("flag", "--name")}, FLAGS, {"NAME": "new"}).text("name") == "flag"


def test_an_empty_flag_is_a_value_not_given_but_hides_the_variable():
    assert Settings({"name": Value("", "--name")}, FLAGS, {"NAME": "new"}).text("name") is None


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("0x10", 16), ("1_000", 1000), ("-3", -3)])
def test_whole_numbers_are_read_as_go_reads_them(text, number):
    assert Settings({"count": Value(text, "--count")}, FLAGS, {}).integer("count", least=-5) == number


@pytest.mark.parametrize("text", ["", "1.5", "ten", "99999999999999999999", "nan"])
def test_what_is_no_whole_number_within_bounds_is_refused(text):
    with pytest.raises(UsageError, match="--count"):
        Settings({"count": Value(text, "--count")}, FLAGS, {}).integer("count", least=0)


@pytest.mark.parametrize("text", ["", "inf", "nan", "-1", "warm"])
def test_what_is_no_finite_number_is_refused(text):
    with pytest.raises(UsageError, match="--count must be a number"):
        Settings({"count": Value(text, "--count")}, FLAGS, {}).number("count", least=0)


def test_booleans_are_spelt_as_in_go():
    assert [parse_bool(text) for text in ("1", "t", "TRUE", "0", "F", "false")] == [True] * 3 + [False] * 3
    assert [parse_bool(text) for text in ("yes", "on", "tRUE", "")] == [None] * 4


@pytest.mark.parametrize(
    ("text", "level"),
    [("", 0), ("0", 0), ("false", 0), ("1", 1), ("true", 1), ("T", 1), ("2", 2), ("-1", -1), ("loud", 0)],
)
def test_ollama_debug_is_read_as_ollama_reads_it(text, level):
    assert debug_level({"OLLAMA_DEBUG": text}) == level
