"""GGUF text models with projector files, and with the tower in the same file, against what transformers says of them.

`make_gguf.py` and `make_twins.py` make them. A folder's two files are found beside each other.
"""

import json
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arch import build_model
from models.checkpoint import Checkpoint, open_checkpoint
from models.executors.base import EncodedPicture
from models.tokenizer import load_tokenizer
from models.vision import Vision, family_of
from models.weights.matching import model_of
from tests.parity_vision.one_file import LAYOUTS, OneFile, write
from tests.parity_vision.rows import EXECUTORS, HERE, PICTURES, Sight, load, pixels_of, planned, read_prompts, run

NAMES = sorted(folder.name for folder in (HERE / "projectors").iterdir())
TWINS = ("qwen2_vl", "qwen3_vl", "qwen3_5_vl")
"""Twins of folders, which `make_twins.py` makes."""
TOLERANCE = 1e-4


def opened(name: str) -> Checkpoint:
    return open_checkpoint(str(HERE / "projectors" / name / "model.gguf"), HERE / "no-store")


def vision_of(checkpoint: Checkpoint) -> Vision:
    tokenizer = load_tokenizer(checkpoint)
    family = family_of(checkpoint)
    assert family is not None
    return family.build(checkpoint, lambda text: tokenizer.encode(text, add_bos=False))


def encoded(checkpoint: Checkpoint, vision: Vision, kind: str) -> list[EncodedPicture]:
    """Each picture, by a tower on an executor of that kind."""
    if kind == "onnx":
        from models.executors.onnx import load_tower
    else:
        from models.executors.mlx import load_tower
    encoder = load_tower(checkpoint, vision.tower)
    made = []
    for number in range(len(PICTURES)):
        steps = encoder.encode(vision.prepare(pixels_of(number)).passes)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                made.append(end.value)
                break
    encoder.close()
    return made


def sight_in(name: str, pictures: list[EncodedPicture]) -> Sight:
    checkpoint = opened(name)
    return Sight(vision_of(checkpoint), load_tokenizer(checkpoint), pictures)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_has_the_references_ids(name: str):
    empty = [EncodedPicture(np.zeros((0, 1), np.float32))] * len(PICTURES)
    sight = sight_in(name, empty)
    for prompt in read_prompts(f"projectors/{name}"):
        assert planned(sight, prompt.text).tokens == prompt.ids


@pytest.mark.parametrize(("name", "kind"), list(product(NAMES, EXECUTORS)))
def test_pictures_and_prompts_are_read_as_the_reference_reads_them(name: str, kind: str):
    checkpoint = opened(name)
    pictures = encoded(checkpoint, vision_of(checkpoint), kind)
    arrays = load_file(HERE / "projectors" / name / "reference.safetensors")
    scale = np.float32(32**0.5 if name == "gemma3" else 1.0)
    for number, made in enumerate(pictures):
        np.testing.assert_allclose(made.rows * scale, arrays[f"features.{number}"], rtol=0, atol=TOLERANCE)
        assert len(made.deep) == sum(key.startswith(f"deep.{number}.") for key in arrays)
        for level, rows in enumerate(made.deep):
            np.testing.assert_allclose(rows, arrays[f"deep.{number}.{level}"], rtol=0, atol=TOLERANCE)
    sight = sight_in(name, pictures)
    executor = load(f"projectors/{name}/model.gguf", kind)
    for slot, prompt in enumerate(read_prompts(f"projectors/{name}")):
        plan = planned(sight, prompt.text)
        (logits,) = run(executor, plan.row(slot, 0, plan.tokens))
        np.testing.assert_allclose(logits, prompt.logits, rtol=0, atol=TOLERANCE)
    executor.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_text_model_is_the_one_without_a_projector(name: str, tmp_path: Path):
    joined = opened(name)
    alone = tmp_path / "model.gguf"
    alone.symlink_to(HERE / "projectors" / name / "model.gguf")
    text = open_checkpoint(str(alone), tmp_path)
    assert "vision_config" not in text.config
    assert model_of(joined).weights == model_of(text).weights
    assert model_of(joined).state == model_of(text).state
    assert build_model(joined.config).config == build_model(text.config).config


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_of_a_folder_is_what_the_folder_is(name: str):
    folder, twin = open_checkpoint(str(HERE / name), HERE / "no-store"), opened(name)
    start = "model.visual." if name.startswith("qwen3") else "visual."
    wanted = {each.name: np.asarray(each.value) for each in folder.tensors() if each.name.startswith(start)}
    found = {each.name: np.asarray(each.value) for each in twin.tensors() if each.name.startswith("visual.")}
    assert {name.removeprefix("model.") for name in wanted} == set(found)
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key.removeprefix("model.")], value, err_msg=key)
    own, theirs = vision_of(twin), vision_of(folder)
    assert own.tower.weights == theirs.tower.weights
    for number in range(len(PICTURES)):
        ours, wanted_of_it = own.prepare(pixels_of(number)), theirs.prepare(pixels_of(number))
        assert (ours.expansion, ours.grid) == (wanted_of_it.expansion, wanted_of_it.grid)
        for key, given in wanted_of_it.passes[0].items():
            np.testing.assert_allclose(ours.passes[0][key], given, atol=1e-6, err_msg=key)
    assert twin.config["architectures"] == folder.config["architectures"]


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """A model in two files and in one."""
    two = opened(request.param)
    parts = ("visual.", "vision_tower.", "multi_modal_projector.")
    tower = {each.name: np.asarray(each.value) for each in two.tensors() if each.name.startswith(parts)}
    path = tmp_path_factory.mktemp("one") / "model.gguf"
    write(path, LAYOUTS[request.param], HERE / "projectors" / request.param / "model.gguf", tower)
    return two, open_checkpoint(str(path), path.parent)


def test_a_model_in_one_file_is_the_one_in_two(pair: tuple[Checkpoint, Checkpoint]):
    two, one = pair
    wanted = {each.name: np.asarray(each.value) for each in two.tensors()}
    found = {each.name: np.asarray(each.value) for each in one.tensors()}
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert {info.name: info.shape for info in one.infos()} == {name: value.shape for name, value in wanted.items()}
    assert one.nbytes == two.nbytes
    assert vision_of(one).tower.weights == vision_of(two).tower.weights
    assert model_of(one).weights == model_of(two).weights
    assert one.config["vision_config"] == two.config["vision_config"]


def test_a_model_in_one_file_sees_what_the_one_in_two_sees(pair: tuple[Checkpoint, Checkpoint]):
    """But for the mean and the deviation of pixels, which most of such files do not say: the family's own are taken."""
    two, one = (vision_of(each) for each in pair)
    means = [json.loads(each.read("preprocessor_config.json") or b"")["image_mean"] for each in pair]
    unsaid = set() if pair[1].config["gguf_architecture"] in ("qwen3vl", "qwen35") else {"patches"}
    assert (means[0] == means[1]) is (not unsaid)
    for number in range(len(PICTURES)):
        ours, theirs = one.prepare(pixels_of(number)), two.prepare(pixels_of(number))
        assert (ours.expansion, ours.grid, ours.patches) == (theirs.expansion, theirs.grid, theirs.patches)
        for own, other in zip(ours.passes, theirs.passes, strict=True):
            assert set(own) == set(other)
            assert all(np.array_equal(own[key], other[key]) for key in set(own) - unsaid)


def test_mistral_3_may_have_a_text_model_that_is_called_a_llama(tmp_path: Path):
    """As the first ones were converted."""
    folder = HERE / "projectors" / "mistral3_vl"
    write(tmp_path / "model.gguf", OneFile("llama", {}, {}), folder / "model.gguf", {})
    older = open_checkpoint(str(tmp_path / "model.gguf"), tmp_path, folder / "mmproj.gguf")
    newer = opened("mistral3_vl")
    assert older.config["architectures"] == newer.config["architectures"] == ["Mistral3ForConditionalGeneration"]
    assert model_of(older).weights == model_of(newer).weights
    assert model_of(older).state == model_of(newer).state
    assert vision_of(older).tower.weights == vision_of(newer).tower.weights


def halved(source: Path, target: Path) -> None:
    """The same projector with float16 matrices and convolutions, as most are stored."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "clip")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(
                key, entry.contents(), entry.types[0], entry.types[1] if len(entry.types) > 1 else None
            )
    for tensor in reader.tensors:
        value = np.array(tensor.data)
        writer.add_tensor(tensor.name, value.astype(np.float16) if value.ndim > 1 else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("name", "kind"), list(product(NAMES, EXECUTORS)))
def test_a_projector_of_half_the_bits_sees_nearly_the_same(name: str, kind: str, tmp_path: Path):
    folder = HERE / "projectors" / name
    halved(folder / "mmproj.gguf", tmp_path / "half.gguf")
    checkpoint = open_checkpoint(str(folder / "model.gguf"), tmp_path, tmp_path / "half.gguf")
    arrays = load_file(folder / "reference.safetensors")
    scale = np.float32(32**0.5 if name == "gemma3" else 1.0)
    for number, made in enumerate(encoded(checkpoint, vision_of(checkpoint), kind)):
        wanted = arrays[f"features.{number}"]
        error = np.abs(made.rows * scale - wanted).max() / np.abs(wanted).max()
        assert 0 < error < 0.01
