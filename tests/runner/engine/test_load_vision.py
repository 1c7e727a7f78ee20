"""Models that see: from tiny checkpoints and files of pictures to what transformers says of them."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from models.errors import CheckpointError, ExecutionError
from runner.config import DialectName, RunnerConfig
from runner.engine.load import LoadOptions, ModelLoader
from runner.engine.text import TextEngine
from runner.engine.types import InputImage, SamplingParams, TextRequest
from runner.errors import BadRequest
from tests.parity_vision.rows import EXECUTORS, FOLDERS, HERE, PICTURES, Prompt, read_prompts
from tests.runner.engine.serving import run, to_the_end

GREEDY = SamplingParams(temperature=0)
OPTIONS = LoadOptions(parallel=4, context_per_row=512, batch_tokens=None)
IMAGES = tuple(InputImage(number, path.read_bytes()) for number, path in enumerate(PICTURES))
COUNT = 12


def config(**fields) -> RunnerConfig:
    return RunnerConfig(
        dialect=DialectName.MLX, model=None, port=0, store=HERE / "no-store", weights="float32", **fields
    )


def load(folder: Path, options: LoadOptions = OPTIONS, **fields) -> TextEngine:
    engine = ModelLoader(config(**fields)).builder(str(folder), options)(lambda _: None)
    assert isinstance(engine, TextEngine)
    return engine


@pytest.fixture(scope="module", params=list(product(FOLDERS, EXECUTORS)), ids="-".join)
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[TextEngine, list[Prompt]]]:
    name, executor = request.param
    engine = load(HERE / name, executor=executor, activations="float32" if executor == "onnx" else "auto", draft=4)
    yield engine, read_prompts(name)
    engine.close()


def asked(prompt: Prompt, **fields) -> TextRequest:
    return TextRequest(
        prompt.text, GREEDY, num_predict=COUNT, images=IMAGES if "[img-" in prompt.text else (), **fields
    )


def said(engine: TextEngine, *requests: TextRequest) -> list[list[int]]:
    """The tokens of the answers, to requests that come one after the other while those before are answered."""
    rows, accepted = [], [[] for _ in requests]
    for number, request in enumerate(requests):
        engine.add(number, engine.prepare(request))
        row = engine._rows[number]
        accept = row.accept
        row.accept = lambda token, logprob, own=accepted[number], accept=accept: (
            own.append(token) or accept(token, logprob)
        )
        rows.append(row)
        engine.step()
        engine.proceed()
    to_the_end(engine)
    return accepted


def up_to_the_end(engine: TextEngine, tokens: list[int]) -> list[int]:
    """A continuation as far as an engine goes on: to the first token that ends an answer."""
    ends = [place for place, token in enumerate(tokens) if token in engine._tokenizer.stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def test_a_prompt_has_the_references_tokens(loaded: tuple[TextEngine, list[Prompt]]):
    engine, prompts = loaded
    for prompt in prompts:
        prepared = engine.prepare(asked(prompt))
        # What stands in a place is the picture's own.
        assert len(prepared.tokens) == len(prompt.ids)
        pairs = zip(prepared.tokens, prompt.ids, strict=True)
        assert [own if token < 0 else token for token, own in pairs] == prompt.ids
        assert ("[img-" in prompt.text) is any(token < 0 for token in prepared.tokens)


def test_an_engine_says_what_the_reference_says_alone_and_in_company(loaded: tuple[TextEngine, list[Prompt]]):
    engine, prompts = loaded
    expected = [up_to_the_end(engine, prompt.continuation) for prompt in prompts]
    assert said(engine, *map(asked, prompts)) == expected
    # Now from what was kept.
    assert [said(engine, asked(prompt))[0] for prompt in prompts] == expected
    status = engine.status()
    assert status.image_cache_bytes > 0
    assert status.prefix_cache_bytes > 0


@pytest.mark.parametrize("name", sorted(folder.name for folder in (HERE / "projectors").iterdir()))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_gguf_file_sees_with_its_projector_file(name: str, executor: str):
    prompts = read_prompts(f"projectors/{name}")
    folder = HERE / "projectors" / name
    (projector,) = [file for file in folder.glob("*.gguf") if file.name != "model.gguf"]
    named = replace(OPTIONS, projector=projector)
    for options in (OPTIONS, named):
        engine = load(folder / "model.gguf", options, executor=executor)
        assert said(engine, *map(asked, prompts)) == [up_to_the_end(engine, each.continuation) for each in prompts]
        engine.close()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_small_chunks_change_nothing(name: str, executor: str):
    engine = load(HERE / name, executor=executor, prefill_chunk=7, cache_bytes=0, image_cache_bytes=0)
    prompts = read_prompts(name)
    assert said(engine, *map(asked, prompts)) == [up_to_the_end(engine, each.continuation) for each in prompts]
    assert engine.status().image_cache_bytes == 0
    engine.close()


def text_part(source: Path, target: Path) -> Path:
    """A checkpoint without its tower, with the configuration that it had."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if "vision" not in name and "multi_modal" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, target / "model.safetensors")
    (target / "preprocessor_config.json").unlink()
    return target


def test_a_tower_is_counted_in_the_plan_as_the_outputs(tmp_path: Path):
    folder = HERE / "gemma3"
    plan = ModelLoader(config()).plan(str(folder), OPTIONS)
    blind = ModelLoader(config()).plan(str(text_part(folder, tmp_path / "text")), OPTIONS)
    tensors = load_file(folder / "model.safetensors")
    tower = sum(each.size * 4 for name, each in tensors.items() if "vision_tower" in name or "multi_modal" in name)
    assert plan.device.weights[:-1] == blind.device.weights[:-1]
    assert plan.device.weights[-1] - blind.device.weights[-1] == pytest.approx(tower, rel=0.02)
    assert plan.device.graph > blind.device.graph
    engine = load(folder)
    assert engine.status().memory_bytes >= tower
    engine.close()


def test_a_checkpoint_without_its_towers_tensors_is_a_text_model(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = text_part(HERE / "gemma3", tmp_path / "text")
    with caplog.at_level(logging.INFO):
        engine = load(folder)
    assert "the files have no vision tower: images are refused" in caplog.messages
    with pytest.raises(BadRequest, match=r"^this model does not support image input$"):
        engine.prepare(TextRequest("[img-0]", images=IMAGES))
    prompts = [prompt for prompt in read_prompts("gemma3") if "[img-" not in prompt.text]
    assert said(engine, *map(asked, prompts)) == [up_to_the_end(engine, each.continuation) for each in prompts]
    engine.close()


def test_a_tower_that_nothing_here_knows_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "unknown"
    shutil.copytree(HERE / "gemma3", folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"architectures": ["Gemma3ForCausalLM"]}))
    with caplog.at_level(logging.INFO):
        engine = load(folder)
    assert "its vision tower is unknown here: images are refused" in caplog.messages
    assert "tensors left out" in caplog.messages
    engine.close()


def test_a_tower_that_cannot_be_used_leaves_a_text_model_and_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "odd"
    shutil.copytree(HERE / "gemma3", folder)
    (folder / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        engine = load(folder)
    (record,) = [each for each in caplog.records if each.message == "its vision cannot be used: images are refused"]
    assert "preprocessor_config.json" in record.fields["reason"]
    engine.close()


def test_a_tower_of_which_something_is_missing_is_refused_by_its_name(tmp_path: Path):
    folder = tmp_path / "broken"
    shutil.copytree(HERE / "gemma3", folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "vision_tower" in name)
    save_file({name: each for name, each in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        ModelLoader(config()).plan(str(folder), OPTIONS)


def test_a_load_that_fails_at_the_tower_frees_the_rest(monkeypatch: pytest.MonkeyPatch):
    from models.executors.onnx import OnnxExecutor
    from runner.engine.executors import OnnxChoice

    closed = []
    close = OnnxExecutor.close
    monkeypatch.setattr(OnnxExecutor, "close", lambda self: closed.append(self) or close(self))

    def fail(*_: object) -> None:
        raise ExecutionError("no")

    monkeypatch.setattr(OnnxChoice, "load_tower", fail)
    with pytest.raises(ExecutionError):
        load(HERE / "gemma3", executor="onnx")
    assert len(closed) == 1


def test_progress_goes_on_over_the_tower():
    told: list[float] = []
    engine = ModelLoader(config()).builder(str(HERE / "gemma3"), OPTIONS)(told.append)
    engine.close()
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_what_is_kept_of_pictures_is_as_much_as_was_asked():
    engine = load(HERE / "qwen3_vl", image_cache_bytes=1)
    (got,) = run(engine, TextRequest("[img-0]", replace(GREEDY), num_predict=2, images=IMAGES))
    assert got.done.eval_tokens == 2
    assert engine.status().image_cache_bytes == 0
    engine.close()
