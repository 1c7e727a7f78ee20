"""From what was asked to what is made: defaults, sizes, refusals by name."""

import io
import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from models.image.base import PictureRequest
from runner.engine.image_preparation import MAX_COUNT, prepare_image
from runner.engine.types import ImageRequest, TextRequest
from runner.errors import BadRequest, NotImplementedHere
from tests.fakes_image import ABILITIES, DISTILLED, FakePipeline

FULL = replace(ABILITIES, width=1024, height=1024)


def photo(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def prepared(abilities=FULL, **fields):
    """The only picture."""
    (picture,) = prepare_image(
        ImageRequest(**{"prompt": "a hen", "seed": 1, **fields}), FakePipeline(abilities)
    ).pictures
    return picture


def size(abilities=FULL, **fields):
    picture = prepared(abilities, **fields)
    return picture.width, picture.height


def test_what_is_left_open_is_the_pipelines_choice():
    assert prepared() == PictureRequest("a hen", 1024, 1024, steps=4, seed=1, guidance=3.0, strength=ABILITIES.strength)
    assert prepared(DISTILLED) == PictureRequest(
        "a hen", 64, 64, steps=4, seed=1, guidance=0.0, strength=DISTILLED.strength
    )


def test_what_is_given_is_taken():
    picture = prepared(
        width=512,
        height=256,
        steps=9,
        seed=5,
        guidance=0.0,
        preview=2,
        step_cache=0.15,
        images=(photo(20, 10),),
        strength=0.5,
    )
    assert np.array_equal(picture.images[0][0, 0], [255, 0, 0])
    assert replace(picture, images=()) == PictureRequest(
        "a hen", 512, 256, steps=9, seed=5, guidance=0.0, strength=0.5, preview_every=2, step_cache=0.15
    )
    assert prepared(negative_prompt="blur").negative_prompt == "blur"


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((512, 512), (512, 512)),
        ((1920, 1080), (1920, 1088)),
        ((500, 1000), (496, 1008)),
        ((1000, 700), (1008, 704)),
        ((7, 9), (16, 16)),
        ((24, 40), (32, 48)),
        ((4096, 1024), (4096, 1024)),
        ((16, 4096), (16, 4096)),
        ((2048, 2048), (2048, 2048)),
        ((2055, 2047), (2048, 2048)),
    ],
    ids=str,
)
def test_a_size_is_rounded_to_the_nearest_multiple_as_ollama_does_and_the_log_says_so(asked, made, caplog):
    caplog.set_level(logging.INFO, "runner.engine")
    assert size(width=asked[0], height=asked[1]) == made
    told = [record.fields["size"] for record in caplog.records if record.message == "size rounded"]
    assert told == ([] if asked == made else [f"{made[0]}x{made[1]}"])


def test_a_side_that_is_left_open_is_the_default():
    assert size(width=512) == (512, 1024)
    assert size(height=512) == (1024, 512)


@pytest.mark.parametrize(
    ("photographed", "fields", "made"),
    [
        ((320, 160), {}, (320, 160)),
        ((320, 160), {"width": 640}, (640, 320)),
        ((320, 160), {"height": 640}, (1280, 640)),
        ((320, 160), {"width": 256, "height": 256}, (256, 256)),
        ((300, 101), {}, (304, 96)),
    ],
)
def test_an_input_picture_sets_the_size_that_is_left_open(photographed, fields, made):
    assert size(images=(photo(*photographed), photo(64, 64)), **fields) == made


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 4097}, "width must be between 1 and 4096, not 4097"),
        ({"height": 10**6}, "height must be between 1 and 4096"),
        ({"width": 4096, "height": 1040}, "4096x1040, at most 4194304 pixels (2048x2048)"),
        ({"images": (photo(4000, 10),), "height": 4000}, "width and height are too large"),
        ({"steps": 1001}, "steps must be between 1 and 1000"),
        ({"steps": -1}, "steps must be"),
        ({"count": MAX_COUNT + 1}, "n must be between 1 and 10, not 11"),
        ({"count": -1}, "n must be"),
        ({"guidance": -0.5}, "guidance must be between 0 and 100, not -0.5"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"guidance": float("inf")}, "guidance must be"),
        ({"strength": 0.5}, "strength cannot be honoured without an input picture"),
        ({"strength": 0.0, "images": (photo(16, 16),)}, "strength must be more than 0"),
        ({"strength": 1.5, "images": (photo(16, 16),)}, "strength must be between 0 and 1"),
        ({"preview": -1}, "preview must be between 0 and 1000"),
        ({"step_cache": -0.1}, "step_cache must be between 0 and 1"),
        ({"step_cache": 2.0}, "step_cache must be"),
        ({"format": "tiff"}, "format must be one of png, jpeg, webp, not 'tiff'"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "x" * 40_000}, "prompt has 40000 characters, more than 32768"),
        ({"negative_prompt": "x" * 40_000}, "negative_prompt has 40000"),
        ({"negative_prompt": "x", "guidance": 0.0}, "negative_prompt cannot be honoured at guidance 0"),
        ({"images": (photo(16, 16),) * 3}, "images has 3 entries, this pipeline takes 2 input pictures"),
        ({"images": (b"x",)}, "images[0] is not a picture"),
        ({"images": (photo(16, 16), b"")}, "images[1] is empty"),
        ({"images": (photo(4, 4),)}, "images[0] is smaller than 8 pixels"),
        ({"seed": 2**63 - 1}, "seed must be below"),
        ({"seed": -1}, "seed must be below"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(fields, words):
    with pytest.raises(BadRequest) as caught:
        prepared(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guidance": 2.0}, "guidance 2 cannot be honoured: this pipeline is distilled"),
        ({"negative_prompt": "blur"}, "negative_prompt cannot be honoured"),
        ({"strength": 0.5, "images": (photo(16, 16),)}, "strength cannot be honoured"),
        ({"images": (photo(16, 16),)}, "images cannot be honoured: this pipeline makes pictures from text alone"),
    ],
    ids=str,
)
def test_what_this_pipeline_cannot_honour_is_refused_by_name(fields, words):
    with pytest.raises(BadRequest) as caught:
        prepared(DISTILLED, **fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guidance": 0.5}, "guidance must be 0 or at least 1, not 0.5"),
        ({"guidance": 1.0, "negative_prompt": "blur"}, "negative_prompt cannot be honoured at guidance 1;"),
        ({"guidance": 0.0, "negative_prompt": "blur"}, "negative_prompt cannot be honoured at guidance 0;"),
    ],
    ids=str,
)
def test_guidance_that_would_be_none_is_refused_by_name(fields, words):
    with pytest.raises(BadRequest) as caught:
        prepared(replace(FULL, guidance_above=1.0), **fields)
    assert words in str(caught.value)


def test_no_guidance_is_what_a_distilled_pipeline_does_anyway():
    assert prepared(DISTILLED, guidance=0.0).guidance == 0


@pytest.mark.parametrize(
    ("asked", "made"), [("png", "png"), ("JPG", "jpeg"), ("Jpeg", "jpeg"), ("webp", "webp"), ("", "png")]
)
def test_formats_have_their_usual_names(asked, made):
    assert prepare_image(ImageRequest("a hen", format=asked), FakePipeline()).format == made


def test_each_picture_has_its_own_seed():
    made = prepare_image(ImageRequest("a hen", seed=9, count=3), FakePipeline()).pictures
    assert [picture.seed for picture in made] == [9, 10, 11]


def test_text_is_refused():
    with pytest.raises(NotImplementedHere):
        prepare_image(TextRequest("a hen"), FakePipeline())
