"""Memory plans from headers, and engines from plans."""

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from models.device import Device
from models.errors import CheckpointError, ModelNotFoundError, QuantizationError, UnsupportedArchitecture
from runner.config import DialectName, RunnerConfig
from runner.engine import load_text as loading
from runner.engine import memory_limits
from runner.engine.executor_thread import ExecutorThread
from runner.engine.executors import OnnxChoice
from runner.engine.load import DeviceMemory, LoadOptions, MemoryPlan, ModelLoader
from runner.engine.types import TextRequest
from runner.errors import InsufficientMemory

DEFAULT = LoadOptions(parallel=4, context_per_row=None, batch_tokens=None)
ONE_ROW = LoadOptions(parallel=1, context_per_row=None, batch_tokens=None)
PAGES = 0.15
"""What rounding up to whole pages adds at most where a row has 4096 tokens."""


@pytest.fixture
def config(tmp_path):
    return RunnerConfig(dialect=DialectName.MLX, model=None, port=0, store=tmp_path / "store")


@pytest.fixture
def on_device(monkeypatch):
    """Plan for another device than this machine's."""

    def choose(kind: str, available: int) -> None:
        device = Device(kind, "a device", 2 * available, available)
        monkeypatch.setattr(loading, "device", lambda: device)
        monkeypatch.setattr(memory_limits, "cgroup_headroom", lambda: None)

    return choose


def weights_of(plan: MemoryPlan) -> int:
    return plan.input_weights + sum(plan.device.weights)


def test_a_plan_counts_every_weight_once_and_by_layer(config, tiny_llama):
    plan = ModelLoader(config).plan(str(tiny_llama), DEFAULT)
    stored = (tiny_llama / "model.safetensors").stat().st_size
    assert stored - 4096 < weights_of(plan) <= stored
    assert len(plan.device.weights) == 3
    assert plan.device.weights[0] == plan.device.weights[1]
    # The output layer: 300 words and a norm, 32 wide.
    assert plan.device.weights[2] == (300 + 1) * 32 * 4
    assert plan.input_weights == 300 * 32 * 4


def test_an_asked_context_is_planned_in_full_for_all_rows(config, tiny_llama):
    loader = ModelLoader(config)
    one = loader.plan(str(tiny_llama), LoadOptions(parallel=1, context_per_row=100, batch_tokens=None))
    four = loader.plan(str(tiny_llama), LoadOptions(parallel=4, context_per_row=100, batch_tokens=None))
    assert sum(four.device.cache) == 4 * sum(one.device.cache) > 0


def test_a_huge_context_that_nobody_asked_for_is_not_planned_in_full(config, roomy_llama):
    loader = ModelLoader(config)
    unasked = loader.plan(str(roomy_llama), ONE_ROW)
    asked = loader.plan(str(roomy_llama), replace(ONE_ROW, context_per_row=loading.PLANNED_TOKENS))
    assert unasked.device.cache == asked.device.cache


def test_the_smaller_of_the_parents_and_the_users_context_counts(config, tiny_llama):
    loader = ModelLoader(replace(config, context=50))
    assert (
        loader.plan(str(tiny_llama), replace(DEFAULT, context_per_row=100)).device.cache
        == ModelLoader(config).plan(str(tiny_llama), replace(DEFAULT, context_per_row=50)).device.cache
    )


def test_a_projector_that_the_parent_names_is_opened_with_the_model(config, parity, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = parity.with_name("parity_vision") / "projectors" / "gemma3"
    (tmp_path / "blob").symlink_to(folder / "model.gguf")
    plan = ModelLoader(config).plan(str(tmp_path / "blob"), replace(ONE_ROW, projector=folder / "mmproj.gguf"))
    assert "sees by the projector" in caplog.text
    assert plan.weights >= ModelLoader(config).plan(str(tmp_path / "blob"), ONE_ROW).weights
    with pytest.raises(CheckpointError, match=r"no\.gguf: cannot be read"):
        ModelLoader(config).plan(str(tmp_path / "blob"), replace(ONE_ROW, projector=tmp_path / "no.gguf"))


async def built(loader, reference, options):
    """The engine's context, as a thread of its own builds it."""
    thread = ExecutorThread()
    try:
        seen = []
        engine = await thread.call(loader.builder(str(reference), options), seen.append)
        context = (await thread.call(engine.status)).context_length
        await thread.call(engine.close)
    finally:
        await thread.close()
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    return context


async def test_an_engine_has_the_models_context_unless_less_is_asked(config, tiny_llama):
    loader = ModelLoader(config)
    assert await built(loader, tiny_llama, DEFAULT) == 128
    assert await built(loader, tiny_llama, replace(DEFAULT, context_per_row=1000)) == 128
    assert await built(loader, tiny_llama, replace(DEFAULT, context_per_row=64)) == 64


async def test_a_row_may_hold_only_what_fits_beside_the_weights(config, roomy_llama, on_device):
    # Two layers of keys and values, two heads of eight dimensions filled up to sixteen, in float32: and whole pages.
    on_device("cpu", 1 << 30)
    context = await built(ModelLoader(config), roomy_llama, ONE_ROW)
    assert context % loading.CONTEXT_STEP == 0
    assert (1 << 29) < context * 512 < (1 << 30)


def test_a_cpu_holds_weights_as_stored_unless_told_otherwise(config, parity, on_device):
    model = str(parity / "llama_gqa-Q8_0.gguf")
    on_device("cpu", 1 << 30)
    plans = {
        weights: ModelLoader(replace(config, weights=weights)).plan(model, ONE_ROW)
        for weights in ("auto", "keep", "float32")
    }
    assert plans["auto"] == plans["keep"]
    assert weights_of(plans["keep"]) < weights_of(plans["float32"]) / 2


def test_without_rounding_a_cpu_holds_weights_in_float32_if_that_fits_and_else_as_stored(
    config, parity, on_device, caplog
):
    model = str(parity / "llama_gqa-Q8_0.gguf")
    exact = replace(config, activations="float32")
    on_device("cpu", 1 << 30)
    widened = ModelLoader(exact).plan(model, ONE_ROW)
    assert weights_of(widened) == weights_of(ModelLoader(replace(exact, weights="float32")).plan(model, ONE_ROW))
    kept = ModelLoader(replace(exact, weights="keep")).plan(model, ONE_ROW)
    assert weights_of(kept) < weights_of(widened) / 2
    on_device("cpu", widened.total - 1)
    caplog.set_level(logging.INFO)
    squeezed = ModelLoader(replace(exact, check_memory=False))
    assert weights_of(squeezed.plan(model, ONE_ROW)) == weights_of(kept)
    squeezed.builder(model, ONE_ROW)
    assert caplog.records[0].fields["weights_held"] == "as stored"


def test_plain_weights_can_be_quantised_at_load(config, wide_llama):
    plain, eight, four = (
        weights_of(ModelLoader(replace(config, weights=weights)).plan(str(wide_llama), ONE_ROW))
        for weights in ("keep", "int8", "int4")
    )
    assert four < eight < 0.6 * plain


def test_a_gpu_runs_mlx_and_keeps_weights_as_they_are(config, parity, on_device, caplog):
    model = str(parity / "llama_gqa-Q8_0.gguf")
    on_device("metal", 1 << 34)
    caplog.set_level(logging.INFO)
    plan = ModelLoader(config).plan(model, ONE_ROW)
    assert plan == ModelLoader(replace(config, weights="keep")).plan(model, ONE_ROW)
    assert weights_of(plan) < weights_of(ModelLoader(replace(config, weights="float32")).plan(model, ONE_ROW)) / 2
    ModelLoader(config).builder(model, ONE_ROW)
    assert caplog.records[0].fields["executor"] == "mlx"


@pytest.mark.parametrize("executor", ["onnx", "mlx"])
async def test_an_engine_runs_on_the_executor_that_was_asked_for(config, tiny_llama, executor, caplog):
    caplog.set_level(logging.INFO)
    assert await built(ModelLoader(replace(config, executor=executor)), tiny_llama, DEFAULT) == 128
    assert caplog.records[0].fields["executor"] == executor


def test_what_does_not_fit_is_refused_with_figures_and_remedy(config, tiny_llama, on_device, caplog):
    on_device("cpu", 1000)
    loader = ModelLoader(config)
    assert not loader.plan(str(tiny_llama), DEFAULT).fits
    with pytest.raises(InsufficientMemory, match=r"^insufficient memory: .* needs .* GiB .*--check-memory=false"):
        loader.builder(str(tiny_llama), DEFAULT)
    ModelLoader(replace(config, check_memory=False)).builder(str(tiny_llama), DEFAULT)
    assert "loading all the same" in caplog.text


def test_a_control_groups_limit_counts_like_the_machines(config, tiny_llama, on_device, monkeypatch):
    on_device("cpu", 1 << 30)
    monkeypatch.setattr(memory_limits, "cgroup_headroom", lambda: 12345)
    assert ModelLoader(config).plan(str(tiny_llama), DEFAULT).available == 12345


def test_a_plan_fits_up_to_the_last_byte():
    device = DeviceMemory("0", "cpu", "a cpu", weights=(10, 20), cache=(5,), graph=7)
    plan = MemoryPlan(input_weights=3, device=device, available=45)
    assert plan.total == 45
    assert plan.fits
    assert not replace(plan, available=44).fits


@pytest.mark.parametrize(
    "error", [MemoryError("99 bytes"), RuntimeError("[malloc] Unable to allocate 99 bytes.")], ids=["onnx", "mlx"]
)
def test_running_out_of_memory_while_loading_is_said_in_the_parents_words(config, tiny_llama, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(OnnxChoice, "load", fail)
    build = ModelLoader(replace(config, weights="float32")).builder(str(tiny_llama), DEFAULT)
    with pytest.raises(InsufficientMemory, match=r"^insufficient memory while loading .*99 bytes.*--weights=keep"):
        build(lambda _: None)


def test_another_failure_while_loading_keeps_its_name(config, tiny_llama, monkeypatch):
    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(OnnxChoice, "load", fail)
    build = ModelLoader(config).builder(str(tiny_llama), DEFAULT)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        build(lambda _: None)


def test_planning_reads_headers_only(config, tiny_llama, tmp_path):
    folder = tmp_path / "sparse"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        if file.name == "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    header_of(tiny_llama / "model.safetensors", folder / "model.safetensors")
    sparse = ModelLoader(config).plan(str(folder), DEFAULT)
    assert weights_of(sparse) == weights_of(ModelLoader(config).plan(str(tiny_llama), DEFAULT))


def header_of(source: Path, target: Path) -> None:
    """A file of the same header and length whose data are a hole."""
    raw = source.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    with target.open("wb") as file:
        file.write(raw[:size])
        file.truncate(len(raw))


def test_what_cannot_be_loaded_is_refused_by_its_own_error(config, roomy_llama):
    loader = ModelLoader(config)
    with pytest.raises(ModelNotFoundError):
        loader.plan("nobody/has-this", DEFAULT)
    file = roomy_llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedArchitecture):
        loader.plan(str(roomy_llama), DEFAULT)


def test_a_quantised_cache_is_planned_at_its_size_and_leaves_room_for_more_context(config, wide_llama, on_device):
    on_device("cpu", 1 << 30)
    asked = replace(DEFAULT, context_per_row=4096)
    plain = ModelLoader(config).plan(str(wide_llama), asked)
    packed = ModelLoader(replace(config, kv_cache_type="q8_0")).plan(str(wide_llama), asked)
    # 32 values of a byte with a scale and an offset, instead of 32 times four bytes; both in whole pages.
    assert sum(packed.device.cache) / sum(plain.device.cache) == pytest.approx(40 / 128, rel=PAGES)
    assert ModelLoader(config).plan(str(wide_llama), replace(asked, cache_type="q8_0")) == packed
    own = ModelLoader(replace(config, kv_cache_type="q8_0"))
    assert own.plan(str(wide_llama), replace(asked, cache_type="f16")) == plain


async def test_the_engine_holds_its_cache_as_asked(config, wide_llama):
    loader = ModelLoader(replace(config, cache_bytes=0))
    thread = ExecutorThread()
    try:
        for kind, per_value in (("f16", 4), ("q8_0", 1.25), ("q4_0", 0.75)):
            engine = await thread.call(
                loader.builder(str(wide_llama), replace(DEFAULT, cache_type=kind)), lambda _: None
            )
            assert engine._executor.state_nbytes(4096) == pytest.approx(2 * 2 * 2 * 4096 * 32 * per_value, rel=PAGES)
            await thread.call(engine.close)
    finally:
        await thread.close()


def test_heads_that_cannot_be_quantised_are_refused_while_planning(config, tiny_llama):
    with pytest.raises(QuantizationError, match="8; choose the cache type f16"):
        ModelLoader(config).plan(str(tiny_llama), replace(DEFAULT, cache_type="q4_0"))


async def test_an_engine_watches_its_memory_unless_told_not_to(config, roomy_llama, on_device):
    thread = ExecutorThread()
    request = TextRequest("x " * 3000, num_predict=1)
    try:
        for check_memory in (True, False):
            on_device("cpu", 1 << 30)
            loader = ModelLoader(replace(config, check_memory=check_memory))
            engine = await thread.call(loader.builder(str(roomy_llama), DEFAULT), lambda _: None)
            on_device("cpu", 0)
            huge = replace(request, prompt="x " * 300_000)
            if check_memory:
                with pytest.raises(InsufficientMemory, match="prompt of 6000"):
                    await asyncio.to_thread(engine.prepare, huge)
            else:
                assert await asyncio.to_thread(engine.prepare, huge)
            # Little is dared whatever the figures say.
            assert await asyncio.to_thread(engine.prepare, request)
            await thread.call(engine.close)
    finally:
        await thread.close()


def test_parts_that_are_left_out_are_named_in_the_log(config, parity, caplog):
    caplog.set_level(logging.INFO)
    ModelLoader(config).plan(str(parity / "qwen3_5_vision"), ONE_ROW)
    records = [record.fields for record in caplog.records if record.message == "tensors left out"]
    assert {(fields["names"], fields["count"]) for fields in records} == {("mtp.*", 12), ("visual.*", 21)}
    caplog.clear()
    ModelLoader(config).plan(str(parity / "qwen3"), ONE_ROW)
    assert "tensors left out" not in caplog.messages
