"""What every contestant of `make bench-image` is asked and what it answers, and the one definition of each figure.

Runs in the interpreters of all contestants: the standard library and numpy only.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tests.bench.measurement import peak_rss_bytes

Floats: TypeAlias = npt.NDArray[np.float32]
VELOCITY_SIGMA = 0.5
WARMUP_LATENT_SIDE = 8


@dataclass(frozen=True, slots=True)
class ImageJob:
    """What a contestant is to do."""

    pipeline: Path
    prompt: str
    seed: int
    side: int
    """Pixels."""
    latents: Floats
    """(1, C, h, w): the noise that the runner draws for the seed."""
    caption: Floats
    """(L, D): the prompt's embedding as diffusers computes it."""
    steps: int
    """Timed ones; one more is run before them."""
    autoencoder: bool
    """Whether it decodes as well."""
    encoder: bool
    brief: bool
    """One forward pass is all it does, and the first: it is that slow."""
    threads: int
    started: float
    """`time.monotonic` when the contestant's process was started."""
    save: Path
    """Where `Outputs` go."""
    blas: Path | None
    """A library to load before MLX."""


@dataclass(frozen=True, slots=True)
class ImageMeasurement:
    """One run of one contestant. Durations in seconds, of `perf_counter` on the consuming side."""

    load_s: float
    """From the start of the process until the first step can be asked for."""
    step_s: list[float]
    versions: dict[str, str]
    decode_s: float | None = None
    """From latents to the picture."""
    encode_s: float | None = None
    """From a picture to latents."""
    peak_rss_bytes: int | None = None
    """The most memory until there was a picture: what a text-to-image run takes."""

    @classmethod
    def from_json(cls, line: str) -> "ImageMeasurement":
        """Read what `answer` wrote."""
        return cls(**json.loads(line))


class Painter(Protocol):
    """A contestant's pipeline, loaded."""

    def denoise(self, latents: Floats, steps: int) -> Iterator[None]:
        """Begin anew with these latents; each `next` runs one step to its end and keeps the latents."""
        ...

    def decode(self) -> Floats:
        """The picture of the latents kept, (H, W, 3) in 0 to 1."""
        ...

    def encode(self, picture: Floats) -> Floats:
        """(1, c, h, w): the latents of a picture, scaled as the transformer has them."""
        ...

    def velocity(self, latents: Floats, sigma: float) -> Floats:
        """(c, h, w): what one forward pass of the transformer says there, with the pipeline's sign."""
        ...


def read_job() -> ImageJob:
    """The job that the command line describes."""
    parser = argparse.ArgumentParser()
    for name in ("--pipeline", "--save", "--blas"):
        parser.add_argument(name, type=Path, required=name != "--blas")
    parser.add_argument("--prompt", required=True)
    for name in ("--seed", "--side", "--steps", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--started", type=float, required=True)
    for name in ("--autoencoder", "--encoder", "--brief"):
        parser.add_argument(name, action="store_true")
    asked = parser.parse_args()
    with np.load(asked.pipeline / "inputs.npz") as inputs:
        latents, caption = inputs["latents"], inputs["caption"]
    return ImageJob(latents=latents, caption=caption, **vars(asked))


def timed_steps(steps: Iterator[None]) -> list[float]:
    """How long each took, without the first: it meets fresh memory."""
    moments = [time.perf_counter()]
    moments.extend(time.perf_counter() for _ in steps)
    taken = [later - earlier for earlier, later in pairwise(moments)]
    return taken[1:]


def measure(job: ImageJob, load_s: float, painter: Painter, versions: dict[str, str]) -> ImageMeasurement:
    """Warm up on a small picture, time steps, decoding and encoding, then save what is to be compared."""
    outputs: dict[str, Floats] = {}
    if job.brief:
        with timer() as step_s:
            outputs["velocity"] = painter.velocity(job.latents, VELOCITY_SIGMA)
        np.savez(job.save, **outputs)
        return ImageMeasurement(load_s, step_s, versions)
    for _ in painter.denoise(small(job.latents), 1):
        pass
    if job.autoencoder:
        painter.decode()
    step_s = timed_steps(painter.denoise(job.latents, job.steps + 1))
    run = ImageMeasurement(load_s, step_s, versions)
    if job.autoencoder:
        with timer() as decode_s:
            outputs["picture"] = painter.decode()
        run = replace(run, decode_s=decode_s[0], peak_rss_bytes=peak_rss_bytes())
    if job.encoder:
        painter.encode(any_picture(8 * WARMUP_LATENT_SIDE))
        with timer() as encode_s:
            outputs["encoded"] = painter.encode(any_picture(job.side))
        run = replace(run, encode_s=encode_s[0])
    outputs["velocity"] = painter.velocity(job.latents, VELOCITY_SIGMA)
    np.savez(job.save, **outputs)
    return run


@contextmanager
def timer() -> Iterator[list[float]]:
    """A list that holds the seconds once the block is left."""
    taken: list[float] = []
    begin = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - begin)


def small(latents: Floats) -> Floats:
    return np.ascontiguousarray(latents[..., :WARMUP_LATENT_SIDE, :WARMUP_LATENT_SIDE])


def any_picture(side: int) -> Floats:
    """The picture that everyone encodes."""
    return np.random.default_rng(0).random((side, side, 3), dtype=np.float32)


def flow_sigmas(steps: int, shift: float = 3.0) -> list[float]:
    """Z-Image's: even steps from 1 to 1/n, shifted, and the end."""
    even = np.linspace(1.0, 1.0 / steps, steps)
    return [*(shift * even / (1 + (shift - 1) * even)).tolist(), 0.0]


def answer(measurement: ImageMeasurement) -> None:
    """Write the one line that the bench reads."""
    print(json.dumps(asdict(measurement)), flush=True)
