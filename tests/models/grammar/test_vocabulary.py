"""Every kind of vocabulary that is loaded, put through one grammar token by token."""

import json

import pytest

from models.checkpoint import open_checkpoint
from models.grammar import GBNF, GrammarCompiler, JSONSchema
from models.tokenizer import Tokenizer, load_tokenizer
from tests.models.grammar.vocabularies import allowed
from tests.models.test_tokenizer import byte_level, load, sentencepiece

SCHEMA = JSONSchema('{"properties":{"the town":{"type":"string"},"n":{"type":"integer"}},"required":["the town","n"]}')
ANSWER = '{"the town": "Zürich 🏔 on the lake", "n": 12}'
KINDS = {
    "byte level": lambda: load(byte_level(), generation_config={"eos_token_id": [0, 2]}),
    "sentencepiece": lambda: load(sentencepiece(), generation_config={"eos_token_id": [2, 3]}),
    "metaspace": lambda: load(sentencepiece(metaspace=True), generation_config={"eos_token_id": [2]}),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def check(tokenizer: Tokenizer, width: int) -> None:
    """The tokens of an answer are allowed, of the others those that spell what the schema allows."""
    matcher = GrammarCompiler(tokenizer, width).compile(SCHEMA).matcher()
    said = b""
    for token in pieces_of(tokenizer, ANSWER):
        ids = allowed(matcher.mask())
        assert token in ids
        assert max(ids) < tokenizer.vocab_size
        assert not any(tokenizer.is_special(each) or not tokenizer.piece(each) for each in ids)
        said += tokenizer.piece(token)
        matcher.accept(token)
    assert json.loads(said) == json.loads(ANSWER)
    assert matcher.finished
    assert allowed(matcher.mask()) == {each for each in tokenizer.stop_ids if each < width}


def pieces_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens that spell a text, the longest first: not those of the tokenizer, which may put a space before it."""
    rest, found = text.encode(), []
    by_piece = {
        tokenizer.piece(token): token for token in range(tokenizer.vocab_size) if not tokenizer.is_special(token)
    }
    while rest:
        piece = max((piece for piece in by_piece if piece and rest.startswith(piece)), key=len)
        found.append(by_piece[piece])
        rest = rest[len(piece) :]
    return found


@pytest.mark.parametrize("padding", [0, 1, 100])
def test_an_answer_can_be_said_in_every_kind_of_vocabulary(tokenizer: Tokenizer, padding: int):
    check(tokenizer, tokenizer.vocab_size + padding)


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2.gguf", "llama_gqa-Q4_0.gguf"])
def test_an_answer_can_be_said_in_the_vocabularies_of_checkpoints(name: str, parity):
    tokenizer = load_tokenizer(open_checkpoint(str(parity / name), parity))
    check(tokenizer, tokenizer.vocab_size)


def test_a_text_that_is_forced_is_cut_as_the_model_would_cut_it(tokenizer: Tokenizer):
    text = "the town on the lake"
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(GBNF(f'root ::= "{text}"')).matcher()
    said = b""
    while not matcher.finished:
        token = max(allowed(matcher.mask()), key=lambda each: len(tokenizer.piece(each)))
        said += tokenizer.piece(token)
        matcher.accept(token)
    assert said == text.encode()


def test_a_vocabulary_without_an_end_can_be_held_to_a_grammar():
    bare = Tokenizer(sentencepiece(), bos_id=None, prefix=(), stop_ids=frozenset(), eos_token=None, chat_template=None)
    matcher = GrammarCompiler(bare, bare.vocab_size).compile(JSONSchema('{"const":1}')).matcher()
    matcher.accept(next(token for token in range(bare.vocab_size) if bare.piece(token) == b"1"))
    assert matcher.finished


@pytest.mark.parametrize("width", [50, 259])
def test_logits_may_be_fewer_than_tokens(width: int):
    tokenizer = KINDS["byte level"]()
    matcher = GrammarCompiler(tokenizer, width).compile(JSONSchema("true")).matcher()
    assert max(allowed(matcher.mask())) < width
