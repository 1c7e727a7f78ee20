"""How far rounding moves the next token: our int8 activations and llama.cpp's Q4_1, each beside its own float32."""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from models.checkpoint import open_checkpoint
from models.device import usable_cores
from models.tokenizer import load_tokenizer
from runner.folders import cache_folder
from tests.bench.commands import REPOSITORY
from tests.bench.contestants import PROMPT_LENGTHS
from tests.bench.figures import LLAMA, LLAMA_F32, OURS, OURS_F32, ROWS_CONTESTANTS, Goal, run_rows, say, show
from tests.bench.preparation import PROMPT, prepare

WINDOW_TOKENS = 512
TEXTS = (PROMPT, *(REPOSITORY / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "LICENSE")))
MOST_TIMES_LLAMA = 1.2
Floats = npt.NDArray[np.float64]


def log_probabilities(logits: npt.NDArray[np.float32]) -> Floats:
    """Shapes: (T, V); returns the same."""
    heights = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return heights - np.log(np.exp(heights).sum(axis=-1, keepdims=True))


def divergences(exact: npt.NDArray[np.float32], rounded: npt.NDArray[np.float32]) -> Floats:
    """The Kullback-Leibler divergence at each place, in nats. Shapes: (T, V) both; returns (T,)."""
    ours, theirs = log_probabilities(exact), log_probabilities(rounded)
    return (np.exp(ours) * (ours - theirs)).sum(axis=-1)


def windows(model: Path, count: int) -> list[list[int]]:
    """Texts of WINDOW_TOKENS tokens from the project's own files."""
    tokenizer = load_tokenizer(open_checkpoint(str(model), Path()))
    made = []
    for file in TEXTS:
        ids = tokenizer.encode(file.read_text(), add_bos=tokenizer.adds_bos)
        made += [ids[end - WINDOW_TOKENS : end] for end in range(WINDOW_TOKENS, len(ids) + 1, WINDOW_TOKENS)]
    return made[:count]


def compare(exact: Path, rounded: Path) -> tuple[float, float]:
    """The mean divergence of all places, and the share of those with the same most probable token."""
    found, same = [], []
    for one, other in zip(np.load(exact, mmap_mode="r"), np.load(rounded, mmap_mode="r"), strict=True):
        found.append(divergences(one, other))
        same.append(one.argmax(axis=-1) == other.argmax(axis=-1))
    return float(np.concatenate(found).mean()), float(np.concatenate(same).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quality", description=__doc__)
    parser.add_argument("--windows", type=int, default=4, help=f"texts of {WINDOW_TOKENS} tokens (default 4)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    asked = parser.parse_args()
    prepared = prepare(cache_folder(os.environ), PROMPT_LENGTHS, say)
    figures: dict[str, tuple[float, float]] = {}
    with TemporaryDirectory(dir=prepared.prompts.parent) as temporary:
        place = Path(temporary)
        texts = place / "texts.json"
        ids = windows(prepared.gguf, asked.windows)
        texts.write_text(json.dumps(ids))
        for rounded, exact in ((OURS, OURS_F32), (LLAMA, LLAMA_F32)):
            try:
                for name in (rounded, exact):
                    contestant = next(each for each in ROWS_CONTESTANTS if each.name == name)
                    job = ["logits", f"--texts={texts}", f"--out={place / name}.npy"]
                    run_rows(contestant, prepared, asked.threads, job)
                    say(f"logits of {contestant.label}")
            except LookupError as error:
                say(f"{rounded} failed: {error}")
                continue
            figures[rounded] = compare(place / f"{exact}.npy", place / f"{rounded}.npy")
    labels = {OURS: "executor, int8 activations", LLAMA: "llama.cpp, Q4_1"}
    cells = [[labels[name], f"{mean:.5f}", f"{100 * share:.2f} %"] for name, (mean, share) in figures.items()]
    ratio = [figures[OURS][0] / figures[LLAMA][0]] if len(figures) > 1 else []
    goals = [Goal("mean KL divergence over llama.cpp's", ratio, MOST_TIMES_LLAMA, "<=")]
    head = ["from its own float32", "mean KL, nats", "same token"]
    show("Quality", head, cells, goals, tokens=sum(map(len, ids)), figures=figures)


if __name__ == "__main__":
    main()
