"""What the flags of `try --image` say of the picture. What they leave open is the pipeline's choice."""

from dataclasses import dataclass
from pathlib import Path

from runner.flags import Settings, UsageError

# As in runner.engine.types, which imports MLX; this module is imported before that is allowed.
FORMATS = ("png", "jpeg", "webp")
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""What a file's name says of its format."""
MAX_SIDE = 4096
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class PictureFlags:
    """The picture to be made; None and empty: as the pipeline has it."""

    output: Path
    format: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    strength: float | None = None
    input_images: tuple[Path, ...] = ()
    count: int | None = None
    step_cache: float | None = None


def picture_flags(settings: Settings) -> PictureFlags:
    """Read them.

    Raises:
        UsageError: a value is impossible.
    """
    output = Path(settings.text("o") or "image.png")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}")
    return PictureFlags(
        output=output,
        format=settings.choice("format", FORMATS) or SUFFIXES.get(output.suffix.lower(), FORMATS[0]),
        width=settings.integer("width", least=1, most=MAX_SIDE),
        height=settings.integer("height", least=1, most=MAX_SIDE),
        steps=settings.integer("steps", least=1),
        # 0 is random on the wire.
        seed=settings.integer("seed", least=1, most=MAX_SEED),
        guidance=settings.number("guidance", least=0),
        negative_prompt=settings.text("negative-prompt") or "",
        strength=settings.number("strength", least=0),
        input_images=tuple(Path(text) for text in settings.texts("input-image")),
        count=settings.integer("n", least=1),
        step_cache=settings.number("step-cache", least=0),
    )
