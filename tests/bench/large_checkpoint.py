"""A checkpoint of a large model's shape with random 4-bit weights, written shard by shard."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GROUP = 64
CODES_PER_WORD = 8
SCALE = 0.02 / 8
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's dimensions: those of Llama 3 8B."""

    hidden: int = 4096
    intermediate: int = 14_336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128_256

    def config(self) -> dict[str, object]:
        quantization = {"group_size": GROUP, "bits": 4, "mode": "affine"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "quantization": quantization,
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's, by the end of its name."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        return {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


def write(folder: Path, shape: Shape) -> None:
    """Write the folder; a shard is a layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    write_tokenizer(folder)
    placed, total = {}, 0
    for number, arrays in enumerate(_shards(shape)):
        file = f"model-{number + 1:05}-of-{shape.layers + 2:05}.safetensors"
        save_file(arrays, folder / file)
        placed |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(shape: Shape) -> Iterator[Arrays]:
    draw = np.random.default_rng(0)
    yield matrix("model.embed_tokens", (shape.vocabulary, shape.hidden), draw)
    for layer in range(shape.layers):
        arrays = {}
        for name, size in shape.matrices().items():
            arrays |= matrix(f"model.layers.{layer}.{name}", size, draw)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{layer}.{norm}.weight"] = np.ones(shape.hidden, np.float16)
        yield arrays
    norm = {"model.norm.weight": np.ones(shape.hidden, np.float16)}
    yield norm | matrix("lm_head", (shape.vocabulary, shape.hidden), draw)


def matrix(name: str, size: tuple[int, int], draw: np.random.Generator) -> Arrays:
    """MLX's affine layout; the values are centred on zero but for half a code."""
    rows, width = size
    codes = draw.integers(0, 2**32, (rows, width // CODES_PER_WORD), np.uint32)
    scales = (SCALE * draw.uniform(0.5, 1.5, (rows, width // GROUP))).astype(np.float16)
    return {f"{name}.weight": codes, f"{name}.scales": scales, f"{name}.biases": np.float16(-8) * scales}


def write_tokenizer(folder: Path) -> None:
    """Bytes, and nothing else: the words of this model mean nothing anyway."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
