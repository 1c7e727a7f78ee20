"""Where a step, a decode, an encode spend their time on a CPU: `python -m tests.bench.profile_image --pipeline FOLDER`.

Python's own profiler runs in every thread of a `Crew`; what compiled code does is charged to the function of this
project that called it, and functions to the kinds of work in `KINDS`. Whatever is not named there is told by name.
"""

import argparse
import cProfile
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from models.device import usable_cores
from models.image import blas
from tests.bench.commands import REPOSITORY
from tests.bench.image_sections import profile_lines

if TYPE_CHECKING:
    from models.image.z_image.pipeline import ZImagePipeline

ATTENTION, NORMS, WAITING = "attention", "norms and residuals", "waiting for the other thread"
PRODUCTS, TRANSFORMS = "matrix products", "Winograd transforms"
KINDS: Mapping[str, str] = {
    # A function, or a function as called by another.
    "Gemm.multiply": PRODUCTS,
    "Gemm.multiply_stacks": PRODUCTS,
    "Gemm.multiply < attend.work": ATTENTION,
    "Gemm.multiply < _Pass.attend.attend_rows": ATTENTION,
    "Gemm.multiply < _Pass.attend.project_rows": ATTENTION,
    "Gemm.multiply < Convolver.__call__.convolve": TRANSFORMS,
    "Gemm.multiply < Convolver.planes.transform": TRANSFORMS,
    "Gemm.multiply < Tally.add.measure": NORMS,
    "attend.work": ATTENTION,
    "_Pass.attend.attend_rows": ATTENTION,
    "_Pass.attend.project_rows": ATTENTION,
    "rms_norm": NORMS,
    "layer_norm": NORMS,
    "head_norm": NORMS,
    "Tally.add": NORMS,
    "Tally.add.measure": NORMS,
    "_Pass.block.add": NORMS,
    "_Pass.block.add_attended": NORMS,
    "turn": "rotations",
    "swiglu": "SwiGLU",
    "_Workspace.read": "norm, SiLU and cutting into tiles",
    "Convolver.__call__.convolve": TRANSFORMS,
    "Convolver.planes.transform": TRANSFORMS,
    "_Workspace.write": "bias, residual and putting together",
    "store": "bias, residual and putting together",
    "Crew.share": WAITING,
    "Crew.__exit__": WAITING,
}
REPEATS = 3
TINY_S = 1e-9
"""So that what took no time has callers as well."""
Function: TypeAlias = tuple[str, str]
"""File and qualified name, without `<locals>`; compiled code has no file."""


@dataclass
class Spent:
    """Seconds in a function itself, in all and by who called it."""

    seconds: float = 0.0
    callers: dict[Function, float] = field(default_factory=dict)


@contextmanager
def profiled() -> Iterator[list[cProfile.Profile]]:
    """A profile of this thread and, behind it, of each other worker of a `Crew`, complete when the block is left."""
    from models.image.gemm import Crew

    own, others, original = cProfile.Profile(), dict[int, cProfile.Profile](), Crew.share
    profiles = [own]

    def share(crew: Crew, work: Callable[[int, Any], None], items: Any) -> None:
        def watched(worker: int, item: Any) -> None:
            if worker == 0:
                work(worker, item)
                return
            profile = others.setdefault(worker, cProfile.Profile())
            profile.enable()
            try:
                work(worker, item)
            finally:
                profile.disable()

        original(crew, watched, items)

    Crew.share = share
    own.enable()
    try:
        yield profiles
    finally:
        own.disable()
        Crew.share = original
        profiles += others.values()


def spent(profiles: Sequence[cProfile.Profile]) -> dict[Function, Spent]:
    """What all profiles say together."""
    found: dict[Function, Spent] = defaultdict(Spent)

    def named(code: CodeType | str) -> Function:
        if isinstance(code, str):
            return "", code
        return code.co_filename, code.co_qualname.replace("<locals>.", "")

    for profile in profiles:
        for entry in profile.getstats():
            function = named(entry.code)
            found[function].seconds += entry.inlinetime
            for called in entry.calls or ():
                callers = found[named(called.code)].callers
                callers[function] = callers.get(function, 0.0) + max(called.inlinetime, TINY_S)
    return dict(found)


def is_ours(function: Function) -> bool:
    return function[0].startswith(str(REPOSITORY)) and "site-packages" not in function[0]


def owners(
    found: Mapping[Function, Spent], function: Function, seconds: float, seen: frozenset[Function]
) -> Iterator[tuple[Function, float]]:
    """Seconds spent in a function, given to the project's functions that called it; its own keep theirs."""
    callers = {caller: weight for caller, weight in found[function].callers.items() if caller not in seen}
    if is_ours(function) or not callers:
        yield function, seconds
        return
    for caller, weight in callers.items():
        yield from owners(found, caller, seconds * weight / sum(callers.values()), seen | {function})


def by_kind(found: Mapping[Function, Spent]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by kind of work, and by function of the project for what is of no kind."""
    kinds: dict[str, float] = defaultdict(float)
    unnamed: dict[str, float] = defaultdict(float)
    for function, each in found.items():
        for owner, seconds in owners(found, function, each.seconds, frozenset({function})):
            name, callers = owner[1], found[owner].callers or {("", ""): 1.0}
            for (_, caller), weight in callers.items():
                kind = KINDS.get(f"{name} < {caller}", KINDS.get(name))
                (unnamed if kind is None else kinds)[kind or name] += seconds * weight / sum(callers.values())
    return dict(kinds), dict(unnamed)


def profile(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds as it is, and by kind in all threads together; of some runs the fastest."""
    whole, best, shortest = list[float](), dict[Function, Spent](), float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        whole.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with profiled() as profiles:
            work()
        taken = time.perf_counter() - begin
        if taken < shortest:
            best, shortest = spent(profiles), taken
    kinds, unnamed = by_kind(best)
    most = dict(sorted(unnamed.items(), key=lambda item: -item[1])[:6])
    return {
        "whole_s": min(whole),
        "profiled_s": shortest,
        "kinds_s": kinds,
        "unnamed_s": sum(unnamed.values()),
        "most_unnamed_s": most,
    }


def load(folder: Path, threads: int) -> "ZImagePipeline":
    blas.prepare(threads=threads)
    from models.checkpoint import open_checkpoint
    from models.image import load_image_pipeline
    from models.image.base import LoadChoices
    from models.image.z_image.pipeline import ZImagePipeline
    from models.mlx_memory import configure

    configure()
    pipeline = load_image_pipeline(open_checkpoint(str(folder), Path()), LoadChoices(policy="float32"))
    assert isinstance(pipeline, ZImagePipeline)
    return pipeline


def run(folder: Path, threads: int, parts: list[str]) -> dict[str, dict[str, Any]]:
    pipeline = load(folder, threads)
    import mlx.core as mx

    from models.image.z_image.transformer import Side

    with np.load(folder / "inputs.npz") as inputs:
        latents, caption = mx.array(inputs["latents"])[0].transpose(1, 2, 0), mx.array(inputs["caption"])
    transformer, autoencoder = pipeline._transformer, pipeline._autoencoder
    height, width = latents.shape[:2]
    known = transformer.condition(caption, height, width)
    works: dict[str, Callable[[], object]] = {
        "step": lambda: mx.eval(transformer(latents, 0.5, [Side(known)])),
        "decode": lambda: mx.eval(autoencoder.decode(latents[None])),
        "encode": lambda: mx.eval(autoencoder.encode(mx.zeros((1, 8 * height, 8 * width, 3)))),
    }
    for part in parts:
        works[part]()
    return {part: profile(works[part]) for part in parts}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--parts", nargs="+", choices=("step", "decode", "encode"), default=["step", "decode"])
    parser.add_argument("--show", action="store_true", help="for people, instead of JSON")
    asked = parser.parse_args()
    report = run(asked.pipeline, asked.threads, asked.parts)
    print("\n".join(profile_lines(report)) if asked.show else json.dumps(report))
