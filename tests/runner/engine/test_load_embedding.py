"""Plans of embedding models from headers, and engines from plans."""

import json
import logging
import shutil
from dataclasses import replace

import pytest

from models.device import Device
from models.errors import CheckpointError
from runner.config import DialectName, LoraFile, RunnerConfig
from runner.engine import load_embedding as loading
from runner.engine import memory_limits
from runner.engine.embedding import EmbeddingEngine
from runner.engine.load import LoadOptions, ModelLoader
from runner.engine.text import TextEngine
from runner.engine.types import EmbeddingRequest
from runner.errors import InsufficientMemory, LoadError, TextTooLong

OPTIONS = LoadOptions(parallel=1, context_per_row=None, batch_tokens=None)


@pytest.fixture
def config(tmp_path):
    return RunnerConfig(dialect=DialectName.MLX, model=None, port=0, store=tmp_path / "store", executor="onnx")


@pytest.fixture
def on_device(monkeypatch):
    """Plan for a CPU with so much memory."""

    def choose(available: int) -> None:
        monkeypatch.setattr(loading, "device", lambda: Device("cpu", "a device", 2 * available, available))
        monkeypatch.setattr(memory_limits, "cgroup_headroom", lambda: None)

    return choose


def build(config, model, options=OPTIONS):
    return ModelLoader(config).builder(str(model), options)(lambda progress: None)


def vectors_of(engine, *texts):
    engine.add(1, engine.prepare(EmbeddingRequest(texts)))
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    return outputs[-1].vectors


def test_a_plan_counts_every_weight_once_and_by_layer(config, tiny_bert):
    plan = ModelLoader(config).plan(str(tiny_bert), OPTIONS)
    # 160 words, 96 positions and 2 kinds.
    assert plan.input_weights == (160 + 96 + 2) * 24 * 4
    layer = 4 * (24 * 24 + 24) + 24 * 40 + 40 + 40 * 24 + 24 + 4 * 24
    assert plan.device.weights == (4 * layer, 4 * layer, 2 * 24 * 4)
    assert sum(plan.device.cache) == 0


@pytest.mark.parametrize(
    ("context", "flag", "limit"), [(None, None, 64), (10, None, 10), (10, 7, 7), (100_000, None, 64)]
)
def test_a_text_may_have_what_model_parent_and_user_allow_all_of_them(config, tiny_bert, context, flag, limit):
    engine = build(replace(config, context=flag), tiny_bert, replace(OPTIONS, context_per_row=context))
    assert engine.status().context_length == limit
    with pytest.raises(TextTooLong):
        engine.prepare(EmbeddingRequest(("s " * limit,)))
    engine.close()


def test_where_memory_is_short_texts_must_be_shorter_unless_somebody_asked(
    config, parity_embedding, tmp_path, on_device
):
    folder = tmp_path / "long"
    shutil.copytree(parity_embedding / "modernbert", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 65536}))
    on_device(1 << 30)
    loader = ModelLoader(config)
    assert loader.plan(str(folder), OPTIONS).fits
    with pytest.raises(InsufficientMemory, match="a smaller --context"):
        loader.builder(str(folder), replace(OPTIONS, context_per_row=65536))


def test_scores_that_are_not_held_need_no_room(config, parity_embedding, tmp_path, on_device):
    folder = tmp_path / "long"
    shutil.copytree(parity_embedding / "nomic_bert", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_positions": 65536, "max_trained_positions": 65536}))
    on_device(1 << 30)
    plan = ModelLoader(config).plan(str(folder), replace(OPTIONS, context_per_row=60000))
    assert plan.fits
    on_mlx = ModelLoader(replace(config, executor="mlx")).plan(str(folder), replace(OPTIONS, context_per_row=60000))
    assert not on_mlx.fits


def test_too_little_memory_is_tried_where_that_is_asked(config, tiny_bert, on_device, caplog):
    on_device(1 << 20)
    with pytest.raises(InsufficientMemory):
        build(config, tiny_bert)
    with caplog.at_level(logging.WARNING):
        engine = build(replace(config, check_memory=False), tiny_bert)
    assert "loading all the same" in caplog.text
    engine.close()


def test_a_model_of_words_embeds_where_a_pooling_is_asked(config, tiny_llama):
    engine = build(replace(config, pooling="mean"), tiny_llama)
    assert isinstance(engine, EmbeddingEngine)
    (vector,) = vectors_of(engine, "the fox")
    assert len(vector) == 32
    engine.close()
    engine = build(config, tiny_llama)
    assert isinstance(engine, TextEngine)
    engine.close()


@pytest.mark.parametrize("executor", ["onnx", "mlx"])
@pytest.mark.parametrize("model", ["bert", "qwen3_embedding"])
def test_both_executors_serve_many_texts_at_once(config, parity_embedding, executor, model):
    engine = build(replace(config, executor=executor), parity_embedding / model)
    texts = [f"the fox {'she ' * n}" for n in range(20)]
    together = vectors_of(engine, *texts)
    for text, vector in zip(texts, together, strict=True):
        assert vectors_of(engine, text)[0] == pytest.approx(vector, abs=1e-5)
    engine.close()


def test_loras_are_refused(config, tiny_bert, tmp_path):
    with pytest.raises(LoadError, match="--lora is for image pipelines"):
        ModelLoader(replace(config, loras=(LoraFile(tmp_path / "x"),))).plan(str(tiny_bert), OPTIONS)


def test_a_tensor_that_is_missing_is_named_before_anything_is_loaded(config, tiny_bert, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(tiny_bert, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.2"):
        ModelLoader(config).plan(str(folder), OPTIONS)
