"""Writes tiny models that say what a test wants: a token has one successor, whatever was before it.

They are a fixture's architecture without its layers' weights, so that a token's embedding goes through to the head, and
the head answers it with the embedding's own row of the token that follows. Their vocabulary is a byte a token, besides
what a family has.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

CONTEXT = 4096
BYTES = sorted(ByteLevel.alphabet())


@dataclass(frozen=True)
class Vocabulary:
    """The family's special tokens, then the bytes, then words that are a token each."""

    special: Sequence[str]
    eos: Sequence[str]
    """Where its files say that it ends: of a GGUF file, the first."""
    bos: str = ""
    words: Sequence[str] = ()

    @property
    def tokens(self):
        return [*self.special, *BYTES, *self.words]

    def ids(self, pieces):
        return [self.tokens.index(piece) for piece in pieces]

    def head(self, embedding, says):
        """The rows that let each of the pieces `says` follow the one before it. Shapes: (V, D) both ways."""
        rows = np.zeros_like(embedding)
        said = self.ids(says)
        for before, after in pairwise(said):
            assert not rows[after].any(), f"{self.tokens[after]!r} would follow two tokens"
            rows[after] = embedding[before]
        return rows

    def count(self, prompt):
        """How many tokens a prompt has, with one BOS where the family has any."""
        tokens = self.tokenizer().encode(prompt, add_special_tokens=False).tokens
        return len(tokens) + bool(self.bos and tokens[0] != self.bos)

    def embedding(self, width):
        """Random directions. Shape: (V, width)."""
        rows = np.random.default_rng(7).normal(size=(len(self.tokens), width))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def tokenizer(self):
        model = BPE(vocab={token: number for number, token in enumerate(self.tokens)}, merges=[])
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = ByteLevelDecoder()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in self.special])
        return tokenizer


def write_folder(base, target, vocabulary, says, chat_template):
    """From a parity folder a Hugging Face folder."""
    shutil.copytree(base, target)
    tensors = {name: _emptied(name, value) for name, value in load_file(target / "model.safetensors").items()}
    (embedded,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    embedding = vocabulary.embedding(tensors[embedded].shape[1])
    prefix = "language_model." if embedded.startswith("language_model.") else ""
    tensors |= {embedded: embedding, f"{prefix}lm_head.weight": vocabulary.head(embedding, says)}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    stated = json.loads((target / "config.json").read_text())
    stated |= {"vocab_size": len(embedding), "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
    stated["eos_token_id"] = vocabulary.ids(vocabulary.eos[:1])[0]
    (target / "config.json").write_text(json.dumps(stated))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": vocabulary.ids(vocabulary.eos)}))
    vocabulary.tokenizer().save(str(target / "tokenizer.json"))
    written = {"chat_template": chat_template, "eos_token": vocabulary.eos[0], "add_bos_token": bool(vocabulary.bos)}
    (target / "tokenizer_config.json").write_text(json.dumps(written | {"bos_token": vocabulary.bos or None}))
    return target


def write_gguf(base, target, vocabulary, says, chat_template):
    """From a parity file a GGUF file."""
    reader = gguf.GGUFReader(base)
    family = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, family)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "tokenizer.")) and "vocab_size" not in key:
            value = CONTEXT if key == f"{family}.context_length" else field.contents()
            writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    _write_vocabulary(writer, vocabulary, chat_template)
    tensors = {tensor.name: _emptied(tensor.name, tensor.data) for tensor in reader.tensors}
    embedding = vocabulary.embedding(tensors["token_embd.weight"].shape[1])
    tensors |= {"token_embd.weight": embedding, "output.weight": vocabulary.head(embedding, says)}
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _write_vocabulary(writer, vocabulary, chat_template):
    tokens, special = vocabulary.tokens, set(vocabulary.special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token in special] for token in tokens])
    # Some readers want one.
    writer.add_token_merges(["Ġ Ġ"])
    if vocabulary.bos:
        writer.add_bos_token_id(tokens.index(vocabulary.bos))
    writer.add_eos_token_id(tokens.index(vocabulary.eos[0]))
    writer.add_add_bos_token(bool(vocabulary.bos))
    if chat_template:
        writer.add_chat_template(chat_template)


def _emptied(name, value):
    """The weights of layers are 0, but for norms."""
    layer = "layers." in name or name.startswith("blk.")
    return np.zeros_like(value) if layer and "norm" not in name and "scalar" not in name else np.array(value)
