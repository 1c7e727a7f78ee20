"""How a pipeline's prompts become embeddings; what the embeddings are, the parity tests compare with diffusers."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, TokenizerError
from models.executors.onnx import OnnxEncoder
from models.image import text_encoder
from models.image.base import LoadChoices
from models.image.text_encoder import KEPT_PROMPTS, MAX_TOKENS, Reading, TextEncoder

READING = Reading(hidden_states=(-2,), enable_thinking=True)


@pytest.fixture
def checkpoint(tiny_pipeline: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_pipeline), tiny_pipeline)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a component's name whenever weights are loaded."""
    seen: list[str] = []
    load = text_encoder.load_encoder

    def counted(view, *more, **named):
        seen.append(view.component)
        return load(view, *more, **named)

    monkeypatch.setattr(text_encoder, "load_encoder", counted)
    return seen


def changed(tiny_pipeline: Path, folder: Path, file: str, **changes: object) -> Checkpoint:
    """The tiny pipeline with other values in one of its JSON files; None takes one away."""
    shutil.copytree(tiny_pipeline, folder / "pipeline")
    path = folder / "pipeline" / file
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return open_checkpoint(str(folder / "pipeline"), folder)


def test_a_prompt_is_dressed_in_the_chat_template(checkpoint: Checkpoint):
    thinking, not_thinking = (
        TextEncoder(checkpoint, Reading((-2,), enable_thinking=flag), LoadChoices()) for flag in (True, False)
    )
    start, prompt, answer = ("<|im_start|>user\n", "a fox", "<|im_end|>\n<|im_start|>assistant\n")
    encode = thinking.tokenizer.encode
    assert thinking.tokens(prompt) == encode(start + prompt + answer, add_bos=False)
    assert not_thinking.tokens(prompt) == encode(start + prompt + answer + "<think>\n\n</think>\n\n", add_bos=False)


def test_a_prompt_that_is_too_long_is_cut_and_the_log_says_so(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture):
    encoder = TextEncoder(checkpoint, READING, LoadChoices())
    assert len(encoder.tokens("hen " * 2000)) == MAX_TOKENS
    assert [record.message for record in caplog.records] == ["prompt cut"]


def test_only_the_layers_that_are_read_are_there(checkpoint: Checkpoint):
    encoder = TextEncoder(checkpoint, Reading((1,), enable_thinking=True), LoadChoices())
    assert encoder.model.config.num_layers == 1
    (embeddings,) = encoder.encode("a fox")
    assert embeddings.shape == (len(encoder.tokens("a fox")), encoder.width)


def test_several_depths_lie_side_by_side(checkpoint: Checkpoint):
    one, two, both = (
        TextEncoder(checkpoint, Reading(depths, enable_thinking=True), LoadChoices()).encode("a fox")[0]
        for depths in ((1,), (2,), (2, 1))
    )
    np.testing.assert_allclose(np.array(both), np.array(mx.concatenate([two, one], axis=1)), atol=1e-5)


def test_a_padded_prompt_begins_as_the_bare_one_does(checkpoint: Checkpoint):
    (bare,) = TextEncoder(checkpoint, READING, LoadChoices()).encode("a fox")
    (padded,) = TextEncoder(checkpoint, Reading((-2,), True, padded=True), LoadChoices()).encode("a fox")
    assert padded.shape == (MAX_TOKENS, bare.shape[1])
    np.testing.assert_allclose(np.array(padded[: len(bare)]), np.array(bare), atol=1e-5)
    # Each place in the padding looks at the prompt from another distance.
    assert not np.allclose(np.array(padded[-1]), np.array(padded[-2]), atol=1e-5)


def test_a_prompt_is_computed_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    encoder = TextEncoder(checkpoint, READING, LoadChoices())
    runs: list[list[int]] = []
    run = encoder._run
    monkeypatch.setattr(encoder, "_run", lambda model, tokens: (runs.append(tokens), run(model, tokens))[1])
    first = encoder.encode("a fox", "")
    again = encoder.encode("", "a fox", "a fox")
    assert [id(each) for each in again] == [id(first[1]), id(first[0]), id(first[0])]
    assert len(runs) == 2


def test_the_prompts_used_last_are_kept(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    encoder = TextEncoder(checkpoint, READING, LoadChoices())
    encoder.encode("kept")
    for number in range(KEPT_PROMPTS):
        encoder.encode(f"other {number}")
        if number < KEPT_PROMPTS - 1:
            encoder.encode("kept")
    monkeypatch.setattr(encoder, "_run", lambda model, tokens: pytest.fail("computed again"))
    encoder.encode("kept", f"other {KEPT_PROMPTS - 1}")
    assert "other 0" not in encoder._embeddings


def test_weights_that_are_not_kept_are_loaded_for_each_new_prompt_and_freed(checkpoint: Checkpoint, loads: list[str]):
    kept = TextEncoder(checkpoint, READING, LoadChoices())
    assert loads == ["text_encoder"]
    encoder = TextEncoder(checkpoint, READING, LoadChoices(keep_text_encoder=False))
    assert loads == ["text_encoder"]
    found = encoder.encode("a fox", "a dog")
    assert loads == ["text_encoder"] * 2
    encoder.encode("a dog")
    assert loads == ["text_encoder"] * 2
    assert encoder._encoder is None
    assert encoder.working_bytes > kept.working_bytes
    for ours, expected in zip(found, kept.encode("a fox", "a dog"), strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(expected))


def test_weights_are_freed_behind_a_prompt_and_behind_one_that_fails(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    encoder = TextEncoder(checkpoint, READING, LoadChoices(keep_text_encoder=False))
    loaded: list[OnnxEncoder] = []
    load = encoder._load
    monkeypatch.setattr(encoder, "_load", lambda span: (loaded.append(load(span)), loaded[-1])[1])
    with pytest.raises(TokenizerError):
        encoder.encode("\ud800")
    assert encoder.encode("a fox")[0].shape[1] == encoder.width
    assert [each._executor._loaded for each in loaded] == [None, None]


@pytest.mark.parametrize("depth", [0, 3, -1, 27])
def test_depths_that_the_model_has_not_are_refused(checkpoint: Checkpoint, depth: int):
    with pytest.raises(CheckpointError, match="3 layers are too few"):
        TextEncoder(checkpoint, Reading((depth,), enable_thinking=True), LoadChoices())


def test_another_kind_of_model_is_refused(tiny_pipeline: Path, tmp_path: Path):
    checkpoint = changed(tiny_pipeline, tmp_path, "text_encoder/config.json", model_type="t5")
    with pytest.raises(CheckpointError, match="'t5'"):
        TextEncoder(checkpoint, READING, LoadChoices())


def test_padding_needs_a_token_for_it(tiny_pipeline: Path, tmp_path: Path):
    checkpoint = changed(tiny_pipeline, tmp_path, "tokenizer/tokenizer_config.json", pad_token=None)
    with pytest.raises(TokenizerError, match="pad_token"):
        TextEncoder(checkpoint, Reading((-2,), enable_thinking=True, padded=True), LoadChoices())


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_pipeline: Path, tmp_path: Path):
    checkpoint = changed(tiny_pipeline, tmp_path, "tokenizer/tokenizer_config.json")
    (tmp_path / "pipeline" / "tokenizer" / "chat_template.jinja").unlink()
    encoder = TextEncoder(checkpoint, READING, LoadChoices())
    with pytest.raises(TokenizerError, match="chat template"):
        encoder.encode("a fox")
