"""Which executor runs a text model, and how it holds the weights."""

from pathlib import Path

import pytest

from models.checkpoint import open_checkpoint
from models.device import Device, usable_cores
from models.vision import family_of
from runner.config import DialectName, RunnerConfig
from runner.engine.executors import MLXChoice, OnnxChoice, choices
from runner.errors import LoadError

GEMMA = Path(__file__).parents[2] / "parity_vision" / "gemma3"
CPU = Device("cpu", "a processor", 2**34, 2**33)
GPUS = [Device("metal", "Apple M2", 2**34, 2**33), Device("cuda", "a GPU", 2**34, 2**33)]

every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.kind)


def told(**flags: object) -> RunnerConfig:
    return RunnerConfig(dialect=DialectName.MLX, model=None, port=0, store=Path("store"), **flags)


def test_a_cpu_runs_onnx_with_weights_as_stored_and_rounded_inputs_on_all_of_its_cores():
    assert choices(told(), "f16", CPU) == [OnnxChoice("keep", "int8", "f16", usable_cores())]


@every_gpu
def test_a_gpu_runs_mlx_with_weights_as_stored(gpu: Device):
    assert choices(told(), "q8_0", gpu) == [MLXChoice("keep", "q8_0", gpu.kind)]


@every_gpu
def test_who_asks_for_an_executor_gets_it_on_any_device(gpu: Device):
    assert [each.name for each in choices(told(executor="onnx"), "f16", gpu)] == ["onnx"]
    assert [each.name for each in choices(told(executor="mlx"), "f16", CPU)] == ["mlx"]


def test_without_rounding_float32_weights_are_preferred_and_stored_ones_come_second():
    held = choices(told(activations="float32", threads=3), "f16", CPU)
    assert held == [OnnxChoice("float32", "float32", "f16", 3), OnnxChoice("keep", "float32", "f16", 3)]


@pytest.mark.parametrize("weights", ["float32", "keep", "int8", "int4"])
def test_weights_that_were_asked_for_are_the_only_choice(weights: str):
    assert [each.weights for each in choices(told(weights=weights), "f16", CPU)] == [weights]
    assert [each.weights for each in choices(told(weights=weights, activations="float32"), "f16", CPU)] == [weights]


@every_gpu
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"weights": "int8"}, "--weights=int8"),
        ({"weights": "int4"}, "--weights=int4"),
        ({"activations": "int8"}, "--activations=int8"),
    ],
)
def test_what_only_onnx_can_is_refused_on_a_gpu_with_what_to_do_instead(gpu: Device, flags: dict, named: str):
    with pytest.raises(LoadError, match=rf"^{named} is for the onnx executor, on a CPU; leave it out, or .*create"):
        choices(told(**flags), "f16", gpu)


def test_mlx_may_be_told_what_it_does_anyway():
    assert choices(told(executor="mlx", activations="float32", weights="float32"), "f16", CPU) == [
        MLXChoice("float32", "f16", "cpu")
    ]


def test_whatever_changes_a_models_numbers_changes_the_form_that_files_are_kept_under():
    held = [
        OnnxChoice("keep", "int8", "f16", 1),
        OnnxChoice("float32", "int8", "f16", 1),
        OnnxChoice("keep", "float32", "f16", 1),
        OnnxChoice("keep", "int8", "q8_0", 1),
        MLXChoice("keep", "f16", "cpu"),
        MLXChoice("float32", "f16", "cpu"),
        MLXChoice("keep", "q8_0", "cpu"),
        MLXChoice("keep", "f16", "metal"),
    ]
    assert len({each.form for each in held}) == len(held)
    assert OnnxChoice("keep", "int8", "f16", 1).form == OnnxChoice("keep", "int8", "f16", 2).form


@pytest.mark.parametrize("choice", [OnnxChoice("keep", "int8", "f16", 1), MLXChoice("keep", "f16", "cpu")])
def test_a_vision_tower_takes_what_was_predicted(choice: OnnxChoice | MLXChoice):
    checkpoint = open_checkpoint(str(GEMMA), Path("no-store"))
    family = family_of(checkpoint)
    assert family is not None
    vision = family.build(checkpoint, lambda text: [0] * len(text))
    told: list[float] = []
    encoder = choice.load_tower(checkpoint, vision, told.append)
    assert told[-1] == 1.0
    assert encoder.memory_bytes() == choice.tower_footprint(checkpoint, vision).weights
    encoder.close()
