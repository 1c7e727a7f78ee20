"""Which projector goes with a GGUF file, and what becomes of one that does not."""

import logging
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.quantization import Blocks, dequantize
from models.vision import family_of
from tests.parity_vision.rows import HERE

PROJECTORS = HERE / "projectors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of its own with Gemma's text model."""
    shutil.copy(PROJECTORS / "gemma3" / "model.gguf", tmp_path)
    return tmp_path


def sees(path: Path, projector: Path | None = None) -> bool:
    return "vision_config" in open_checkpoint(str(path), path.parent, projector).config


def rewritten(source: Path, target: Path, kind: str | None = None, *, quantized: str = "") -> None:
    """A projector file of another type, or with some of its matrices in blocks."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "clip")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = kind if kind and key == "clip.projector_type" else entry.contents()
            writer.add_key_value(key, value, entry.types[0], entry.types[1] if len(entry.types) > 1 else None)
    for tensor in reader.tensors:
        value = np.array(tensor.data)
        if quantized and quantized in tensor.name and tensor.name.endswith(".weight"):
            wide = np.tile(value, (1, 4))[:, :64]
            blocks = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quants.quantize(wide, blocks), raw_dtype=blocks)
        else:
            writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_the_older_converter(source: Path, target: Path) -> None:
    """Qwen2-VL's projector with an MLP's matrices by each other's names, no width of it, and idle positions."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "clip")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = 0 if key == "clip.vision.feed_forward_length" else entry.contents()
            writer.add_key_value(key, value, entry.types[0], entry.types[1] if len(entry.types) > 1 else None)
    crossed = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    for tensor in reader.tensors:
        start, dot, rest = tensor.name.rpartition("ffn_")
        stem, _, kind = rest.partition(".")
        name = f"{start}{crossed[dot + stem]}.{kind}" if dot else tensor.name
        writer.add_tensor(name, np.array(tensor.data))
    writer.add_tensor("v.position_embd.weight", np.zeros((10, 10), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_text_model_alone_takes_text(folder: Path):
    assert not sees(folder / "model.gguf")


def test_the_only_projector_beside_a_model_is_taken(folder: Path):
    shutil.copy(PROJECTORS / "gemma3" / "mmproj.gguf", folder / "some-MMPROJ-f16.gguf")
    assert sees(folder / "model.gguf")


def test_of_two_projectors_beside_a_model_none_is_taken(folder: Path):
    for name in ("mmproj-f16.gguf", "mmproj-f32.gguf"):
        shutil.copy(PROJECTORS / "gemma3" / "mmproj.gguf", folder / name)
    assert not sees(folder / "model.gguf")
    assert sees(folder / "model.gguf", folder / "mmproj-f32.gguf")


def test_another_models_projector_beside_is_left_out_and_named_it_is_refused(folder: Path, caplog):
    other = shutil.copy(PROJECTORS / "llava" / "mmproj.gguf", folder / "mmproj.gguf")
    assert not sees(folder / "model.gguf")
    assert "is the projector of another model" in caplog.text
    with pytest.raises(CheckpointError, match="is the projector of another model: it is for llama or qwen2"):
        open_checkpoint(str(folder / "model.gguf"), folder, Path(other))


def test_of_an_unknown_projector_the_log_says_the_type(folder: Path, caplog):
    rewritten(PROJECTORS / "gemma3" / "mmproj.gguf", folder / "p.gguf", "resampler")
    assert not sees(folder / "model.gguf", folder / "p.gguf")
    assert "a projector of type 'resampler' is not supported" in caplog.text


def test_a_text_model_is_no_projector(folder: Path, caplog):
    assert not sees(folder / "model.gguf", PROJECTORS / "llava" / "model.gguf")
    assert "a projector of type 'llama' is not supported" in caplog.text


def test_a_projector_goes_with_a_gguf_file_alone():
    with pytest.raises(CheckpointError, match="a projector file goes with a GGUF file alone"):
        open_checkpoint(str(HERE / "gemma3"), HERE, PROJECTORS / "gemma3" / "mmproj.gguf")


def test_a_projector_that_is_not_there_is_an_error(folder: Path):
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot be read"):
        open_checkpoint(str(folder / "model.gguf"), folder, folder / "none.gguf")


def test_a_tensor_that_no_layout_knows_is_named(folder: Path):
    data = (PROJECTORS / "gemma3" / "mmproj.gguf").read_bytes()
    (folder / "mmproj.gguf").write_bytes(data.replace(b"v.blk.1.ln2.bias", b"v.blk.1.ln9.bias"))
    checkpoint = open_checkpoint(str(folder / "model.gguf"), folder)
    with pytest.raises(CheckpointError, match=r"v\.blk\.1\.ln9\.bias: the projector has no such tensor"):
        list(checkpoint.infos())


def test_a_piece_that_is_missing_is_named(tmp_path: Path):
    shutil.copy(PROJECTORS / "qwen2_5_vl" / "model.gguf", tmp_path)
    data = (PROJECTORS / "qwen2_5_vl" / "mmproj.gguf").read_bytes()
    (tmp_path / "mmproj.gguf").write_bytes(data.replace(b"v.blk.1.attn_k.weight", b"v.blk.9.attn_k.weight"))
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"), tmp_path)
    with pytest.raises(CheckpointError, match=r"v\.blk\.1\.attn_k\.weight: is missing"):
        list(checkpoint.infos())


def test_what_an_older_converter_made_of_qwen2_vl_is_the_same_tower(tmp_path: Path):
    folder = PROJECTORS / "qwen2_vl"
    of_the_older_converter(folder / "mmproj.gguf", tmp_path / "old.gguf")
    old = open_checkpoint(str(folder / "model.gguf"), tmp_path, tmp_path / "old.gguf")
    new = open_checkpoint(str(folder / "model.gguf"), tmp_path, folder / "mmproj.gguf")
    assert old.config == new.config
    found = {each.name: np.asarray(each.value) for each in old.tensors()}
    for each in new.tensors():
        np.testing.assert_array_equal(found.pop(each.name), np.asarray(each.value), err_msg=each.name)
    assert not found


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3_5_vl"])
def test_the_projector_of_another_qwen_is_refused(name: str, tmp_path: Path):
    other = {"qwen2_vl": "qwen3_vl", "qwen3_vl": "qwen2_vl", "qwen3_5_vl": "qwen2_5_vl"}[name]
    with pytest.raises(CheckpointError, match="is the projector of another model: it is for qwen"):
        open_checkpoint(str(PROJECTORS / name / "model.gguf"), tmp_path, PROJECTORS / other / "mmproj.gguf")


def test_rows_of_several_depths_are_refused_where_the_decoder_takes_none(tmp_path: Path):
    """A Qwen3-VL's projector has the type of a Qwen3.5's, and may have the width."""
    projector = PROJECTORS / "qwen3_vl" / "mmproj.gguf"
    checkpoint = open_checkpoint(str(PROJECTORS / "qwen3_5_vl" / "model.gguf"), tmp_path, projector)
    family = family_of(checkpoint)
    assert family is not None
    with pytest.raises(CheckpointError, match=r"deepstack_visual_indexes \[0, 2\] is not supported"):
        family.build(checkpoint, lambda _: [0])
    projector = PROJECTORS / "qwen3_5_vl" / "mmproj.gguf"
    checkpoint = open_checkpoint(str(PROJECTORS / "qwen3_vl" / "model.gguf"), tmp_path, projector)
    with pytest.raises(CheckpointError, match="the decoder takes 2 deepstack levels, and its tower has 0"):
        build_model(checkpoint.config)


def test_pieces_in_blocks_stay_in_blocks(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    shutil.copy(PROJECTORS / "qwen2_5_vl" / "model.gguf", tmp_path)
    rewritten(PROJECTORS / "qwen2_5_vl" / "mmproj.gguf", tmp_path / "mmproj.gguf", quantized=".attn_")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"), tmp_path)
    name = "visual.blocks.1.attn.qkv.weight"
    info = next(each for each in checkpoint.infos() if each.name == name)
    value = next(each for each in checkpoint.tensors() if each.name == name).value
    assert isinstance(value, Blocks)
    assert (info.shape, info.quantized, info.kind) == ((72, 64), True, "Q8_0")
    dense = next(
        each
        for each in open_checkpoint(str(PROJECTORS / "qwen2_5_vl" / "model.gguf"), tmp_path).tensors()
        if each.name == name
    )
    wide = np.tile(np.asarray(dense.value), (1, 4))[:, :64]
    np.testing.assert_allclose(dequantize(value), wide, atol=0.05)
    assert "sees by the projector" in caplog.text
