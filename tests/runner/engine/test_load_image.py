"""Pipelines: plans from headers, and engines from plans."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoint import open_checkpoint
from models.device import Device
from models.errors import CheckpointError, UnsupportedArchitecture
from models.image.base import PictureRequest
from runner.config import DialectName, LoraFile, RunnerConfig
from runner.dialects.ollamarunner import memory_table
from runner.engine import load_image, memory_limits
from runner.engine.executor_thread import ExecutorThread
from runner.engine.image import ImageEngine
from runner.engine.load import LoadOptions, ModelLoader
from runner.engine.text import TextEngine
from runner.errors import InsufficientMemory, LoadError
from tests.image_pipelines import PARITY_IMAGE

OPTIONS = LoadOptions(parallel=4, context_per_row=None, batch_tokens=None)
KLEIN = PARITY_IMAGE / "flux2_klein"
COMPONENTS = ("text_encoder", "transformer", "vae")


@pytest.fixture
def config(tmp_path):
    return RunnerConfig(dialect=DialectName.IMAGEGEN, model=None, port=0, store=tmp_path / "store")


@pytest.fixture
def on_device(monkeypatch):
    """Plan for another device than this machine's."""

    def choose(kind: str, available: int) -> None:
        device = Device(kind, "a device", 2 * available, available)
        monkeypatch.setattr(load_image, "device", lambda: device)
        monkeypatch.setattr(memory_limits, "cgroup_headroom", lambda: None)

    return choose


def plan_of(config, reference):
    return ModelLoader(config).plan(str(reference), OPTIONS)


def float32_bytes(folder, *components, store=None):
    checkpoint = open_checkpoint(str(folder), store or folder)
    return sum(4 * math.prod(info.shape) for name in components for info in checkpoint.infos(name))


async def built(config, reference):
    """The engine, and its thread."""
    thread = ExecutorThread()
    seen = []
    engine = await thread.call(ModelLoader(config).builder(str(reference), OPTIONS), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    return engine, thread


async def test_the_checkpoint_chooses_the_engine_whatever_the_dialect(config, tiny_pipeline, tiny_llama):
    for dialect in DialectName:
        for reference, kind in ((tiny_pipeline, ImageEngine), (tiny_llama, TextEngine)):
            engine, thread = await built(replace(config, dialect=dialect), reference)
            assert type(engine) is kind
            await thread.call(engine.close)
            await thread.close()


def test_a_classic_parents_memory_table_has_a_component_where_a_model_has_a_layer(config, wide_pipeline, on_device):
    on_device("metal", 1 << 30)
    plan = plan_of(config, wide_pipeline)
    (gpu,) = memory_table(plan).gpus
    assert gpu.weights == plan.device.weights
    assert gpu.cache == (0, 0, 0)
    assert gpu.graph == plan.device.graph > 0


def test_an_unknown_pipeline_is_refused_while_planning(config, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UnsupportedArchitecture, match=r"StableDiffusionPipeline is not supported; supported: .*ZImage"):
        plan_of(config, tmp_path)


def test_a_plan_counts_the_components_one_by_one(config, wide_pipeline, on_device):
    on_device("cpu", 1 << 30)
    plan = plan_of(config, wide_pipeline)
    assert plan.device.weights[1:] == tuple(float32_bytes(wide_pipeline, name) for name in COMPONENTS[1:])
    assert plan.device.cache == ()
    assert plan.input_weights == 0
    assert plan.fits
    # The last of three layers makes a hidden state that nobody reads.
    unread = sum(
        4 * math.prod(info.shape)
        for info in open_checkpoint(str(wide_pipeline), wide_pipeline).infos("text_encoder")
        if info.name.startswith("layers.2.")
    )
    assert 0 < unread == float32_bytes(wide_pipeline, "text_encoder") - plan.device.weights[0]


async def test_the_plan_is_what_the_loaded_pipeline_takes(config, wide_pipeline):
    import mlx.core as mx

    plan = plan_of(config, wide_pipeline)
    thread = ExecutorThread()
    before = await thread.call(mx.get_active_memory)
    engine = await thread.call(ModelLoader(config).builder(str(wide_pipeline), OPTIONS), lambda _: None)
    taken = await thread.call(mx.get_active_memory) - before
    await thread.call(engine.close)
    await thread.close()
    # Some weights have left for numpy, and others are there in a second form.
    assert taken < 1.5 * plan.weights


def test_a_cpu_holds_quantised_weights_in_float32_if_a_picture_fits_beside_them_and_else_as_stored(
    config, pipeline_store, on_device
):
    config = replace(config, store=pipeline_store)
    stored = replace(config, weights="keep", text_encoder="keep")
    on_device("cpu", 1 << 30)
    widened = plan_of(config, "p-int4")
    kept = plan_of(stored, "p-int4")
    assert widened.weights == plan_of(replace(config, weights="float32"), "p-int4").weights
    assert kept.weights < widened.weights / 2
    on_device("cpu", widened.total)
    assert plan_of(config, "p-int4").weights == widened.weights
    # Not even without the text encoder.
    on_device("cpu", widened.total - widened.device.weights[0] - 1)
    assert plan_of(config, "p-int4").weights == kept.weights


def test_a_gpu_holds_weights_as_stored_but_the_autoencoder_in_float32(config, pipeline_store, on_device):
    on_device("metal", 1 << 30)
    plan = plan_of(replace(config, store=pipeline_store), "p-int4")
    checkpoint = open_checkpoint("p-int4", pipeline_store)
    stored = [sum(info.nbytes for info in checkpoint.infos(name)) for name in COMPONENTS]
    assert plan.device.weights[1] == stored[1]
    assert plan.device.weights[0] < stored[0]
    assert plan.device.weights[2] == float32_bytes("p-int4", "vae", store=pipeline_store) > stored[2]


def test_the_text_encoder_is_kept_if_it_fits_freed_if_not_and_otherwise_as_told(config, wide_pipeline, on_device):
    on_device("cpu", 1 << 30)
    kept = plan_of(config, wide_pipeline)
    freed = plan_of(replace(config, text_encoder="free"), wide_pipeline)
    assert kept.device.weights[1:] == freed.device.weights
    assert kept == plan_of(replace(config, text_encoder="keep"), wide_pipeline)
    # It is back for each new prompt, and must fit as well as a picture must.
    assert freed.device.graph == max(kept.device.graph, kept.device.weights[0])
    on_device("cpu", kept.total)
    assert len(plan_of(config, wide_pipeline).device.weights) == 3
    on_device("cpu", kept.total - 1)
    squeezed = plan_of(config, wide_pipeline)
    assert len(squeezed.device.weights) == 2
    assert squeezed.fits


def test_room_for_a_smaller_picture_than_the_default_is_room_enough(config, wide_pipeline, on_device):
    on_device("cpu", 1 << 30)
    roomy = replace(config, text_encoder="keep", vae_tile=0)
    plan = large_by_default(roomy, wide_pipeline)
    assert plan.device.graph > 64 << 20
    on_device("cpu", plan.total - (8 << 20))
    tighter = large_by_default(roomy, wide_pipeline)
    assert tighter.fits
    assert tighter.total == tighter.available
    on_device("cpu", plan.weights)
    assert not large_by_default(roomy, wide_pipeline).fits


def large_by_default(config, folder):
    """The plan of the pipeline as if its pictures were 2048 pixels wide."""
    planner = load_image._Planner(open_checkpoint(str(folder), folder), config)
    planner._abilities = replace(planner._abilities, width=2048, height=2048)
    return planner.blueprint().memory


def test_a_picture_that_is_decoded_piece_by_piece_is_planned_with_less(config, wide_pipeline, on_device):
    on_device("cpu", 1 << 33)
    whole, tiled = (large_by_default(replace(config, vae_tile=tile), wide_pipeline) for tile in (0, 32))
    assert tiled.device.graph < 0.7 * whole.device.graph


def test_what_does_not_fit_is_refused_with_figures_and_remedy(config, wide_pipeline, on_device, caplog):
    on_device("cpu", 1000)
    loader = ModelLoader(config)
    assert not loader.plan(str(wide_pipeline), OPTIONS).fits
    message = (
        r"^insufficient memory: .*pipeline needs \d+ MiB \(transformer \d+ MiB, vae \d+ MiB, working space \d+ MiB\) "
        r"and 0 MiB are available; choose a smaller or quantised model, or --check-memory=false"
    )
    with pytest.raises(InsufficientMemory, match=message):
        loader.builder(str(wide_pipeline), OPTIONS)
    told = replace(config, text_encoder="keep", weights="float32")
    with pytest.raises(InsufficientMemory, match="choose --weights=keep, --text-encoder=free, a smaller"):
        ModelLoader(told).builder(str(wide_pipeline), OPTIONS)
    ModelLoader(replace(config, check_memory=False)).builder(str(wide_pipeline), OPTIONS)
    assert "loading all the same" in caplog.text


def test_running_out_of_memory_while_loading_is_said_in_the_parents_words(config, tiny_pipeline, monkeypatch):
    def fail(*_):
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr(load_image, "load_image_pipeline", fail)
    build = ModelLoader(config).builder(str(tiny_pipeline), OPTIONS)
    with pytest.raises(InsufficientMemory, match=r"^insufficient memory while loading .*99 bytes.*--text-encoder=free"):
        build(lambda _: None)


def test_the_log_tells_what_was_chosen(config, tiny_pipeline, caplog):
    caplog.set_level(logging.INFO)
    ModelLoader(replace(config, text_encoder="free")).builder(str(tiny_pipeline), OPTIONS)
    (record,) = [record for record in caplog.records if record.message == "memory plan"]
    assert record.fields["text_encoder"] == "freed"
    assert record.fields["weights_held"] == "float32"
    assert {"transformer_mib", "vae_mib", "graph_mib", "available_mib"} <= record.fields.keys()


async def test_what_the_process_was_told_reaches_the_pipeline(config, tiny_pipeline, tmp_path, monkeypatch):
    lora = write_lora(tmp_path / "lora.safetensors", "transformer.layers.0.attention.to_q", 32, 32)
    seen = []
    real = load_image.load_image_pipeline
    monkeypatch.setattr(
        load_image,
        "load_image_pipeline",
        lambda checkpoint, choices: (seen.append(choices), real(checkpoint, choices))[1],
    )
    told = replace(config, loras=(LoraFile(lora, 0.5),), text_encoder="free", vae_tile=32, weights="keep")
    engine, thread = await built(told, tiny_pipeline)
    await thread.call(engine.close)
    await thread.close()
    (choices,) = seen
    assert [(each.path, each.scale) for each in choices.loras] == [(lora, 0.5)]
    assert (choices.keep_text_encoder, choices.vae_tile, choices.policy) == (False, 32, "keep")


def write_lora(path, layer, rows, columns):
    random = np.random.default_rng(1)
    halves = {"A": (4, columns), "B": (rows, 4)}
    tensors = {
        f"{layer}.lora_{half}.weight": random.normal(size=shape).astype(np.float32) for half, shape in halves.items()
    }
    safetensors.numpy.save_file(tensors, path)
    return path


def test_a_lora_of_another_model_is_refused_before_a_weight_is_read(config, tiny_pipeline, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", "transformer.layers.9.attention.to_q", 32, 32)
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: tensor .*layers\.9.*: matches nothing"):
        plan_of(replace(config, loras=(LoraFile(lora),)), tiny_pipeline)


def test_a_lora_is_refused_for_a_text_model(config, tiny_llama, tmp_path):
    with pytest.raises(LoadError, match="is a text model, and --lora is for image pipelines"):
        plan_of(replace(config, loras=(LoraFile(tmp_path / "x"),)), tiny_llama)


async def test_a_picture_too_large_for_the_memory_is_refused_by_the_engine(config, on_device):
    from runner.engine.types import ImageRequest

    on_device("cpu", 1 << 30)
    huge = ImageRequest("a fox", width=2048, height=2048)
    for check_memory in (True, False):
        engine, thread = await built(replace(config, check_memory=check_memory), KLEIN)
        on_device("cpu", 0)
        if check_memory:
            with pytest.raises(
                InsufficientMemory, match=r"2048x2048 needs .* the largest size that fits is \d+x\d+, or"
            ):
                engine.prepare(huge)
        else:
            engine.prepare(huge)
        on_device("cpu", 1 << 30)
        await thread.call(engine.close)
        await thread.close()


@pytest.mark.parametrize("folder", [KLEIN, PARITY_IMAGE / "z_image"])
def test_the_rough_figure_of_a_plan_is_of_the_order_of_the_pipelines_own(config, folder):
    checkpoint = open_checkpoint(str(folder), folder)
    planner = load_image._Planner(checkpoint, replace(config, vae_tile=0))
    pipeline = load_image.load_image_pipeline(checkpoint, load_image.LoadChoices(vae_tile=0))
    for side in (256, 512, 1024):
        own = pipeline.working_bytes(PictureRequest("", side, side, 1, 1))
        assert own / 2 < planner._picture_nbytes(side, side) < own * 2
