"""Who takes part: one record each, in the order in which a round runs them."""

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.bench.commands import REPOSITORY
from tests.bench.preparation import Prepared

DEFAULT_TOKENS = 64
FLOAT32, GGUF, GGUF_FLOAT32 = "float32 folder", "GGUF", "float32 GGUF"
LLAMA_CPP_MODULE = "run_llama_cpp"
FOUR_BITS, FOUR_BITS_FLOAT32 = "4-bit folder, else bfloat16", "4-bit folder, else float32"
Interpreter = Literal["project", "bench", "release"]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One line of the table."""

    name: str
    label: str
    module: str
    """What its process runs, `python -m tests.bench.MODULE`."""
    weights: str
    interpreter: Interpreter = "bench"
    """Whose it is: this project's, the bench's own, or that of the release, which runs its own `tests.bench`."""
    prompt_tokens: int = 512
    tokens: int = DEFAULT_TOKENS
    exact: bool = False
    """It computes in float32 with the same weights, so its greedy text should be that of `runner-f32`."""
    preloads_blas: bool = False
    widens: bool = False
    """It is told to hold the file's weights in float32 and to compute in it."""


RUNNER, EXACT_RUNNER, RELEASE = "runner", "runner-f32", "release-0.1.0"
CONTESTANTS = (
    Contestant(RUNNER, "runner over HTTP, Q4_1 as it is", "run_runner", GGUF, "project"),
    Contestant(EXACT_RUNNER, "runner over HTTP, f32", "run_runner", GGUF, "project", exact=True, widens=True),
    Contestant("bare", "its model, bare loop, Q4_1", "run_bare", GGUF, "project"),
    Contestant("bare-f32", "its model, bare loop, f32", "run_bare", GGUF, "project", exact=True, widens=True),
    Contestant(RELEASE, "runner 0.1.0 over HTTP, f32", "run_runner", GGUF, "release", exact=True),
    # As installed it is so slow that a shorter prompt has to do; 4-bit, still shorter.
    Contestant("mlx-lm", "mlx_lm as installed, f32", "run_mlx_lm", FLOAT32, prompt_tokens=128, tokens=16, exact=True),
    Contestant("mlx-lm-4bit", "mlx_lm as installed, 4-bit", "run_mlx_lm", FOUR_BITS, prompt_tokens=32, tokens=8),
    Contestant(
        "mlx-lm-4bit-f32",
        "mlx_lm as installed, 4-bit in f32",
        "run_mlx_lm",
        FOUR_BITS_FLOAT32,
        prompt_tokens=128,
        tokens=16,
    ),
    Contestant("mlx-lm-blas", "mlx_lm + MKL, f32", "run_mlx_lm", FLOAT32, exact=True, preloads_blas=True),
    Contestant("llama-cpp-f32", "llama.cpp, F32", LLAMA_CPP_MODULE, GGUF_FLOAT32, exact=True),
    Contestant("llama-cpp", "llama.cpp, Q4_1 as it is", LLAMA_CPP_MODULE, GGUF),
)
PROMPT_LENGTHS = tuple(sorted({contestant.prompt_tokens for contestant in CONTESTANTS}))


def chosen(names: list[str] | None, tokens: int) -> list[Contestant]:
    """Those named, or all, to decode `tokens` where they are not too slow for it.

    Raises:
        ValueError: there is none of a name.
    """
    unknown = set(names or ()) - {contestant.name for contestant in CONTESTANTS}
    if unknown:
        known = ", ".join(contestant.name for contestant in CONTESTANTS)
        raise ValueError(f"no contestant {', '.join(sorted(unknown))}; there are {known}")
    taken = [contestant for contestant in CONTESTANTS if not names or contestant.name in names]
    # A longer run is for those that have the default; the slow ones keep their own, shorter one.
    return [
        replace(contestant, tokens=tokens if contestant.tokens == DEFAULT_TOKENS else min(contestant.tokens, tokens))
        for contestant in taken
    ]


def fast_blas() -> Path | None:
    """The library that this project puts under MLX for pictures on this machine."""
    from models.image.blas import BLAS_LIBRARIES

    for distribution, stem, _ in BLAS_LIBRARIES:
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name.startswith(stem):
                return Path(str(file.locate())).resolve()
    return None


def folder(contestant: Contestant, prepared: Prepared) -> Path:
    """Where its process is started."""
    return prepared.release.folder if contestant.interpreter == "release" else REPOSITORY


def command(contestant: Contestant, prepared: Prepared, threads: int, started: float) -> list[str]:
    """The command line of its process.

    Raises:
        LookupError: what it needs is not there; the message says why.
    """
    if contestant.module == LLAMA_CPP_MODULE and prepared.no_llama_cpp is not None:
        raise LookupError(prepared.no_llama_cpp)
    if contestant.interpreter == "release" and prepared.release.missing is not None:
        raise LookupError(prepared.release.missing)
    weights = {
        FLOAT32: prepared.folder,
        FOUR_BITS: prepared.folder_4bit,
        FOUR_BITS_FLOAT32: prepared.folder_4bit_float32,
        GGUF: prepared.gguf,
        GGUF_FLOAT32: prepared.gguf_float32,
    }[contestant.weights]
    pythons = {
        "project": prepared.project_python,
        "bench": prepared.bench_python,
        "release": prepared.release.python,
    }
    words = [str(pythons[contestant.interpreter]), "-m", f"tests.bench.{contestant.module}", f"--model={weights}"]
    words += [f"--prompts={prepared.prompts}", f"--prompt-tokens={contestant.prompt_tokens}"]
    words += [f"--tokens={contestant.tokens}", f"--threads={threads}", f"--started={started}"]
    if contestant.widens:
        words.append("--float32")
    if contestant.preloads_blas:
        blas = fast_blas()
        if blas is None:
            raise LookupError("there is no BLAS of a package here to load before MLX")
        words.append(f"--blas={blas}")
    return words
