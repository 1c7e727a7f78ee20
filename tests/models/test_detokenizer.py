"""Ids to text, a token at a time."""

import random

import pytest

from models.detokenizer import StreamingDetokenizer

TEXT = "Größe 日本語 👩‍👩‍👧‍👦 e\u0301 \x00 שלום\U0010ffff"


def of_bytes(**options: bool) -> StreamingDetokenizer:
    return StreamingDetokenizer(lambda token: bytes([token]), **options)


def test_a_character_comes_with_its_last_byte():
    detokenizer = of_bytes()
    assert [detokenizer.push(byte) for byte in "é👍".encode()] == ["", "é", "", "", "", "👍"]


def test_pieces_cut_anywhere_join_to_the_text():
    draw = random.Random(1)
    raw = TEXT.encode()
    for _ in range(200):
        cuts = sorted(draw.sample(range(len(raw) + 1), 6))
        pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        detokenizer = StreamingDetokenizer(pieces.__getitem__)
        texts = [detokenizer.push(token) for token in range(len(pieces))]
        assert "".join(texts) + detokenizer.finish() == TEXT


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"\xff", ["\ufffd"]),
        (b"\x80", ["\ufffd"]),
        (b"\xc0\x80", ["\ufffd", "\ufffd"]),
        (b"\xe2\x82a", ["", "", "\ufffda"]),
        (b"\xe0\x80", ["", "\ufffd\ufffd"]),
        (b"\xf5", ["\ufffd"]),
        (b"\xf0\x9f\xc3\xa9", ["", "", "\ufffd", "é"]),
    ],
)
def test_bytes_that_can_become_no_character_are_replaced_at_once(raw, texts):
    detokenizer = of_bytes()
    assert [detokenizer.push(byte) for byte in raw] == texts
    assert detokenizer.finish() == ""


def test_random_bytes_give_what_decoding_them_together_gives():
    draw = random.Random(2)
    for _ in range(300):
        raw = bytes(draw.choice((0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x91, 0x8D, 0xFF)) for _ in range(12))
        detokenizer = of_bytes()
        assert "".join(map(detokenizer.push, raw)) + detokenizer.finish() == raw.decode(errors="replace")


def test_the_end_shows_what_was_held_back_once():
    detokenizer = of_bytes()
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.push(0x41) == "A"


def test_only_the_first_space_of_a_whole_text_is_dropped():
    pieces = [b"", b" ", b" a", b" b"]
    detokenizer = StreamingDetokenizer(pieces.__getitem__, strip_space=True)
    assert [detokenizer.push(token) for token in range(4)] == ["", "", " a", " b"]
    kept = StreamingDetokenizer(pieces.__getitem__)
    assert [kept.push(token) for token in range(4)] == ["", " ", " a", " b"]


def test_a_text_that_begins_without_a_space_keeps_the_later_one():
    pieces = [b"a", b" b"]
    detokenizer = StreamingDetokenizer(pieces.__getitem__, strip_space=True)
    assert [detokenizer.push(token) for token in range(2)] == ["a", " b"]
