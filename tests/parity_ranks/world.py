"""The first of some ranks on loopback: loads fixture after fixture on the same processes and says what came out.

Run as `python -m tests.parity_ranks.world RANKS SHARDING DEPTH NAME…`, a name with a plus for all equalities, one
with an equals sign for what an engine makes of it; a JSON object a line. MLX has one group a process, so each number
of ranks has a process of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.errors import ShareError
from models.executors.base import Row, Step
from models.executors.mlx.ranks import Options, load_rank
from models.executors.shared import SharedExecutor
from models.fingerprint import digests
from models.sampling import Draw, Sampling
from models.weights.matching import model_of, tensors_of
from models.weights.shares import plans_of
from runner.ranks.first import Ranks
from runner.ranks.hostfile import Host, Hostfile
from tests.parity.executors import load as load_alone
from tests.parity.executors import run
from tests.parity.test_llm_parity import Prompt, read_prompts
from tests.parity_ranks.served import answers

PARITY = Path(__file__).parent.parent / "parity"
GREEDY = Sampling(temperature=0)


def start(count: int) -> Ranks:
    """So many ranks on this machine, all there."""
    hosts = (Host("127.0.0.1", ("127.0.0.1",)),) * count
    ranks = Ranks(hosts, Hostfile(hosts, "ring", {}), None)
    ranks.start()
    ranks.connected()
    return ranks


def load(path: Path, ranks: Ranks, sharding: str, depth: int, weights: str = "float32") -> SharedExecutor:
    """A checkpoint on all ranks. Raises ShareError."""
    checkpoint = open_checkpoint(str(path), PARITY / "no-store")
    model = model_of(checkpoint)
    plans = plans_of(model, tensors_of(model, checkpoint), path.name, ranks.count, sharding)
    group = ranks.group()
    options = Options(weights, "f16", 64, 128, depth)
    ranks.load(
        {
            "model": str(path),
            "store": str(PARITY / "no-store"),
            "digests": dict(digests(checkpoint)),
            "sharding": sharding,
            "policy": weights,
            "cache_type": "f16",
            "longest_step": 64,
            "reach": 128,
            "depth": depth,
            "other_parts": list(model.other_parts),
        }
    )
    executor = load_rank(checkpoint, model, plans, group, options)
    ranks.loaded()
    return SharedExecutor(executor, ranks)


def parity(executor: SharedExecutor, name: str, *, thorough: bool) -> dict[str, Any]:
    """How far a fixture's logits are from the reference: prompts together, decoded on; cut, drafted upon, stored."""
    prompts = read_prompts(name)
    together = run(executor, *[(slot, 0, prompt.tokens) for slot, prompt in enumerate(prompts)])
    found = {"together": max(_far(logits, prompt.logits) for logits, prompt in zip(together, prompts, strict=True))}
    said = [[int(logits[-1].argmax())] for logits in together]
    rows = [(slot, len(prompt.tokens), [prompt.continuation[0]]) for slot, prompt in enumerate(prompts)]
    for tokens, logits in zip(said, run(executor, *rows), strict=True):
        tokens.append(int(logits[-1].argmax()))
    found["greedy"] = float(said != [prompt.continuation[:2] for prompt in prompts])
    return found | (_taken_up(executor, prompts[0]) if thorough else {})


def _taken_up(executor: SharedExecutor, prompt: Prompt) -> dict[str, float]:
    """A prompt in three pieces, behind the second of which other tokens were tried; and from what was stored of it."""
    tokens, logits = prompt.tokens, prompt.logits
    cut = len(tokens) // 2
    wrong, begun = tokens[::-1], cut - 2
    first = run(executor, (5, 0, tokens[:begun]))[0]
    first = np.concatenate([first, run(executor, (5, begun, [*tokens[begun:cut], *wrong[:3]]))[0][:2]])
    checkpoint = None
    if executor.needs_checkpoints:
        run(executor, (6, 0, tokens[:cut]))
        checkpoint = executor.checkpoint(6, cut)
    segment = executor.segment(6 if checkpoint else 5, cut, 0, cut)
    rest = run(executor, (5, cut, tokens[cut:]))[0]
    middle = cut // 2
    executor.release(7)
    executor.restore(7, [segment.part(0, middle), segment.part(middle, cut)], checkpoint)
    restored = run(executor, (7, cut, tokens[cut:]))[0]
    return {
        "drafted": max(_far(first, logits[:cut]), _far(rest, logits[cut:])),
        "restored": _far(restored, logits[cut:]),
    }


def rounded(executor: SharedExecutor, name: str) -> dict[str, Any]:
    """The same of a file whose weights are rounded, against what is made of these."""
    expected = load_file(PARITY / f"{name}.safetensors")["logits.0"]
    prompt = read_prompts(name.partition("-")[0])[0]
    return {"together": _far(run(executor, (0, 0, prompt.tokens))[0], expected)}


def alone(name: str) -> dict[str, list[object]]:
    """What an engine on one rank makes of it."""
    return answers(load_alone(PARITY / name, "mlx"), PARITY / name)


def unread(executor: SharedExecutor, name: str) -> dict[str, Any]:
    """Whether tokens that nobody has read are known to all ranks when the next steps begin on them."""
    prompt = read_prompts(name)[0]
    logits = executor.forward(Step((Row(0, 0, tuple(prompt.tokens)),)))
    assert logits is not None
    waiting = [executor.sample(logits, [Draw(GREEDY, 0.0, 0)])]
    for place in range(3):
        logits = executor.forward(Step((Row(0, len(prompt.tokens) + place, ()),)))
        assert logits is not None
        waiting.append(executor.sample(logits, [Draw(GREEDY, 0.0, 0)]))
    said = [sampled.read()[0].token for sampled in waiting]
    return {"unread": float(said != prompt.continuation[: len(said)])}


def _far(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max())


def say(value: dict[str, Any]) -> None:
    """A line of what is said."""
    print(json.dumps(value), flush=True)


def main() -> None:
    """See the module."""
    count, sharding, depth, *names = sys.argv[1:]
    ranks = start(int(count))
    for marked in names:
        name = marked.lstrip("+=")
        stem = name.removesuffix(".gguf")
        try:
            executor = load(PARITY / name, ranks, sharding, int(depth), "keep" if "-" in stem else "float32")
        except ShareError as error:
            say({"name": name, "refused": str(error)})
            continue
        if marked.startswith("="):
            say({"name": name, "shared": answers(executor, PARITY / name), "alone": alone(name)})
            continue
        if int(depth):
            found = unread(executor, stem)
        elif "-" in stem:
            found = rounded(executor, stem)
        else:
            found = parity(executor, stem, thorough=marked != name)
        executor.close()
        say({"name": name, **found})
    ranks.stop()


if __name__ == "__main__":
    main()
