"""Picture files from anywhere, and those that go out."""

import io
import struct
import threading
import warnings
import zlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image

from runner.engine.pictures import Note, decode_picture, encode_picture, encode_preview
from runner.errors import BadRequest, GenerationError

NOTE = Note(
    prompt='a hen, "red" ö 鶏',
    negative_prompt="blur",
    steps=9,
    guidance=4.5,
    seed=2**53,
    width=64,
    height=48,
    model="z-image:turbo",
    software="ollama-mlx-runner 1.2.3",
)
PARAMETERS = (
    'a hen, "red" ö 鶏\nNegative prompt: blur\n'
    "Steps: 9, Sampler: Euler, CFG scale: 4.5, Seed: 9007199254740992, Size: 64x48, "
    "Model: z-image:turbo, Version: ollama-mlx-runner 1.2.3"
)
LARGE = 1 << 24


def pixels(width=64, height=48):
    """A smooth picture that is not symmetric."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def noise(width, height):
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image, format_="PNG", **options):
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def png(width=64, height=48, **options):
    return saved(Image.fromarray(pixels(width, height)), **options)


def bomb(width, height):
    """A PNG of a few hundred bytes that claims to be that large."""

    def block(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", body) + block(b"IEND", b"")


def close(decoded, expected, tolerance):
    assert decoded.dtype == np.uint8
    assert decoded.shape == expected.shape
    return np.abs(decoded.astype(int) - expected).mean() < tolerance


@pytest.mark.parametrize(
    ("format_", "options", "tolerance"),
    [
        ("PNG", {}, 0.001),
        ("PNG", {"interlace": 1}, 0.001),
        ("JPEG", {"quality": 95}, 3),
        ("JPEG", {"progressive": True, "quality": 95}, 3),
        ("WEBP", {"lossless": True}, 0.001),
        ("WEBP", {"quality": 95}, 4),
        ("GIF", {}, 25),
    ],
)
def test_every_format_is_read(format_, options, tolerance):
    data = saved(Image.fromarray(pixels()), format_, **options)
    assert close(decode_picture(data, "images[0]"), pixels(), tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90,
    }[orientation]
    data = saved(Image.fromarray(pixels()), "JPEG", quality=98, subsampling=0, exif=exif)
    assert close(decode_picture(data, "x"), turned(pixels()), 3)


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_what_is_transparent_becomes_white(format_):
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:24] = 255
    alpha[24:36] = 128
    data = saved(
        Image.fromarray(np.dstack([pixels(), alpha])), format_, **({"lossless": True} if format_ == "WEBP" else {})
    )
    decoded = decode_picture(data, "x").astype(int)
    assert np.abs(decoded[:24] - pixels()[:24]).max() <= 1
    assert np.abs(decoded[24:36] - (pixels()[24:36].astype(int) + 255) / 2).max() <= 2
    assert (decoded[36:] == 255).all()


def test_a_transparent_colour_of_a_palette_becomes_white():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    decoded = decode_picture(saved(image, transparency=1), "x")
    assert decoded.tolist() == [[[255, 0, 0], [255, 255, 255]], [[255, 255, 255], [255, 0, 0]]]


def test_grey_black_and_white_palettes_and_ink_are_read():
    grey = pixels()[..., 0]
    for image in (Image.fromarray(grey), Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), "LA")):
        assert close(decode_picture(saved(image), "x"), np.dstack([grey] * 3), 0.001)
    two = Image.fromarray(grey).convert("1")
    assert set(np.unique(decode_picture(saved(two), "x"))) == {0, 255}
    assert close(decode_picture(saved(Image.fromarray(pixels()).quantize(256)), "x"), pixels(), 8)
    ink = Image.fromarray(pixels()).convert("CMYK")
    assert close(decode_picture(saved(ink, "JPEG", quality=98), "x"), pixels(), 6)


def test_sixteen_bits_of_grey_keep_their_range():
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = decode_picture(saved(Image.fromarray(deep)), "x")
    assert np.array_equal(decoded[..., 0].ravel(), np.arange(256))


def test_of_several_frames_the_first_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for format_ in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], format_, save_all=True, append_images=frames[1:])
        assert decode_picture(data, "x")[4, 4].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_a_large_photo_is_shrunk_to_what_a_pipeline_looks_at():
    decoded = decode_picture(saved(Image.new("RGB", (8192, 2048), "red"), "JPEG"), "x")
    assert decoded.shape == (1024, 4096, 3)
    decoded = decode_picture(saved(Image.new("RGB", (4500, 300), "red")), "x")
    assert decoded.shape == (273, 4096, 3)


PLAIN = png()
JPEG = saved(Image.fromarray(noise(64, 48)), "JPEG")
HOSTILE = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "is not a picture in PNG, JPEG, WebP or GIF format"),
    "zeros": (bytes(1000), "is not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not a picture"),
    "bmp": (saved(Image.fromarray(pixels()), "BMP"), "is not a picture"),
    "tiff": (saved(Image.fromarray(pixels()), "TIFF"), "is not a picture"),
    "truncated png": (PLAIN[: len(PLAIN) // 2], "is broken"),
    "header alone": (PLAIN[:33], "is not a picture"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "is broken"),
    "truncated webp": (saved(Image.fromarray(noise(64, 48)), "WEBP")[:200], "images[0]"),
    "truncated gif": (saved(Image.fromarray(noise(64, 48)), "GIF")[:900], "images[0]"),
    "bad checksum": (PLAIN.replace(b"IDAT", b"IDAX", 1), "images[0]"),
    "no pixels": (bomb(0, 10), "images[0]"),
    "bomb": (bomb(50_000, 50_000), "is too large; at most 16384 pixels a side"),
    "long bomb": (bomb(20_000, 1), "is too large: 20000x1"),
    "bomb below the sides' limit": (
        bomb(12_000, 12_000),
        "is too large: 12000x12000; at most 16384 pixels a side and 64 megapixels are read",
    ),
    "less than it claims": (bomb(8_000, 8_000), "is broken"),
    "gif bomb": (
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02L\x01\x00;",
        "too large",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_refused_with_the_reason(name):
    data, reason = HOSTILE[name]
    with pytest.raises(BadRequest) as caught:
        decode_picture(data, "images[0]")
    assert reason in str(caught.value)
    assert "images[0]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_with_odd_bytes_in_it_is_read_or_refused_but_never_anything_else():
    rng = np.random.default_rng(1)
    for original in (PLAIN, JPEG, saved(Image.fromarray(pixels()), "WEBP"), saved(Image.fromarray(pixels()), "GIF")):
        for _ in range(150):
            data = bytearray(original)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(0, 256)
            with suppress(BadRequest):
                assert decode_picture(bytes(data), "x").shape[2] == 3


def test_pillows_warnings_stay_inside_even_among_threads():
    # Bytes of transparency for a palette: Pillow warns of it.
    image = Image.fromarray(pixels()).quantize(16)
    data = saved(image, transparency=bytes(range(16)))
    before = list(warnings.filters)
    failures = []

    def decode():
        try:
            for _ in range(20):
                decode_picture(data, "x")
        except BadRequest as error:
            failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


def test_a_png_carries_how_it_was_made_as_users_of_image_tools_expect():
    encoded = encode_picture(pixels(), "png", NOTE, LARGE)
    image = Image.open(io.BytesIO(encoded.data))
    assert (encoded.format, image.format) == ("png", "PNG")
    assert image.text == {
        "parameters": PARAMETERS,
        "prompt": NOTE.prompt,
        "negative_prompt": "blur",
        "seed": "9007199254740992",
        "steps": "9",
        "guidance": "4.5",
        "size": "64x48",
        "model": "z-image:turbo",
        "Software": "ollama-mlx-runner 1.2.3",
    }
    assert np.array_equal(np.asarray(image), pixels())


@pytest.mark.parametrize("format_", ["jpeg", "webp"])
def test_the_other_formats_carry_the_same_in_a_comment(format_):
    encoded = encode_picture(pixels(), format_, NOTE, LARGE)
    image = Image.open(io.BytesIO(encoded.data))
    assert image.format.lower() == encoded.format == format_
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == PARAMETERS
    assert close(np.asarray(image.convert("RGB")), pixels(), 4)


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_the_same_picture_is_the_same_bytes(format_):
    assert encode_picture(pixels(), format_, NOTE, LARGE) == encode_picture(pixels(), format_, NOTE, LARGE)


@pytest.mark.parametrize("prompt", ["x\0y", "\U0001f413" * 30_000, "a\rb\nc"])
@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_odd_prompts_are_carried_too(prompt, format_):
    data = encode_picture(pixels(), format_, replace(NOTE, prompt=prompt), LARGE).data
    assert close(decode_picture(data, "x"), pixels(), 4)


def test_a_png_too_large_for_its_line_becomes_a_jpeg():
    picture = noise(256, 256)
    size = len(encode_picture(picture, "png", NOTE, LARGE).data)
    encoded = encode_picture(picture, "png", NOTE, size - 1)
    assert encoded.format == "jpeg"
    assert Image.open(io.BytesIO(encoded.data)).format == "JPEG"
    assert encoded == encode_picture(picture, "jpeg", NOTE, size - 1)


def test_a_jpeg_too_large_gives_up_some_quality_and_is_then_refused():
    picture = noise(256, 256)
    best = len(encode_picture(picture, "jpeg", NOTE, LARGE).data)
    assert len(encode_picture(picture, "jpeg", NOTE, best - 1).data) < best
    with pytest.raises(GenerationError, match=r"the picture \(256x256\) is too large .* even as jpeg"):
        encode_picture(picture, "png", NOTE, 10_000)
    with pytest.raises(GenerationError, match="even as webp"):
        encode_picture(picture, "webp", NOTE, 10_000)


def test_a_preview_is_a_small_jpeg():
    image = Image.open(io.BytesIO(encode_preview(pixels())))
    assert (image.format, image.size) == ("JPEG", (64, 48))
