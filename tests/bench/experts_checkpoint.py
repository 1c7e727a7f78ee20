"""Checkpoints of two mixtures with random weights: experts in MLX's 4 bits, and in mxfp4 as gpt-oss has them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.bench.large_checkpoint import GROUP, Arrays, matrix, write_tokenizer


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sizes of a mixture of experts, and how its experts are stored."""

    name: str
    hidden: int
    width: int
    experts: int
    picked: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int = 40_960

    @property
    def is_gpt_oss(self) -> bool:
        return self.name == "gpt-oss"

    def config(self) -> dict[str, object]:
        config: dict[str, object] = {
            "architectures": ["GptOssForCausalLM" if self.is_gpt_oss else "Qwen3MoeForCausalLM"],
            "model_type": "gpt_oss" if self.is_gpt_oss else "qwen3_moe",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.picked,
            "norm_topk_prob": True,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attention_bias": self.is_gpt_oss,
        }
        if self.is_gpt_oss:
            return config | {"quantization_config": {"quant_method": "mxfp4"}}
        return config | {"quantization": {"group_size": GROUP, "bits": 4, "mode": "affine"}}


SHAPES = (
    Mixture("8-of-64", hidden=2048, width=1024, experts=64, picked=8, layers=8, heads=16, kv_heads=4, head=128),
    # The 20B's, but for the number of layers and words.
    Mixture("gpt-oss", hidden=2880, width=2880, experts=32, picked=4, layers=4, heads=64, kv_heads=8, head=64),
)


def write(folder: Path, shape: Mixture) -> None:
    """Write the folder; a shard is a layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    write_tokenizer(folder)
    for number, arrays in enumerate(_shards(shape)):
        save_file(arrays, folder / f"model-{number + 1:05}-of-{shape.layers + 1:05}.safetensors")


def _shards(shape: Mixture) -> Iterator[Arrays]:
    draw = np.random.default_rng(0)
    ends = ("model.embed_tokens", "lm_head")
    whole: Arrays = {"model.norm.weight": np.ones(shape.hidden, np.float32)}
    for name in ends:
        whole |= _plain(shape, name, (shape.vocabulary, shape.hidden), draw)
    yield whole
    for layer in range(shape.layers):
        yield _layer(shape, f"model.layers.{layer}", draw)


def _layer(shape: Mixture, name: str, draw: np.random.Generator) -> Arrays:
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    norms = ("input_layernorm", "post_attention_layernorm")
    arrays: Arrays = {f"{name}.{norm}.weight": np.ones(shape.hidden, np.float32) for norm in norms}
    for part, size in (("q", queries), ("k", keys), ("v", keys)):
        arrays |= _plain(shape, f"{name}.self_attn.{part}_proj", (size, shape.hidden), draw)
    arrays |= _plain(shape, f"{name}.self_attn.o_proj", (shape.hidden, queries), draw)
    if shape.is_gpt_oss:
        return arrays | _mxfp4_experts(shape, name, draw)
    for part in ("q", "k"):
        arrays[f"{name}.self_attn.{part}_norm.weight"] = np.ones(shape.head, np.float32)
    arrays |= matrix(f"{name}.mlp.gate", (shape.experts, shape.hidden), draw)
    for part in ("gate", "up", "down"):
        size = (shape.hidden, shape.width) if part == "down" else (shape.width, shape.hidden)
        arrays |= _stack(f"{name}.mlp.switch_mlp.{part}_proj", shape.experts, size, draw)
    return arrays


def _stack(name: str, count: int, size: tuple[int, int], draw: np.random.Generator) -> Arrays:
    flat = matrix(name, (count * size[0], size[1]), draw)
    return {key: value.reshape(count, size[0], -1) for key, value in flat.items()}


def _plain(shape: Mixture, name: str, size: tuple[int, int], draw: np.random.Generator) -> Arrays:
    """Of gpt-oss all but the experts is bfloat16, and projections have biases; in float16 here."""
    if not shape.is_gpt_oss:
        return matrix(name, size, draw)
    values = draw.standard_normal(size, np.float32) * np.float32(0.02)
    arrays: Arrays = {f"{name}.weight": values.astype(np.float16)}
    if "self_attn" in name:
        arrays[f"{name}.bias"] = np.zeros(size[0], np.float16)
    return arrays


def _mxfp4_experts(shape: Mixture, name: str, draw: np.random.Generator) -> Arrays:
    mlp = f"{name}.mlp"
    arrays: Arrays = {
        f"{name}.self_attn.sinks": np.zeros(shape.heads, np.float32),
        f"{mlp}.router.weight": draw.standard_normal((shape.experts, shape.hidden), np.float32),
        f"{mlp}.router.bias": np.zeros(shape.experts, np.float32),
    }
    for part, rows, width in (("gate_up", 2 * shape.width, shape.hidden), ("down", shape.hidden, shape.width)):
        blocks = (shape.experts, rows, width // 32)
        arrays[f"{mlp}.experts.{part}_proj_blocks"] = draw.integers(0, 256, (*blocks, 16), np.uint8)
        arrays[f"{mlp}.experts.{part}_proj_scales"] = draw.integers(118, 121, blocks, np.uint8)
        arrays[f"{mlp}.experts.{part}_proj_bias"] = np.zeros((shape.experts, rows), np.float32)
    return arrays
