"""Tokenizers as Hugging Face folders and Ollama stores bring them."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from models.errors import TokenizerError
from models.tokenizer import Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
REFERENCE = json.loads((FIXTURES / "reference.json").read_text())
BYTE_LEVEL = json.loads((FIXTURES / "byte_level.json").read_text())
SENTENCEPIECE = json.loads((FIXTURES / "sentencepiece.json").read_text())
TEXTS = REFERENCE["texts"] + REFERENCE["special_texts"]
END, START, STOP = 0, 1, 2


class Files:
    """A checkpoint that has nothing but files."""

    reference = "some/model"
    nbytes = 0

    def __init__(self, files: dict[str, object], config: dict[str, object] | None = None):
        self.files = {
            name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in files.items()
        }
        self.config = config or {}

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)


def byte_level(*, extra: tuple[str, ...] = (), prefix: str = "") -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(BYTE_LEVEL["tokens"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in BYTE_LEVEL["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    if prefix:
        names = prefix.split(" ")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(name, backend.token_to_id(name)) for name in names]
        )
    return backend


def sentencepiece(*, metaspace: bool = False) -> tokenizers.Tokenizer:
    """Llama's two styles of the same vocabulary: marks of spaces by a normaliser, or by a pre-tokenizer."""
    vocab = {row[0]: index for index, row in enumerate(SENTENCEPIECE["llama"])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocab, key=vocab.get)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first", split=False), *steps[:1]])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])
    return backend


def load(backend: tokenizers.Tokenizer, config: dict[str, object] | None = None, **files: object) -> Tokenizer:
    named = {f"{name}.json": value for name, value in files.items()}
    return load_tokenizer(Files({"tokenizer.json": backend.to_str().encode(), **named}, config))


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = tokenizer.detokenizer(**options)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


# BOS


@pytest.mark.parametrize(
    ("prefix", "settings", "ids"),
    [
        ("", {}, []),
        ("", {"bos_token": "<|im_start|>"}, []),
        ("", {"bos_token": "<|im_start|>", "add_bos_token": True}, [START]),
        ("", {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}, [START]),
        ("", {"add_bos_token": True}, []),
        ("<|im_start|>", {}, [START]),
        ("<|im_start|>", {"bos_token": "<|im_start|>"}, [START]),
        ("<|im_start|>", {"bos_token": "<|im_start|>", "add_bos_token": None}, [START]),
        ("<|im_start|>", {"bos_token": "<|im_start|>", "add_bos_token": True}, [START]),
        ("<|im_start|>", {"bos_token": "<|im_start|>", "add_bos_token": False}, []),
        ("<|endoftext|> <|im_start|>", {}, [END, START]),
    ],
)
def test_a_prompt_begins_as_the_files_say(prefix, settings, ids):
    tokenizer = load(byte_level(prefix=prefix), tokenizer_config=settings)
    plain = tokenizer.encode("Hello", add_bos=False)
    assert tokenizer.encode("Hello", add_bos=True) == ids + plain
    assert tokenizer.encode("", add_bos=True) == ids
    assert tokenizer.adds_bos is bool(ids)
    assert START not in plain


def test_bos_is_not_doubled():
    tokenizer = load(byte_level(prefix="<|im_start|>"))
    once = tokenizer.encode("<|im_start|>Hello", add_bos=True)
    assert once.count(START) == 1
    assert tokenizer.encode("Hello", add_bos=True) == once


def test_a_lone_prefix_of_the_vocabulary_is_bos():
    tokenizer = load(byte_level(prefix="<|im_start|>"))
    assert (tokenizer.bos_id, tokenizer.bos_token) == (START, "<|im_start|>")


def test_the_text_of_bos_counts_more_than_an_id_left_over_from_the_base_model():
    tokenizer = load(byte_level(), {"bos_token_id": END}, tokenizer_config={"bos_token": "<|im_start|>"})
    assert tokenizer.bos_id == START
    assert load(byte_level(), {"bos_token_id": END}).bos_id == END
    assert load(byte_level(), {"bos_token_id": END}, generation_config={"bos_token_id": START}).bos_id == START
    assert load(byte_level(), special_tokens_map={"bos_token": "<|im_start|>"}).bos_id == START
    assert load(byte_level()).bos_id is None


def test_an_eos_of_the_post_processor_does_not_end_the_prompt():
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    tokenizer = load(backend)
    assert tokenizer.encode("a", add_bos=True) == tokenizer.encode("a", add_bos=False)
    assert STOP not in tokenizer.encode("a", add_bos=True)


# Ends


WELL_KNOWN = {END, STOP}


@pytest.mark.parametrize(
    ("config", "files", "more"),
    [
        ({}, {}, set()),
        ({"eos_token_id": 7}, {}, {7}),
        ({"eos_token_id": [7, 8]}, {"generation_config": {"eos_token_id": 9}}, {7, 8, 9}),
        ({"eos_token_id": None}, {"generation_config": {"eos_token_id": [10, 11]}}, {10, 11}),
        ({"text_config": {"eos_token_id": [12]}}, {}, {12}),
        ({}, {"tokenizer_config": {"eos_token": "<tool_call>"}}, {len(BYTE_LEVEL["tokens"]) - 2}),
        ({}, {"special_tokens_map": {"eos_token": {"content": "</tool_call>"}}}, {len(BYTE_LEVEL["tokens"]) - 1}),
        ({}, {"tokenizer_config": {"eos_token": "not a token"}}, set()),
        ({"eos_token_id": "2"}, {"generation_config": {"eos_token_id": [True, -1]}}, set()),
    ],
)
def test_every_end_any_file_names_is_a_stop(config, files, more):
    assert load(byte_level(), config, **files).stop_ids == WELL_KNOWN | more


def test_the_end_of_a_message_is_no_stop_where_a_turn_has_several():
    harmony = byte_level(extra=("<|return|>", "<|call|>", "<|end|>"))
    ids = {name: harmony.token_to_id(name) for name in ("<|return|>", "<|call|>", "<|end|>")}
    stops = load(harmony, {"eos_token_id": list(ids.values())}).stop_ids
    assert stops == WELL_KNOWN | {ids["<|return|>"], ids["<|call|>"]}
    phi = byte_level(extra=("<|end|>",))
    assert load(phi).stop_ids == WELL_KNOWN | {phi.token_to_id("<|end|>")}


def test_the_text_of_eos_is_kept_for_templates():
    assert load(byte_level(), tokenizer_config={"eos_token": "<|im_end|>"}).eos_token == "<|im_end|>"
    assert load(byte_level()).eos_token is None


# Text to ids and back


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "backend",
    [byte_level(), sentencepiece(), sentencepiece(metaspace=True)],
    ids=["byte-level", "sentencepiece", "metaspace"],
)
def test_streamed_pieces_join_to_what_the_library_decodes(backend, skip):
    tokenizer = load(backend)
    for text in TEXTS:
        if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace) and text.startswith((" ", "\u2581")):
            continue  # the library's own decoder then drops more spaces than it put there
        ids = tokenizer.encode(text, add_bos=False)
        expected = backend.decode(ids, skip_special_tokens=skip)
        assert stream(tokenizer, ids, skip_special=skip, at_start=True) == expected


def test_streamed_pieces_join_to_what_sentencepiece_decodes():
    tokenizer = load(sentencepiece())
    for ids, text in zip(REFERENCE["ids"]["llama"], REFERENCE["decoded"]["llama"], strict=True):
        assert stream(tokenizer, ids, at_start=True) == text


def test_a_vocabulary_that_puts_no_space_before_a_text_drops_none():
    backend = sentencepiece()
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = load(backend)
    assert stream(tokenizer, tokenizer.encode("a b", add_bos=False), at_start=True) == " a b"


def test_special_tokens_are_seen_unless_they_are_to_be_skipped():
    tokenizer = load(byte_level())
    ids = tokenizer.encode("<|im_start|>hi<tool_call>", add_bos=False)
    assert stream(tokenizer, ids) == "<|im_start|>hi<tool_call>"
    assert stream(tokenizer, ids, skip_special=True) == "hi<tool_call>"
    assert [tokenizer.is_special(token) for token in (ids[0], ids[1], ids[-1])] == [True, False, False]


def test_a_continuation_keeps_its_leading_space():
    tokenizer = load(sentencepiece())
    ids = tokenizer.encode("the", add_bos=False)
    assert stream(tokenizer, ids) == " the"
    assert stream(tokenizer, ids, at_start=True) == "the"


def test_a_byte_token_is_one_byte():
    tokenizer = load(sentencepiece())
    ids = tokenizer.encode("\U0010ffff", add_bos=False)
    assert b"".join(map(tokenizer.piece, ids)) == " \U0010ffff".encode()
    assert b"\xf4" in [tokenizer.piece(token) for token in ids]


def test_text_that_only_looks_like_a_byte_token_is_text():
    tokenizer = load(sentencepiece())
    assert stream(tokenizer, tokenizer.encode("<0x41>", add_bos=False), at_start=True) == "<0x41>"


def test_an_added_token_of_a_byte_level_vocabulary_is_its_text():
    tokenizer = load(byte_level(extra=("<é → ▁>",)))
    (token,) = tokenizer.encode("<é → ▁>", add_bos=False)
    assert tokenizer.piece(token).decode() == "<é → ▁>"


def test_plain_tokens_that_stand_for_no_bytes_are_their_text():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "\u2581": 1, "\u2581\u20ac": 2}, [], byte_fallback=True))
    backend.decoder = decoders.ByteLevel()
    assert load(backend).piece(2).decode() == "\u2581\u20ac"
    odd = tokenizers.Tokenizer(models.BPE({"<0xZZ>": 0, "<0x4a>": 1}, [], byte_fallback=True))
    odd.decoder = decoders.ByteFallback()
    assert [load(odd).piece(token) for token in (0, 1)] == [b"<0xZZ>", b"J"]
    bare = tokenizers.Tokenizer(models.BPE({"\u2581x": 0}, []))
    assert load(bare).piece(0).decode() == "\u2581x"


@pytest.mark.parametrize("backend", [byte_level(), sentencepiece()], ids=["byte-level", "sentencepiece"])
def test_no_text_has_fewer_tokens_than_the_fewest(backend):
    tokenizer = load(backend)
    for text in [*TEXTS, " " * 5000, "a" * 5000, "the " * 2000, "日本" * 2000]:
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_bos=False))
    assert tokenizer.fewest_tokens("the " * 10_000) > 1000


def test_ids_outside_the_vocabulary_have_no_text():
    tokenizer = load(byte_level())
    assert tokenizer.vocab_size == len(BYTE_LEVEL["tokens"])
    assert [tokenizer.piece(token) for token in (-1, tokenizer.vocab_size, 10**12)] == [b"", b"", b""]
    assert not tokenizer.is_special(10**12)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(TokenizerError, match="surrogate"):
        load(byte_level()).encode("a\ud83d", add_bos=False)


def test_truncation_and_padding_in_the_file_are_ignored():
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(load(backend).encode("x y z " * 10, add_bos=False)) not in {4, 64}


def test_many_threads_get_what_one_gets():
    tokenizer = load(byte_level(prefix="<|im_start|>"))
    expected = [tokenizer.encode(text, add_bos=True) for text in TEXTS]
    draw = random.Random(3)
    order = [draw.randrange(len(TEXTS)) for _ in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda index: tokenizer.encode(TEXTS[index], add_bos=True), order)
    assert all(ids == expected[index] for index, ids in zip(order, got, strict=True))


# Files


def test_tokens_that_only_the_settings_know_are_added(caplog):
    count = len(BYTE_LEVEL["tokens"])
    listed = {
        "0": {"content": "<|endoftext|>", "special": True},
        str(count): {"content": "<|late|>", "special": True, "normalized": False},
        str(count + 1): {"content": "<later>", "lstrip": True, "rstrip": True, "normalized": False},
        str(BYTE_LEVEL["tokens"].index("x")): {"content": "x", "special": True},
        str(count + 9): {"content": "<misplaced>"},
        "odd": {"content": "<odd>"},
        "7": "odd",
        "8": {"content": 8},
    }
    tokenizer = load(byte_level(), tokenizer_config={"added_tokens_decoder": listed})
    ids = tokenizer.encode("<|late|> <later> a", add_bos=False)
    assert ids == [count, count + 1, *tokenizer.encode("a", add_bos=False)]
    assert tokenizer.is_special(count)
    assert not tokenizer.is_special(count + 1)
    assert tokenizer.is_special(BYTE_LEVEL["tokens"].index("x"))
    assert tokenizer.vocab_size == count + 2
    assert "<misplaced>" in caplog.text


def test_files_are_found_in_the_folder_that_ollama_keeps_them_in():
    files = {"tokenizer.json": byte_level().to_str().encode(), "tokenizer_config.json": {"chat_template": "x"}}
    tokenizer = load_tokenizer(Files({f"tokenizer/{name}": value for name, value in files.items()}))
    assert tokenizer.chat_template == "x"


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "r"}]}}, None),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
        ({"chat_template.json": {"chat_template": "b"}, "tokenizer_config.json": {"chat_template": "a"}}, "b"),
        ({"chat_template.jinja": "é".encode(), "chat_template.json": {"chat_template": "b"}}, "é"),
    ],
)
def test_the_chat_template_is_found_where_models_keep_it(files, template):
    checkpoint = Files({"tokenizer.json": byte_level().to_str().encode(), **files})
    assert load_tokenizer(checkpoint).chat_template == template


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "some/model has no tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json"),
        ({"tokenizer.json": b"not json"}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json is not a JSON object"),
        ({"generation_config.json": b"\xff"}, "generation_config.json is not UTF-8"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
    ],
)
def test_a_damaged_file_is_refused_by_name(files, reason):
    whole = {} if not files or "tokenizer.json" in files else {"tokenizer.json": byte_level().to_str().encode()}
    with pytest.raises(TokenizerError, match=reason):
        load_tokenizer(Files({**whole, **files}))
