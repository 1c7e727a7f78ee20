"""Writes the model in the forms that contestants read: `python -m tests.bench.export WHAT GGUF TARGET [LENGTH…]`."""

import argparse
import json
import random
from pathlib import Path

import numpy as np

from tests.bench.preparation import PROMPT, SERVING_TEXTS, WARMUP


def export_folder(source: Path, target: Path) -> None:
    """A Hugging Face folder with float32 weights, as mlx_lm reads it."""
    from safetensors.numpy import save_file

    from models.checkpoint import open_checkpoint
    from models.quantization import dequantize

    checkpoint = open_checkpoint(str(source), Path())
    target.mkdir()
    tensors = {
        name: np.ascontiguousarray(
            value.astype(np.float32) if isinstance(value, np.ndarray) else dequantize(value), np.float32
        )
        for name, value in ((tensor.name, tensor.value) for tensor in checkpoint.tensors())
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "mlx"})
    config = {**checkpoint.config, "torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "generation_config.json"):
        (target / name).write_bytes(checkpoint.read(name) or b"{}")
    tokenizer = json.loads(checkpoint.read("tokenizer_config.json") or b"{}")
    # By `model_type` transformers would take Llama's own tokenizer, which this is not.
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def export_gguf(source: Path, target: Path) -> None:
    """The same GGUF file with every tensor in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_prompts(source: Path, target: Path, lengths: list[int]) -> None:
    """For each length, that many tokens of the prompt, and the text that is exactly these tokens."""
    from models.checkpoint import open_checkpoint
    from models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(str(source), Path()))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=tokenizer.adds_bos)

    text = PROMPT.read_text().rstrip("\n")
    prompts = {"warmup": {"text": WARMUP, "ids": encode(WARMUP)}}
    for length in lengths:
        ids = encode(text)[:length]
        cut = b"".join(map(tokenizer.piece, ids)).decode()
        if len(ids) < length or encode(cut) != ids:
            raise SystemExit(f"{PROMPT.name} cannot be cut to {length} tokens: it has {len(encode(text))}")
        prompts[str(length)] = {"text": cut, "ids": ids}
    target.write_text(json.dumps(prompts))


def export_serving_prompts(source: Path, target: Path, seeds: int, lengths: list[int]) -> None:
    """For each length, `seeds` texts of that many tokens that differ from the first token on."""
    from models.checkpoint import open_checkpoint
    from models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(str(source), Path()))
    sentences = PROMPT.read_text().replace("\n", " ").split(". ")

    def text(seed: int, length: int) -> str:
        order, parts = random.Random(seed * 1_000_003 + length), [f"{chr(65 + seed % 26)}{seed}, {length}: "]
        while len(ids := tokenizer.encode("".join(parts), add_bos=tokenizer.adds_bos)) < length:
            parts += [f"{sentence}. " for sentence in order.sample(sentences, len(sentences))]
        return b"".join(map(tokenizer.piece, ids[:length])).decode()

    made = {length: [text(seed, length) for seed in range(seeds)] for length in lengths}
    target.write_text(json.dumps(made))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("folder", "gguf", "prompts", "serving"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("lengths", type=int, nargs="*")
    parser.add_argument("--texts", type=int, default=SERVING_TEXTS, help="of each length, for serving")
    asked = parser.parse_args()
    match asked.what:
        case "folder":
            export_folder(asked.source, asked.target)
        case "gguf":
            export_gguf(asked.source, asked.target)
        case "prompts":
            export_prompts(asked.source, asked.target, asked.lengths)
        case "serving":
            export_serving_prompts(asked.source, asked.target, asked.texts, asked.lengths)


if __name__ == "__main__":
    main()
