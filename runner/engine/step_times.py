"""How long a picture will take, by what earlier ones took: a parent gives a request ten minutes in all."""

from typing import Final

from models.image.base import PictureRequest

PATIENCE_S: Final = 600.0
"""What Ollama's parent gives a request, its time in the queue included. Source: x/imagegen/server.go, v0.32.5."""
MEMORY: Final = 0.5
"""The weight of what was learnt before, against the newest step."""


class StepTimes:
    """Seconds for each pixel, of a denoising step and of all that comes before and after the steps."""

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._rest_s: float | None = None

    def observe_step(self, picture: PictureRequest, seconds: float) -> None:
        """A denoising step took that long."""
        self._step_s = _learnt(self._step_s, seconds / _pixels(picture))

    def observe_rest(self, picture: PictureRequest, seconds: float) -> None:
        """Reading the prompt and decoding took that long together."""
        self._rest_s = _learnt(self._rest_s, seconds / _pixels(picture))

    def predict_s(self, picture: PictureRequest, steps: int) -> float | None:
        """What so many steps and the rest will take; None before the first step of all."""
        if self._step_s is None:
            return None
        return (steps * self._step_s + (self._rest_s or 0.0)) * _pixels(picture)


def _learnt(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1 - MEMORY) * now


def _pixels(picture: PictureRequest) -> int:
    return picture.width * picture.height
