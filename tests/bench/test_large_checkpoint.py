"""The large checkpoint in small: what is written can be read, cut off and predicted."""

from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.quantization import dequantize
from models.tokenizer import load_tokenizer
from tests.bench.bare import BareRows, options
from tests.bench.large_checkpoint import SCALE, Shape, write
from tests.bench.memory import FirstLayers

SMALL = Shape(hidden=128, intermediate=256, layers=3, heads=4, kv_heads=2, head=32, vocabulary=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("large") / "model"
    write(place, SMALL)
    return place


def test_values_are_about_zero_and_small(folder: Path):
    checkpoint = open_checkpoint(str(folder), Path())
    value = next(tensor.value for tensor in checkpoint.tensors() if tensor.name == "lm_head.weight")
    values = dequantize(value)
    assert values.shape == (512, 128)
    assert abs(values.mean()) < SCALE
    assert np.abs(values).max() <= 12.5 * SCALE


def test_it_has_a_shard_a_layer_and_one_for_each_end(folder: Path):
    assert len(list(folder.glob("*.safetensors"))) == SMALL.layers + 2


def test_its_tokenizer_knows_bytes(folder: Path):
    tokenizer = load_tokenizer(open_checkpoint(str(folder), Path()))
    assert len(tokenizer.encode("so it is", add_bos=False)) == 8


@pytest.mark.parametrize("layers", [1, 3])
def test_its_first_layers_are_a_model_with_finite_logits(folder: Path, layers: int):
    checkpoint = FirstLayers(open_checkpoint(str(folder), Path()), layers)
    rows = BareRows(checkpoint, options(float32=False, rows=1, row_tokens=16, threads=1))
    assert 0 <= rows.prefill(0, 0, [3, 4, 5]) < SMALL.vocabulary
    assert np.isfinite(rows.all_logits([3, 4, 5])).all()
    assert rows.weight_bytes > rows.table_bytes > 0
