import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from models.errors import CheckpointError
from models.quantization import Blocks, QuantizationSpec, dequantize
from models.sources.base import Tensor
from models.sources.gguf import GGUFFile
from models.sources.gguf_blocks import as_packed

RANDOM = np.random.default_rng(11)
# Where the half-precision scales of a block are; random bytes would make infinities of them.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def values(path: Path) -> dict[str, Tensor]:
    return {tensor.name: tensor.value for tensor in GGUFFile(path, "m").tensors()}


def dense(value: Tensor) -> np.ndarray:
    return value.astype(np.float32) if isinstance(value, np.ndarray) else dequantize(value)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter writes q and k: the halves of each head interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def k_blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    blocks = RANDOM.integers(0, 256, (rows, columns // 256, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    for start in SCALES[kind]:
        halves = RANDOM.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_types_come_as_they_are(write_gguf, kind: Kind):
    rows = RANDOM.normal(size=(8, 64)).astype(np.float32)
    stored = rows.astype(np.float16) if kind == Kind.F16 else quants.quantize(rows, kind)
    found = values(write_gguf({"blk.0.ffn_up.weight": (stored, kind) if kind == Kind.BF16 else stored}))
    value = found["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(value, np.ndarray)
    assert value.dtype == {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}[kind]
    assert np.allclose(dense(value), rows, atol=0, rtol={Kind.F32: 0, Kind.F16: 2**-10, Kind.BF16: 2**-7}[kind])


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_simple_block_formats_are_read(write_gguf, kind: Kind):
    rows = RANDOM.normal(size=(8, 64)).astype(np.float32)
    blocks = quants.quantize(rows, kind)
    path = write_gguf({"blk.0.ffn_up.weight": (blocks, kind)})
    value = values(path)["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(value, Blocks)
    assert (value.kind, value.shape) == (kind, (8, 64))
    assert np.array_equal(value.rows, blocks)
    assert np.array_equal(dense(value), quants.dequantize(blocks, kind))
    packed = as_packed(value)
    assert (packed is not None) == (kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0))
    assert packed is None or np.allclose(dense(packed), quants.dequantize(blocks, kind), atol=1e-6)
    assert np.abs(dense(value) - rows).max() < 0.5


@pytest.mark.parametrize("kind", sorted(SCALES))
def test_k_quants_come_as_their_blocks(write_gguf, kind: Kind):
    blocks = k_blocks(kind, 6, 512)
    value = values(write_gguf({"blk.0.ffn_up.weight": (blocks, kind)}))["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(value, Blocks)
    assert (value.kind, value.shape) == (kind, (6, 512))
    assert np.array_equal(dense(value), quants.dequantize(blocks, kind))
    assert np.isfinite(dense(value)).all()


def test_the_headers_say_what_loading_gives(write_gguf):
    rows = RANDOM.normal(size=(8, 64)).astype(np.float32)
    tensors = {
        "blk.0.ffn_up.weight": (quants.quantize(rows, Kind.Q8_0), Kind.Q8_0),
        "blk.0.ffn_gate.weight": (quants.quantize(rows, Kind.Q4_0), Kind.Q4_0),
        "blk.0.ffn_down.weight": (k_blocks(Kind.Q6_K, 4, 256), Kind.Q6_K),
        "output_norm.weight": np.ones(64, np.float32),
        "rope_freqs.weight": np.ones(8, np.float32),
    }
    checkpoint = GGUFFile(write_gguf(tensors), "m")
    infos = {info.name: info for info in checkpoint.infos()}
    specs = {"Q8_0": QuantizationSpec("affine", 8, 32), "Q4_0": QuantizationSpec("affine", 4, 32), "Q6_K": None}
    for tensor in checkpoint.tensors():
        info, value = infos.pop(tensor.name), tensor.value
        assert info.shape == value.shape
        if isinstance(value, Blocks):
            assert (info.kind, info.nbytes, info.quantized) == (value.kind.name, value.rows.nbytes, True)
            assert info.spec == specs.pop(info.kind)
            packed = as_packed(value)
            assert info.spec == (packed.spec if packed else None)
        else:
            assert (info.kind, info.nbytes, info.quantized, info.spec) == ("F32", value.nbytes, False, None)
    assert not infos
    assert not specs


def test_a_quantised_vector_comes_dense(write_gguf):
    blocks = quants.quantize(RANDOM.normal(size=(1, 64)).astype(np.float32), Kind.Q8_0)
    checkpoint = GGUFFile(write_gguf({"output_norm.weight": (blocks.reshape(-1), Kind.Q8_0)}), "m")
    info = next(info for info in checkpoint.infos() if info.name == "model.norm.weight")
    assert (info.shape, info.quantized, info.kind, info.nbytes) == ((64,), False, "Q8_0", 68)
    value = next(tensor.value for tensor in checkpoint.tensors() if tensor.name == "model.norm.weight")
    assert isinstance(value, np.ndarray)
    assert np.array_equal(value, quants.dequantize(blocks, Kind.Q8_0)[0])


def test_a_matrix_of_one_row_may_have_lost_an_axis(write_gguf):
    row = np.arange(64, dtype=np.float32)
    counts = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 8}
    counts |= {"expert_shared_feed_forward_length": 8}
    said = {f"qwen2moe.{key}": value for key, value in counts.items()}
    for value in (row, row[None]):
        path = write_gguf({"blk.0.ffn_gate_inp_shexp.weight": value}, said, arch="qwen2moe")
        name = "model.layers.0.mlp.shared_expert_gate.weight"
        assert next(info for info in GGUFFile(path, "m").infos() if info.name == name).shape == (1, 64)
        assert np.array_equal(values(path)[name], row[None])


def test_nothing_is_read_before_it_is_asked_for(write_gguf):
    path = write_gguf({"blk.0.ffn_up.weight": np.ones((8, 64), np.float32)})
    tensors = {tensor.name: tensor for tensor in GGUFFile(path, "m").tensors()}
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight: cannot be read"):
        _ = tensors["model.layers.0.mlp.up_proj.weight"].value


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_the_order_of_q_and_k_rows_is_undone_for_llama(write_gguf, kind: Kind):
    q, k = RANDOM.normal(size=(64, 64)).astype(np.float32), RANDOM.normal(size=(32, 64)).astype(np.float32)
    q_bias = RANDOM.normal(size=64).astype(np.float32)
    tensors = {
        "blk.0.attn_q.weight": (quants.quantize(permuted(q, 4), kind), kind),
        "blk.0.attn_k.weight": (quants.quantize(permuted(k, 2), kind), kind),
        "blk.0.attn_v.weight": (quants.quantize(k, kind), kind),
        "blk.0.attn_q.bias": permuted(q_bias, 4),
    }
    found = values(write_gguf(tensors))
    layer = "model.layers.0.self_attn"
    # A row of blocks is quantised by itself, so the order does not change what it holds.
    assert np.allclose(
        dense(found[f"{layer}.q_proj.weight"]), quants.dequantize(quants.quantize(q, kind), kind), atol=1e-6
    )
    assert np.allclose(
        dense(found[f"{layer}.k_proj.weight"]), quants.dequantize(quants.quantize(k, kind), kind), atol=1e-6
    )
    assert np.allclose(
        dense(found[f"{layer}.v_proj.weight"]), quants.dequantize(quants.quantize(k, kind), kind), atol=1e-6
    )
    assert np.array_equal(dense(found[f"{layer}.q_proj.bias"]), q_bias)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_the_rows_of_qwen_stay_as_they_are(write_gguf, arch: str):
    q = RANDOM.normal(size=(64, 64)).astype(np.float32)
    found = values(write_gguf({"blk.0.attn_q.weight": q}, arch=arch))
    assert np.array_equal(dense(found["model.layers.0.self_attn.q_proj.weight"]), q)


def test_the_norms_of_a_gemma_are_stored_with_1_added(write_gguf):
    weight = RANDOM.normal(size=64).astype(np.float32)
    tensors = {"output_norm.weight": weight + 1, "blk.0.attn_q_norm.weight": weight + 1, "blk.0.attn_q.bias": weight}
    found = values(write_gguf(tensors, arch="gemma3"))
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        np.testing.assert_allclose(dense(found[name]), weight, atol=1e-6)


def test_rows_that_do_not_divide_into_heads_are_refused(write_gguf):
    path = write_gguf({"blk.0.attn_q.weight": np.ones((60, 64), np.float32)})
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q\.weight: 60 rows"):
        values(path)


def test_a_type_that_is_not_read_is_refused_with_the_alternatives(write_gguf):
    blocks = np.zeros((2, 66), np.uint8)
    path = write_gguf({"blk.0.ffn_up.weight": (blocks, Kind.IQ2_XXS)})
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight: its type IQ2_XXS.*Q4_K"):
        list(GGUFFile(path, "m").infos())


def test_a_zero_point_beyond_float16_is_read_and_not_repacked(write_gguf):
    blocks = quants.quantize(np.full((1, 32), 1e5, np.float32), Kind.Q8_0)
    value = values(write_gguf({"blk.0.ffn_up.weight": (blocks, Kind.Q8_0)}))["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(value, Blocks)
    assert as_packed(value) is None
    assert np.allclose(dequantize(value), 1e5, rtol=1e-3)


def test_it_reads_as_the_folder_it_might_have_been(write_gguf):
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    checkpoint = GGUFFile(write_gguf({}, vocabulary), "m")
    assert json.loads(checkpoint.read("config.json") or b"") == checkpoint.config
    assert json.loads(checkpoint.read("tokenizer.json") or b"")["model"]["vocab"]["ab"] == 3
    assert checkpoint.read("tokenizer_config.json") is not None
    assert checkpoint.read("preprocessor_config.json") is None


def test_a_component_is_refused(write_gguf):
    with pytest.raises(CheckpointError, match="no component 'vae'"):
        list(GGUFFile(write_gguf({}), "m").infos("vae"))


def test_a_file_cut_short_after_it_was_opened_is_refused(write_gguf):
    path = write_gguf({"blk.0.ffn_up.weight": np.ones((64, 64), np.float32)})
    checkpoint = GGUFFile(path, "m")
    assert checkpoint.nbytes == 64 * 64 * 4 + 10 * 64 * 4
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_up\.weight: the file has been cut short"):
        [tensor.value for tensor in checkpoint.tensors()]


def split(write_gguf, count: int = 2) -> list[Path]:
    parts = [{"output_norm.weight": np.ones(64, np.float32)}, {"blk.0.ffn_norm.weight": np.ones(64, np.float32)}]
    return [
        write_gguf(
            ({"token_embd.weight": None} if number else {}) | part,
            {"split.count": count, "split.no": number},
            name=f"m-{number + 1:05}-of-00002.gguf",
        )
        for number, part in enumerate(parts)
    ]


def test_any_part_of_a_split_model_stands_for_all(write_gguf):
    for path in split(write_gguf):
        names = {info.name: Path(info.file).name for info in GGUFFile(path, "m").infos()}
        assert names == {
            "model.embed_tokens.weight": "m-00001-of-00002.gguf",
            "model.norm.weight": "m-00001-of-00002.gguf",
            "model.layers.0.post_attention_layernorm.weight": "m-00002-of-00002.gguf",
        }


def test_a_part_that_is_not_there_is_named(write_gguf):
    first, second = split(write_gguf)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf: cannot be read: No such file"):
        list(GGUFFile(first, "m").infos())


def test_a_part_by_another_name_asks_to_be_merged(write_gguf):
    first, _ = split(write_gguf)
    other = first.rename(first.with_name("blob"))
    with pytest.raises(CheckpointError, match=r"one of 2 parts.*merge"):
        list(GGUFFile(other, "m").infos())
