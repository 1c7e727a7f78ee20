"""Every language architecture on 2 ranks and some on 4, in processes of their own on loopback, against the reference.

The tolerance is that of one rank, and the words are the reference's. What does not divide among so many ranks is
refused with the numbers that could, and shared by layers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.parity.test_llm_parity import FOLDERS, TOLERANCE
from tests.parity_ranks.fixtures import ONE_EACH

pytestmark = pytest.mark.process

ROOT = Path(__file__).parent.parent.parent
Results = Mapping[str, Mapping[str, float | str]]


THOROUGH = (
    *("llama_gqa", "phi3", "gemma2", "gemma3n", "gemma4", "mixtral", "gpt_oss", "deepseek_v3", "llama4", "olmoe"),
    *("qwen3_5", "qwen3_next", "lfm2_moe", "mamba2", "falcon_h1", "bamba", "cohere2_moe", "laguna"),
)
"""Of which all equalities are looked at: one of each way in which layers differ."""
ALL = "RANKS_FIXTURES"
"""The variable that asks for all of them: ranks get in each other's way where there are fewer cores."""
TWO = FOLDERS if os.environ.get(ALL) == "all" else sorted({*ONE_EACH, *THOROUGH})
FOUR = ONE_EACH if os.environ.get(ALL) == "all" else ("bamba", "llama_gqa", "mixtral", "nemotron_h")
ROUNDED = ("gemma2-Q8_0.gguf", "qwen3_moe-Q4_1.gguf", "mamba2-Q8_0.gguf", "gemma3n-Q8_0.gguf")
OF_ROWS_IN_ANOTHER_ORDER = ("llama_gqa.gguf", "qwen3_5.gguf", "deepseek_v2.gguf", "gpt_oss_plain.gguf")
INDIVISIBLE = {
    2: {"falcon_h1_norm_first", "nemotron_h", "nemotron_h_latent", "nemotron_h_moe", "qwen3_next_mixed", "smollm2"},
    4: {"laguna", "nemotron_h", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3_next_mixed"},
}
BY_LAYERS = sorted(INDIVISIBLE[2] | {"llama_gqa", "gemma3n", "gemma4", "deepseek_v3", "lfm2", "mixtral", "bamba"})
DEEP = ("llama_gqa", "qwen3_next", "gemma2")


def world(ranks: int, sharding: str, names: list[str], depth: int = 0) -> Results:
    """What so many ranks make of fixtures, by name."""
    command = [sys.executable, "-m", "tests.parity_ranks.world", str(ranks), sharding, str(depth), *names]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def two() -> Results:
    names = [f"+{name}" if name in THOROUGH else name for name in TWO]
    return world(2, "tensor", [*names, *ROUNDED, *OF_ROWS_IN_ANOTHER_ORDER])


@pytest.fixture(scope="module")
def four() -> Results:
    return world(4, "tensor", list(FOUR))


@pytest.fixture(scope="module")
def layers() -> Results:
    return world(2, "pipeline", [f"+{name}" for name in BY_LAYERS])


def check(result: Mapping[str, float | str]) -> None:
    assert "refused" not in result
    far = {kind: value for kind, value in result.items() if isinstance(value, float) and not value < TOLERANCE}
    assert far == {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*TWO, *ROUNDED, *OF_ROWS_IN_ANOTHER_ORDER])
def test_two_ranks_say_what_the_reference_says(two: Results, name: str):
    if name in INDIVISIBLE[2]:
        assert "cannot be shared by 2 ranks" in two[name]["refused"]
    else:
        check(two[name])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_say_what_the_reference_says(four: Results, name: str):
    if "refused" in four[name]:
        assert name.removesuffix("_vision") in INDIVISIBLE[4]
        assert "--shard=pipeline" in four[name]["refused"]
    else:
        check(four[name])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", BY_LAYERS)
def test_ranks_that_share_by_layers_say_what_the_reference_says(layers: Results, name: str):
    check(layers[name])


@pytest.mark.parametrize("sharding", ["tensor", "pipeline"])
def test_steps_may_begin_on_tokens_that_nobody_has_read(sharding: str):
    for result in world(2, sharding, list(DEEP), depth=1).values():
        check(result)


def test_the_same_ranks_load_and_let_go_twenty_times():
    results = world(2, "tensor", ["llama_gqa"] * 20)
    check(results["llama_gqa"])


@pytest.mark.parametrize("sharding", ["tensor", "pipeline"])
def test_an_engine_answers_as_on_one_rank_whatever_is_asked(sharding: str):
    """Batches, what is stored, drafts, formats, log-probabilities, cancelling, shifted contexts."""
    names = ["=llama_gqa", "=qwen3_next"]
    results = world(2, sharding, names if sharding == "tensor" else names[:1])
    for result in results.values():
        assert result["shared"] == result["alone"]
    assert results["llama_gqa"]["shared"]["greedy"][1][2] > 0, "the second time what is stored is of use"
