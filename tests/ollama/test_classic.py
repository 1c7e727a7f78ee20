"""Ollama v0.24's own types against the classic dialect: `bin/classic` goes through its requests, this judges."""

import asyncio
import json
from asyncio.subprocess import PIPE

import pytest

from runner.config import DialectName
from tests.ollama.programs import BIN, skip_without

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(180)]


@pytest.fixture
async def steps(spawn_runner, tiny_llama):
    """What the types made of each answer, by step."""
    skip_without("classic-v0.24.0")
    async with spawn_runner(tiny_llama, DialectName.CLASSIC) as child:
        process = await asyncio.create_subprocess_exec(
            BIN / "classic-v0.24.0", f"http://127.0.0.1:{child.port}", stdout=PIPE, stderr=PIPE
        )
        out, err = await process.communicate()
    assert not err
    assert process.returncode == 0
    return {step["step"]: (step["status"], step["answer"]) for step in map(json.loads, out.splitlines())}


@pytest.fixture
async def embedding_steps(spawn_runner, tiny_bert):
    """The same of an embedding model, asked as /api/embed and /api/embeddings ask."""
    skip_without("classic-v0.24.0")
    async with spawn_runner(tiny_bert, DialectName.CLASSIC) as child:
        process = await asyncio.create_subprocess_exec(
            BIN / "classic-v0.24.0", f"http://127.0.0.1:{child.port}", "embed", stdout=PIPE, stderr=PIPE
        )
        out, err = await process.communicate()
    assert not err
    assert process.returncode == 0
    return {step["step"]: (step["status"], step["answer"]) for step in map(json.loads, out.splitlines())}


def text_of(answers):
    return "".join(answer["content"] for answer in answers)


async def test_a_classic_parent_is_served_from_launch_to_close(steps):
    assert steps["launched"] == (200, {"status": 2, "progress": 0})
    assert steps["info"] == (200, [])
    assert steps["completion before load"][0] == 503
    fit = steps["load fit"][1]
    assert fit["Success"]
    assert len(fit["Memory"]["CPU"]["Weights"]) == 3
    assert sum(fit["Memory"]["CPU"]["Cache"]) > 0
    assert steps["load alloc"] == steps["load commit"] == steps["load fit"]
    assert steps["ready"] == (200, {"status": 0, "progress": 1})
    assert steps["load again"] == (500, "model already loaded")
    assert steps["load close"][0] == 200
    assert steps["launched again"] == (200, {"status": 2, "progress": 0})


async def test_a_classic_parents_completions_are_answered_or_refused(steps):
    status, answers = steps["completion"]
    assert status == 200
    assert [answer["done"] for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert answers[-1]["done_reason"] == 1
    assert (answers[-1]["prompt_eval_count"], answers[-1]["eval_count"]) == (4, 6)
    assert answers[-1]["prompt_eval_duration"] > 0
    _, drawn = steps["completion with logprobs"]
    entries = [entry for answer in drawn for entry in answer.get("logprobs", ())]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 6
    assert steps["prompt too long"] == (
        400,
        "input length (602 tokens) exceeds the model's maximum context length (128 tokens)",
    )
    assert steps["prompt truncated"][1][-1]["prompt_eval_count"] < 128
    assert text_of(steps["no format"][1])
    for step in ("image", "embedding"):
        status, reason = steps[step]
        assert status == 501
        assert "support" in reason


async def test_a_classic_parents_formats_are_obeyed(steps):
    for step, text in (("grammar", "a"), ("schema", '"yes"')):
        status, answers = steps[step]
        assert (status, text_of(answers), answers[-1]["done_reason"]) == (200, text, 0)
    status, answers = steps["format"]
    assert status == 200
    assert text_of(answers).startswith("{")
    assert steps["bad schema"] == (400, "invalid structured output grammar: Invalid type: foo")


async def test_a_classic_parents_embeddings_are_answered_or_refused(embedding_steps):
    assert embedding_steps["load fit"][1]["Success"]
    answers = embedding_steps["api embed"][1]
    assert len(answers) == 64
    assert {len(answer["embedding"]) for answer in answers} == {24}
    lengths = [sum(value**2 for value in answer["embedding"]) ** 0.5 for answer in answers]
    assert lengths == pytest.approx([1] * 64, abs=1e-5)
    assert len({tuple(answer["embedding"]) for answer in answers}) == 64
    # Special tokens count.
    assert min(answer["prompt_eval_count"] for answer in answers) >= 5
    assert len(embedding_steps["api embeddings"][1]["embedding"]) == 24
    assert embedding_steps["text too long"] == (400, "the input length exceeds the context length")
    assert embedding_steps["empty text"][0] == 200
    assert embedding_steps["completion"] == (501, "the loaded model makes embeddings: ask it for them at /embedding")
