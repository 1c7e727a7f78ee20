"""What the contestants need, made once and kept in the cache folder: their virtual environment, the same weights in
the forms they read, and prompts that are the same tokens to all.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from runner import default_model
from tests.bench.commands import PreparationError, once, python_in, run
from tests.bench.release import Release, prepare_release

PROMPT = Path(__file__).with_name("prompt.txt")
SERVING_TEXTS = 64
"""Prompts of each length for `make bench-serve`."""
WARMUP = "Once upon a time there was a small village between two hills, and in the village there lived"
MLX_LM = "mlx-lm[cpu]==0.32.2" if sys.platform == "linux" else "mlx-lm==0.32.2"
MLX = "mlx==0.32.4"
LLAMA_CPP = "llama-cpp-python==0.3.36"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where everything is."""

    project_python: Path
    bench_python: Path
    gguf: Path
    gguf_float32: Path
    folder: Path
    """float32, as a Hugging Face folder."""
    folder_4bit: Path
    """What `mlx_lm convert` makes of it: 4 bits, scales and everything else bfloat16, as the published model is."""
    folder_4bit_float32: Path
    """The same, scales and everything else float32."""
    prompts: Path
    release: Release
    no_llama_cpp: str | None = None
    """Why llama.cpp could not be installed."""


def prepare(cache: Path, lengths: tuple[int, ...], say: Callable[[str], None]) -> Prepared:
    """Make what is missing. A contestant whose package cannot be installed fails later, by itself, with its reason.

    Raises:
        PreparationError: a step failed without which no contestant can run.
        FetchError: the model cannot be fetched.
    """
    place = cache / "bench"
    place.mkdir(parents=True, exist_ok=True)
    prepared = Prepared(
        project_python=Path(sys.executable),
        bench_python=python_in(place / "venv"),
        gguf=default_model.fetch(cache, lambda _: None),
        gguf_float32=place / "float32.gguf",
        folder=place / "float32",
        folder_4bit=place / "4bit-bfloat16",
        folder_4bit_float32=place / "4bit-float32",
        prompts=place / "prompts.json",
        release=prepare_release(place, say),
    )
    prepared = replace(prepared, no_llama_cpp=_install(prepared, say))
    once(prepared.gguf_float32, say, "writing the float32 GGUF", _export("gguf", prepared))
    once(prepared.folder, say, "writing the float32 folder", _export("folder", prepared))
    for folder, dtype in ((prepared.folder_4bit, "bfloat16"), (prepared.folder_4bit_float32, "float32")):
        once(folder, say, f"quantising the 4-bit folder, the rest {dtype}", _quantization(dtype, prepared))
    run([*exporter("prompts", prepared), str(prepared.prompts), *map(str, lengths)])
    return prepared


def _install(prepared: Prepared, say: Callable[[str], None]) -> str | None:
    """Install what is missing; the reason if llama.cpp is not to be had."""
    venv = prepared.bench_python.parents[1]
    if not prepared.bench_python.exists():
        say(f"making {venv}")
        run([sys.executable, "-m", "venv", str(venv)])
    # The MLX of release 0.1.0, so that what differs is mlx_lm.
    install_once(prepared, [MLX_LM, MLX, "matplotlib"], say)
    # From its sources, so that llama.cpp uses all that this processor can; the wheels of others do not.
    try:
        install_once(prepared, [LLAMA_CPP], say)
    except PreparationError as error:
        say(f"not installed: {error}")
        return str(error)
    return None


def install_once(prepared: Prepared, requirements: list[str], say: Callable[[str], None]) -> None:
    stamp = prepared.bench_python.parents[1] / f".installed-{'-'.join(requirements).replace('/', '')}"
    if stamp.exists():
        return
    say(f"installing {' '.join(requirements)} (once; minutes if it has to be built)")
    pip = [str(prepared.bench_python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *requirements], CMAKE_ARGS="-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF")
    stamp.touch()


def exporter(what: str, prepared: Prepared) -> list[str]:
    # A process of its own: the bench itself stays small while the contestants run.
    return [str(prepared.project_python), "-m", "tests.bench.export", what, str(prepared.gguf)]


def _export(what: str, prepared: Prepared) -> Callable[[Path], None]:
    return lambda target: run([*exporter(what, prepared), str(target)])


def _quantization(dtype: str, prepared: Prepared) -> Callable[[Path], None]:
    words = [str(prepared.bench_python), "-m", "mlx_lm", "convert", "--hf-path", str(prepared.folder), "--quantize"]
    words += ["--q-bits", "4", "--q-group-size", "64", "--dtype", dtype, "--mlx-path"]
    return lambda target: run([*words, str(target)])
