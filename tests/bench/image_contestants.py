"""Who takes part in `make bench-image`, and what each of them needs: environments and the pipeline's folder."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.bench.commands import PreparationError, once, run
from tests.bench.contestants import fast_blas

STEPS = 4
"""Timed steps of a run; the median of them is its figure."""
DIFFUSERS = ("torch==2.15.0", "diffusers==0.42.1", "transformers==5.24.0", "accelerate", "matplotlib")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MFLUX = "mflux==0.24.0"
MFLUX_NEEDS = ("transformers==5.24.0", "pillow", "piexif", "toml", "platformdirs", "tqdm", "requests")
"""What the part that is used imports. mflux's own list wants CUDA's MLX on Linux, and torch."""
Environment = Literal["project", "diffusers", "mflux"]


@dataclass(frozen=True, slots=True)
class ImageContestant:
    """One line of the table."""

    name: str
    label: str
    module: str
    """What its process runs, `python -m tests.bench.MODULE`."""
    environment: Environment = "project"
    autoencoder: bool = True
    encoder: bool = False
    brief: bool = False
    """It is so slow that one forward pass, not warmed up, has to do."""
    threads: int | None = None
    """Instead of everyone's."""
    rounds: int | None = None
    """Only in so many of the rounds."""
    preloads_blas: bool = False


RUNNER, BARE, TORCH, MFLUX_BLAS, MFLUX_PLAIN = "runner", "bare", "diffusers", "mflux-blas", "mflux"
BARE_SINGLE, TORCH_SINGLE = "bare-1", "diffusers-1"
_OURS, _THEIRS, _MFLUX = "run_image_bare", "run_image_diffusers", "run_image_mflux"
IMAGE_CONTESTANTS = (
    ImageContestant(RUNNER, "runner over HTTP", "run_image_runner"),
    ImageContestant(BARE, "its pipeline, bare loop", _OURS, encoder=True),
    ImageContestant(TORCH, "diffusers on torch", _THEIRS, "diffusers", encoder=True),
    ImageContestant(MFLUX_BLAS, "mflux + same BLAS", _MFLUX, "mflux", preloads_blas=True),
    ImageContestant(MFLUX_PLAIN, "mflux as installed", _MFLUX, "mflux", autoencoder=False, brief=True, rounds=1),
    ImageContestant(BARE_SINGLE, "bare loop, 1 thread", _OURS, autoencoder=False, threads=1, rounds=1),
    ImageContestant(TORCH_SINGLE, "diffusers, 1 thread", _THEIRS, "diffusers", autoencoder=False, threads=1, rounds=1),
)


@dataclass(frozen=True, slots=True)
class ImagePrepared:
    """Where everything is."""

    pythons: Mapping[Environment, Path]
    pipeline: Path
    missing: Mapping[Environment, str]
    """Environments that could not be made, and why."""


def chosen_images(names: list[str] | None) -> list[ImageContestant]:
    """Those named, or all.

    Raises:
        ValueError: there is none of a name.
    """
    known = [contestant.name for contestant in IMAGE_CONTESTANTS]
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"no contestant {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [contestant for contestant in IMAGE_CONTESTANTS if not names or contestant.name in names]


def prepare_images(cache: Path, environ: Mapping[str, str], say: Callable[[str], None]) -> ImagePrepared:
    """Make what is missing. A contestant whose package cannot be installed fails later, by itself, with its reason.

    `BENCH_DIFFUSERS_PYTHON` and `BENCH_MFLUX_PYTHON` name interpreters to take instead of making environments.

    Raises:
        PreparationError: the pipeline could not be written: diffusers writes it.
    """
    place = cache / "bench"
    place.mkdir(parents=True, exist_ok=True)
    pythons: dict[Environment, Path] = {"project": Path(sys.executable)}
    missing: dict[Environment, str] = {}
    makers: tuple[tuple[Environment, Callable[[Path, Callable[[str], None]], None]], ...]
    makers = (("diffusers", _install_diffusers), ("mflux", _install_mflux))
    for name, install in makers:
        if given := environ.get(f"BENCH_{name.upper()}_PYTHON"):
            pythons[name] = Path(given).absolute()
            continue
        pythons[name] = place / f"venv-{name}" / ("Scripts" if os.name == "nt" else "bin") / "python"
        try:
            install(pythons[name], say)
        except PreparationError as error:
            missing[name] = str(error)
            say(f"not installed: {error}")
    pipeline = place / "z-image-218m"
    if not pipeline.exists() and "diffusers" in missing:
        raise PreparationError(f"the pipeline is written by diffusers: {missing['diffusers']}")
    once(pipeline, say, "writing the image pipeline (1.2 GB)", lambda target: _write_pipeline(target, pythons))
    return ImagePrepared(pythons, pipeline, missing)


def _write_pipeline(target: Path, pythons: Mapping[Environment, Path]) -> None:
    module, latents = ("-m", "tests.bench.image_checkpoint"), target.with_suffix(".npy")
    run([str(pythons["project"]), *module, "latents", str(latents)])
    try:
        run([str(pythons["diffusers"]), *module, "pipeline", str(target), str(latents)])
    finally:
        latents.unlink(missing_ok=True)


def _install_diffusers(python: Path, say: Callable[[str], None]) -> None:
    if not _new_environment(python, say, "torch and diffusers"):
        return
    try:
        # The wheel without CUDA is a tenth of the size and computes the same.
        _pip(python, DIFFUSERS[0], "--index-url", TORCH_CPU_INDEX)
    except PreparationError:
        _pip(python, DIFFUSERS[0])
    _pip(python, *DIFFUSERS[1:])
    _finished(python)


def _install_mflux(python: Path, say: Callable[[str], None]) -> None:
    if not _new_environment(python, say, MFLUX):
        return
    # The same MLX as the project's, so that what differs is mflux.
    extra = "[cpu]" if sys.platform == "linux" else ""
    _pip(python, f"mlx{extra}=={importlib.metadata.version('mlx')}", *MFLUX_NEEDS)
    _pip(python, "--no-deps", MFLUX)
    _finished(python)


def _new_environment(python: Path, say: Callable[[str], None], what: str) -> bool:
    """Whether it is to be filled; it exists afterwards."""
    venv = python.parents[1]
    if (venv / ".installed").exists():
        return False
    say(f"installing {what} into {venv} (once)")
    run([sys.executable, "-m", "venv", "--clear", str(venv)])
    return True


def _finished(python: Path) -> None:
    (python.parents[1] / ".installed").touch()


def _pip(python: Path, *words: str) -> None:
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words])


def image_command(contestant: ImageContestant, prepared: ImagePrepared, job: Mapping[str, object]) -> list[str]:
    """The command line of its process; `job` are the fields of `ImageJob` that are the same for all.

    Raises:
        LookupError: what it needs is not there; the message says why.
    """
    if contestant.environment in prepared.missing:
        raise LookupError(prepared.missing[contestant.environment])
    words = [str(prepared.pythons[contestant.environment]), "-m", f"tests.bench.{contestant.module}"]
    words += [f"--pipeline={prepared.pipeline}", *(f"--{name}={value}" for name, value in job.items())]
    switches = {"autoencoder": contestant.autoencoder, "encoder": contestant.encoder, "brief": contestant.brief}
    words += [f"--{name}" for name, is_on in switches.items() if is_on]
    if contestant.preloads_blas:
        blas = fast_blas()
        if blas is None:
            raise LookupError("the runner itself uses no BLAS of a package here")
        words.append(f"--blas={blas}")
    return words
