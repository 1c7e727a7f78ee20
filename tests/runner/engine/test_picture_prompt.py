"""Prompts that refer to pictures: cut, tokenised, spliced, truncated, refused."""

import logging
import threading

import numpy as np
import pytest
from PIL import ExifTags, Image

from models.vision import Pixels, Prepared, Vision
from runner.engine import picture_prompt as module
from runner.engine.sequence import PreparedText
from runner.engine.types import InputImage, SamplingParams, TextRequest
from runner.errors import BadRequest, PromptTooLong
from tests.fakes import BOS, EOS, FakeExecutor
from tests.fakes_vision import BEGIN, END, SIDE, vision
from tests.runner.engine.serving import make_engine, seeing
from tests.runner.engine.test_pictures import HOSTILE, pixels, saved


def shade(value: int, rows: int = 1, columns: int = 2) -> bytes:
    return saved(Image.fromarray(np.full((rows * SIDE, columns * SIDE, 3), value, np.uint8)))


CAT, DOG, HEN = (InputImage(number, shade(50 * number + 20)) for number in range(3))


def prepare(prompt: str, *images: InputImage, of: Vision | None = None, **fields) -> PreparedText:
    adds_bos, limit = fields.pop("adds_bos", False), fields.pop("limit", 256)
    engine = make_engine(FakeExecutor(), eye=seeing(of or vision()), adds_bos=adds_bos, context_length=limit)
    return engine.prepare(TextRequest(prompt, images=images, **fields))


def shown(prepared: PreparedText) -> str:
    """The tokens as text, a place of a picture as its picture's number among those of the request."""
    if prepared.sight is None:
        return bytes(prepared.tokens).decode()
    numbers = {
        token: str(number) for number, each in enumerate(prepared.sight.distinct) for token in each.tokens if token < 0
    }
    return "".join(numbers.get(token) or chr(token) for token in prepared.tokens)


# --- where pictures stand


@pytest.mark.parametrize(
    ("prompt", "images", "expected"),
    [
        ("what is [img-0]?", (CAT,), "what is <00>?"),
        ("[img-0] what?", (CAT,), "<00> what?"),
        ("[img-1][img-0]", (CAT, DOG), "<00><11>"),
        ("[img-0] and [img-0] again", (CAT,), "<00> and <00> again"),
        ("a[img-2]b[img-0]c[img-1]", (CAT, DOG, HEN), "a<00>b<11>c<22>"),
        ("[img-00] [img-000000000000000000002]", (CAT, DOG, HEN), "<00> <11>"),
        ("[img-7]", (InputImage(7, CAT.data),), "<00>"),
        ("[img-0]", (CAT, InputImage(0, DOG.data)), "<00>"),
        ("[img-x] [img-] [img- 0] [IMG-0] [img--1] [img-\u0663] [img-0]", (CAT,), None),
    ],
)
def test_a_picture_stands_where_it_is_referred_to(prompt: str, images: tuple[InputImage, ...], expected: str | None):
    got = prepare(prompt, *images)
    if expected is None:
        expected = prompt.replace("[img-0]", "<00>").encode().decode("latin-1")
    assert shown(got) == expected
    assert got.sight is not None
    assert [got.tokens[each.begin] for each in got.sight.pictures] == [BEGIN] * len(got.sight.pictures)
    assert [got.tokens[each.end - 1] for each in got.sight.pictures] == [END] * len(got.sight.pictures)


def test_of_two_pictures_with_one_id_the_first_counts():
    both = prepare("[img-0]", CAT, InputImage(0, DOG.data))
    assert both.tokens == prepare("[img-0]", CAT).tokens != prepare("[img-0]", InputImage(0, DOG.data)).tokens


def test_the_same_picture_under_two_ids_is_one():
    got = prepare("[img-0][img-1]", CAT, InputImage(1, CAT.data))
    assert len(got.sight.distinct) == 1
    assert len(got.sight.pictures) == 2


def test_without_pictures_a_tag_is_text():
    got = prepare("what is [img-0] or [img-99]?")
    assert (shown(got), got.sight) == ("what is [img-0] or [img-99]?", None)


def test_only_the_first_text_begins_with_bos_even_if_it_is_empty():
    assert prepare("[img-0]a", CAT, adds_bos=True).tokens[:2] == [BOS, BEGIN]
    assert prepare("a[img-0]b", CAT, adds_bos=True).tokens.count(BOS) == 1


def test_pictures_that_nothing_refers_to_are_logged_and_left_alone(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        got = prepare("what is [img-1]?", CAT, DOG, InputImage(-3, b"no picture"))
    assert shown(got) == "what is <00>?"
    (record,) = caplog.records
    assert record.fields == {"ids": "-3,0"}
    assert prepare("nothing", CAT).sight is None


def test_each_picture_is_made_ready_once():
    calls = []
    own = vision()

    def counted(picture: Pixels) -> Prepared:
        calls.append((picture.shape, threading.current_thread()))
        return own.prepare(picture)

    prepare("[img-0][img-0][img-1][img-0]", CAT, DOG, of=Vision(own.tower, counted, own.filler))
    assert [shape for shape, _ in calls] == [(SIDE, 2 * SIDE, 3)] * 2


# --- what pictures may be


def turned(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return saved(picture, "JPEG", quality=100, subsampling=0, exif=exif)


def several(picture: Image.Image) -> bytes:
    return saved(picture, "GIF", save_all=True, append_images=[Image.new("RGB", picture.size, "red")])


WIDE = Image.fromarray(pixels(64, 32))
READ = {
    "png": (saved(WIDE), (32, 64)),
    "jpeg": (saved(WIDE, "JPEG"), (32, 64)),
    "jpeg turned": (turned(WIDE), (64, 32)),
    "gif": (several(WIDE), (32, 64)),
    "webp": (saved(WIDE, "WEBP"), (32, 64)),
    "alpha": (saved(WIDE.convert("RGBA")), (32, 64)),
    "grey": (saved(WIDE.convert("L")), (32, 64)),
    "grey and alpha": (saved(WIDE.convert("LA")), (32, 64)),
    "two colours": (saved(WIDE.convert("1")), (32, 64)),
    "a palette": (saved(WIDE.convert("P")), (32, 64)),
    "16 bits": (saved(Image.fromarray(np.full((32, 64), 40_000, np.uint16))), (32, 64)),
    "one pixel wide": (saved(Image.fromarray(pixels(1, 64))), (64, 1)),
    "one pixel": (saved(Image.fromarray(pixels(1, 1))), (1, 1)),
    "large": (saved(Image.fromarray(pixels(5000, 60))), (60, 5000)),
}


@pytest.mark.parametrize("name", READ)
def test_every_usual_picture_is_read_upright_and_at_its_size(name: str):
    data, size = READ[name]
    seen: list[Pixels] = []
    own = vision()

    def noted(picture: Pixels) -> Prepared:
        seen.append(picture)
        return own.prepare(np.zeros((8, 8, 3), np.uint8))

    prepare("[img-0]", InputImage(0, data), of=Vision(own.tower, noted, own.filler))
    (picture,) = seen
    assert (picture.shape, picture.dtype) == ((*size, 3), np.uint8)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_refused_in_the_parents_words(name: str):
    data, reason = HOSTILE[name]
    with pytest.raises(BadRequest, match=r"^decode image: \[img-0\] ") as caught:
        prepare("[img-0]", InputImage(0, data))
    assert reason.replace("images[0]", "[img-0]") in str(caught.value)


def test_a_picture_that_the_model_cannot_look_at_is_refused():
    long = saved(Image.fromarray(np.zeros((1, 10_000, 3), np.uint8)))
    with pytest.raises(BadRequest, match=r"^decode image: \[img-0\] is 10000x1 pixels, which is too narrow$"):
        prepare("[img-0]", InputImage(0, long))


def test_pictures_may_not_take_more_than_so_much_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_PREPARED_BYTES", 2 << 20)
    one = [InputImage(number, shade(number, 30, 30)) for number in range(4)]
    prompt = "".join(f"[img-{number}]" for number in range(4))
    assert prepare(prompt[:14], *one, limit=20_000).sight is not None
    with pytest.raises(BadRequest, match="take more than 2 MiB when made ready"):
        prepare(prompt, *one, limit=20_000)


def counted(calls: list[int]) -> Vision:
    own = vision()
    return Vision(own.tower, lambda picture: calls.append(1) or own.prepare(picture), own.filler)


def test_pictures_may_not_have_more_than_so_many_pixels_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 5 * 16 * SIDE * SIDE)
    many = [InputImage(number, shade(number, 4, 4)) for number in range(30)]
    prompt = "".join(f"[img-{number}]" for number in range(30))
    calls: list[int] = []
    with pytest.raises(BadRequest, match="have more than 0 megapixels together"):
        prepare(prompt, *many, of=counted(calls), limit=20_000, truncate=True)
    assert len(calls) == 6, "the others are not decoded"


def test_pictures_behind_those_that_fill_the_context_are_not_decoded():
    many = [InputImage(number, shade(number, 4, 4)) for number in range(30)]
    calls: list[int] = []
    with pytest.raises(PromptTooLong):
        prepare("".join(f"[img-{number}]" for number in range(30)), *many, of=counted(calls), limit=100)
    assert len(calls) == 6


# --- what is refused


def test_a_model_without_vision_says_so():
    engine = make_engine(FakeExecutor())
    with pytest.raises(BadRequest, match=r"^this model does not support image input$"):
        engine.prepare(TextRequest("[img-0]", images=(CAT,)))
    assert engine.prepare(TextRequest("[img-0]")).tokens == list(b"[img-0]")


@pytest.mark.parametrize(
    ("tag", "told"),
    [
        ("1", "1"),
        (str(2**63), str(2**63)),
        (str(2**64), str(2**64)),
        ("9" * 5000, "9" * 20),
        ("0" * 5000 + "3", "3"),
        ("18446744073709551616", "18446744073709551616"),
    ],
    ids=["1", "2**63", "2**64", "5000 digits", "5000 zeros", "a uint64's end"],
)
def test_a_tag_without_a_picture_is_refused_by_its_number(tag: str, told: str):
    with pytest.raises(BadRequest, match=f"^invalid image index: {told}$"):
        prepare(f"[img-0] [img-{tag}]", CAT)


def test_hundreds_of_tags_are_too_long_and_not_slow():
    with pytest.raises(PromptTooLong, match=r"^input length \(1200 tokens\)"):
        prepare("[img-0]" * 300, CAT, limit=1000)
    with pytest.raises(BadRequest, match="the prompt refers to images 1000000 times, and the context has 256 tokens"):
        prepare("[img-0]" * 1_000_000, CAT)
    got = prepare("[img-0]" * 200, CAT, limit=1000)
    assert len(got.tokens) == 800


def test_a_text_that_is_too_long_is_told_before_any_picture_is_decoded():
    with pytest.raises(PromptTooLong):
        prepare("x" * 100 + "[img-0]" + "y" * 200, InputImage(0, b"no picture"), limit=256)


# --- truncation


def truncated(prompt: str, *images: InputImage, limit: int, keep: int = 4) -> str:
    return shown(prepare(prompt, *images, limit=limit, truncate=True, num_keep=keep))


def test_truncation_drops_pictures_as_a_whole():
    prompt = "abcd" + "[img-0]" + "e" * 10 + "[img-1]" + "f" * 10
    assert truncated(prompt, CAT, DOG, limit=64) == "abcd<00>eeeeeeeeee<11>ffffffffff"
    # 32 tokens; the first picture is within what goes, or in part.
    assert truncated(prompt, CAT, DOG, limit=32) == "abcdeeeeeeeeee<00>ffffffffff"
    assert truncated(prompt, CAT, DOG, limit=26) == "abcdeeeeeee<00>ffffffffff"
    assert truncated(prompt, CAT, DOG, limit=18) == "abcdffffffffff"
    assert truncated(prompt, CAT, DOG, limit=12) == "abcdfffffff"


def test_what_is_kept_at_the_front_has_whole_pictures_alone():
    prompt = "ab[img-0]" + "c" * 30
    for keep, expected in ((2, "ab" + "c" * 17), (3, "ab" + "c" * 16), (5, "ab" + "c" * 14), (6, "ab<00>" + "c" * 13)):
        assert truncated(prompt, CAT, limit=20, keep=keep) == expected


def test_a_picture_at_the_end_that_does_not_fit_is_refused():
    large = InputImage(0, shade(9, 5, 5))
    with pytest.raises(PromptTooLong):
        prepare("what is this? [img-0]", large, limit=20, truncate=True)
    assert truncated("x" * 30 + "[img-0]!", large, limit=40) == "xxxx" + "x" * 7 + "<" + "0" * 25 + ">!"


def test_of_a_hopeless_prompt_only_the_ends_are_made_tokens():
    prompt = "start" + "[img-0]" * 250 + "x" * 5000 + "[img-1]end"
    got = truncated(prompt, CAT, DOG, limit=256)
    assert got.startswith("star")
    assert got.endswith("x<00>end")
    assert len(prepare(prompt, CAT, DOG, limit=256, truncate=True).tokens) == 255


# --- what reads tokens


def test_penalties_look_back_on_text_alone():
    request = TextRequest("aab[img-0]", SamplingParams(repeat_penalty=1.3, repeat_last_n=64), images=(CAT,))
    engine = make_engine(FakeExecutor(), eye=seeing(vision()))
    engine.add(1, engine.prepare(request))
    row = engine._rows[1]
    row.begin(lambda: None)
    assert sorted(zip(row.counts.ids().tolist(), row.counts.counts().tolist(), strict=True)) == [
        (BEGIN, 1), (END, 1), (ord("a"), 2), (ord("b"), 1),
    ]  # fmt: skip


def test_an_expansion_that_the_model_has_no_embedding_for_is_refused():
    own = vision()

    def foreign(picture: Pixels) -> Prepared:
        made = own.prepare(picture)
        return Prepared(made.passes, made.patches, (EOS + 1, *made.expansion))

    with pytest.raises(BadRequest, match="for which the model has no embedding"):
        prepare("[img-0]", CAT, of=Vision(own.tower, foreign, own.filler))
