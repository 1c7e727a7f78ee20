"""Small random checkpoints in memory, dense or quantised, for tests of executors."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gguf
import numpy as np

from models.arch import build_model
from models.ops import weights_in
from models.quantization import Blocks, Packed, QuantizationSpec, Tensor
from models.sources.base import Mapped, NamedTensor, TensorInfo
from models.sources.gguf_blocks import REPACKED

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SHARED: Mapping[str, Any] = CONFIG | {
    "architectures": ["Gemma4ForCausalLM"],
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 32,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
"""A Gemma 4 whose last two layers look at earlier ones' state, with heads of two sizes and another number of each."""
KINDS = ("F32", "Q4_0", "Q4_1", "Q8_0", "Q5_1", "Q6_K", "Q4_K", "affine4", "affine8", "mxfp4", "mxfp4 apart")
_SPECS = {
    "affine4": QuantizationSpec("affine", 4, 64),
    "affine8": QuantizationSpec("affine", 8, 64),
    "mxfp4": QuantizationSpec("mxfp4", 4, 32),
    # With one exponent that is far from its neighbour's.
    "mxfp4 apart": QuantizationSpec("mxfp4", 4, 32),
    "mxfp8": QuantizationSpec("mxfp8", 8, 32),
}
# MLX's layout holds these exactly.
_REPACKED = {kind.name: spec for kind, spec in REPACKED.items()}


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """Implements `Checkpoint`: matrices of one kind, vectors in float32."""

    kind: str
    config: Mapping[str, Any]
    names: tuple[str, ...] = ()
    reference: str = "random"

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos())

    def read(self, name: str) -> bytes | None:
        return None

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        for name, shape in self._shapes():
            kind = self.kind if len(shape) == 2 else "F32"
            spec = _SPECS.get(kind) or _REPACKED.get(kind)
            size, quantized = int(np.prod(shape)), kind != "F32"
            info = TensorInfo(name, shape, size, quantized=quantized, file="f", kind=_named(kind), spec=spec)
            is_mxfp4 = info.kind == "mxfp4"
            yield replace(info, mapped=partial(self._mapped, name, shape)) if is_mxfp4 else info

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        for name, shape in self._shapes():
            yield NamedTensor(name, lambda name=name, shape=shape: self.value(name, shape), "f")

    def value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        dense = rng.normal(0, 1.2 / shape[1] ** 0.5, shape).astype(np.float32)
        return dense if self.kind == "F32" or len(shape) != 2 else quantized(dense, self.kind, rng)

    def _mapped(self, name: str, shape: tuple[int, ...]) -> Mapped:
        return Mapped(self.value(name, shape))

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for weight in weights_in(build_model(self.config).weights):
            yield from weight.tensors()


def _named(kind: str) -> str:
    return _SPECS[kind].mode if kind in _SPECS else kind


def quantized(dense: np.ndarray, kind: str, rng: np.random.Generator) -> Packed | Blocks:
    """A matrix of that kind near `dense`; of the K-quants, whose writer the library lacks, any of such a size."""
    if kind in _SPECS:
        made = packed(dense, _SPECS[kind], rng)
        made.scales[0, 0] -= 9 * kind.endswith("apart")
        return made
    block = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return Blocks(gguf.quantize(dense, block), block, dense.shape)
    values, nbytes = gguf.GGML_QUANT_SIZES[block]
    rows = rng.integers(0, 256, (len(dense), dense.shape[1] // values, nbytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.0002).tobytes(), np.uint8)
    places = (208,) if kind == "Q6_K" else (0, 2)
    for place in places:
        rows[:, :, place : place + 2] = scale
    return Blocks(rows.reshape(len(dense), -1), block, dense.shape)


def packed(dense: np.ndarray, spec: QuantizationSpec, rng: np.random.Generator) -> Packed:
    """A matrix in MLX's layout with random codes and scales of the right size."""
    n, k = dense.shape
    words = rng.integers(0, 2**32, (n, k * spec.bits // 32), dtype=np.uint64).astype(np.uint32)
    groups = (n, k // spec.group_size)
    if spec.mode == "mxfp8":
        # Values below 2; other codes may be no numbers.
        words &= np.uint32(0xB7B7B7B7)
    if spec.mode != "affine":
        return Packed(words, rng.integers(120, 123, groups, dtype=np.uint8), None, spec)
    scales = (rng.uniform(0.5, 1.5, groups) * 0.3 / 2**spec.bits).astype(np.float16)
    return Packed(words, scales, (-scales.astype(np.float32) * 2 ** (spec.bits - 1)).astype(np.float16), spec)
