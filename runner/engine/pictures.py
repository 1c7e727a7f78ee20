"""Picture files: what users send in is decoded here, what goes out is encoded here.

A file that comes from outside may be anything: its header is judged before a pixel is decoded, and whatever is wrong
with it is a BadRequest that says so. What goes out is a function of the pixels and the note alone, byte for byte.
Thread: any but the event loop's, which it would hold up.
"""

import io
import logging
import struct
import threading
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from models.image.base import Pixels
from runner.engine.types import ImageFormat
from runner.errors import BadRequest, GenerationError

logger = logging.getLogger("runner.engine")

READABLE: Final = ("PNG", "JPEG", "WEBP", "GIF")
MAX_INPUT_SIDE: Final = 16_384
MAX_INPUT_PIXELS: Final = 64_000_000
"""A photo of 50 MP is decoded, for some hundred megabytes; a bomb is not."""
_LIMITS: Final = f"at most {MAX_INPUT_SIDE} pixels a side and {MAX_INPUT_PIXELS / 1e6:.0f} megapixels are read"
KEPT_SIDE: Final = 4096
"""What is larger is shrunk to it unless somebody asks for it: no pipeline looks at more."""
WHITE: Final = (255, 255, 255, 255)
QUALITIES: Final = (95, 85, 75)
"""Of JPEG and WebP; the lower ones only where the line would be too long."""
PREVIEW_QUALITY: Final = 80
UNICODE: Final = b"UNICODE\0"
"""How EXIF marks a comment as UTF-16. Source: Exif 2.3, UserComment."""
MAX_COMMENT: Final = 15_000
"""Characters of such a comment: the segment that holds it ends at 64 KiB."""

_PILLOW: Final = threading.Lock()
"""Pillow tells its doubts through the process's list of warning filters, which has no threads of its own."""

# What Pillow's decoders were seen to raise at files that are broken in one way or another.
_BROKEN: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture file."""

    data: bytes
    format: ImageFormat
    """Not always the one asked for."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a picture file tells of how it was made."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    width: int
    height: int
    model: str
    software: str
    strength: float | None = None
    """None where there was no input picture to be noised."""
    step_cache: float = 0.0

    def parameters(self) -> str:
        """All in one, in the form that AUTOMATIC1111's web interface introduced and others read."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        strength = "" if self.strength is None else f"Denoising strength: {self.strength:g}, "
        lines.append(
            f"Steps: {self.steps}, Sampler: Euler, CFG scale: {self.guidance:g}, Seed: {self.seed}, "
            f"Size: {self.width}x{self.height}, {strength}Model: {self.model}, Version: {self.software}"
        )
        return "\n".join(lines)

    def entries(self) -> dict[str, str]:
        """One by one, empty ones left out."""
        entries = {
            "parameters": self.parameters(),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": str(self.seed),
            "steps": str(self.steps),
            "guidance": f"{self.guidance:g}",
            "size": f"{self.width}x{self.height}",
            "strength": "" if self.strength is None else f"{self.strength:g}",
            "step_cache": f"{self.step_cache:g}" if self.step_cache else "",
            "model": self.model,
            "Software": self.software,
        }
        return {key: value for key, value in entries.items() if value}


def decode_picture(data: bytes, name: str, *, kept_side: int = KEPT_SIDE) -> Pixels:
    """The pixels of a PNG, JPEG, WebP or GIF file: upright, on white, the first frame of several.

    Args:
        data: the file.
        name: what to call it when something is wrong.
        kept_side: what is larger is shrunk to it.

    Raises:
        BadRequest: it is no such file, or broken, or too large.
    """
    if not data:
        raise BadRequest(f"{name} is empty")
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=READABLE) as image:
                _check_header(image, name)
                return _pixels(image, name, kept_side)
        except Image.DecompressionBombError:
            raise BadRequest(f"{name} is too large; {_LIMITS}") from None
        except UnidentifiedImageError:
            raise BadRequest(f"{name} is not a picture in PNG, JPEG, WebP or GIF format") from None
        except _BROKEN as error:
            raise BadRequest(f"{name} is broken: {str(error) or type(error).__name__}") from None


def _check_header(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise BadRequest(f"{name} has no pixels ({width}x{height})")
    if max(width, height) > MAX_INPUT_SIDE or width * height > MAX_INPUT_PIXELS:
        raise BadRequest(f"{name} is too large: {width}x{height}; {_LIMITS}")


def _pixels(image: Image.Image, name: str, kept_side: int) -> Pixels:
    size = image.size
    if max(size) > kept_side:
        # A JPEG is then decoded at a half, a quarter or an eighth, never below what is kept.
        image.draft("RGB", (kept_side, kept_side))
    flat = _flattened(image)
    if max(flat.size) > kept_side:
        flat.thumbnail((kept_side, kept_side), Image.Resampling.LANCZOS)
    if max(size) > kept_side:
        logger.info(
            "input picture shrunk",
            extra={"fields": {"name": name, "from": f"{size[0]}x{size[1]}", "to": f"{flat.width}x{flat.height}"}},
        )
    return np.asarray(flat)


def _flattened(image: Image.Image) -> Image.Image:
    """RGB, upright, with white behind what is transparent."""
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # 16 bits of grey, which Pillow's own conversion would cut off at 255.
        grey = np.asarray(upright).astype(np.int64)
        upright = Image.fromarray(((grey * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    colours = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, WHITE), colours).convert("RGB")


def blank_picture(side: int) -> Pixels:
    """A square without anything in it, to try on what a picture of its size takes."""
    return np.full((side, side, 3), 127, np.uint8)


def encode_picture(pixels: Pixels, wanted: ImageFormat, note: Note, max_bytes: int) -> EncodedPicture:
    """A picture as a file of at most `max_bytes`: as it is wanted, or as JPEG where that would be too large.

    Raises:
        GenerationError: it is too large as a JPEG as well.
    """
    lossy: ImageFormat = "jpeg" if wanted == "png" else wanted
    tries = [(wanted, QUALITIES[0])] if wanted == "png" else []
    for format_, quality in [*tries, *((lossy, quality) for quality in QUALITIES)]:
        data = _file(pixels, format_, quality, note)
        if len(data) <= max_bytes:
            return EncodedPicture(data, format_)
        logger.warning(
            "picture too large for its line",
            extra={"fields": {"format": format_, "quality": quality, "bytes": len(data), "limit": max_bytes}},
        )
    height, width = pixels.shape[:2]
    raise GenerationError(
        f"the picture ({width}x{height}) is too large for an answer line of this protocol even as {lossy}; "
        "ask for a smaller one"
    )


def encode_preview(pixels: Pixels) -> bytes:
    """A small picture, as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=PREVIEW_QUALITY)
    return file.getvalue()


def _file(pixels: Pixels, format_: ImageFormat, quality: int, note: Note) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    match format_:
        case "png":
            info = PngImagePlugin.PngInfo()
            for key, value in note.entries().items():
                # Latin-1 where that will do, else iTXt; no zero byte may stand in either.
                info.add_text(key, value.replace("\0", "\ufffd"))
            image.save(file, "PNG", pnginfo=info)
        case "jpeg":
            image.save(file, "JPEG", quality=quality, subsampling=0, exif=_exif(note))
        case "webp":
            image.save(file, "WEBP", quality=quality, exif=_exif(note))
    return file.getvalue()


def _exif(note: Note) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = note.software
    comment = note.parameters()[:MAX_COMMENT]
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = UNICODE + comment.encode("utf-16-be", "replace")
    return exif
