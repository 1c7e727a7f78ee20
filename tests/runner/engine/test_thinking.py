import json

import pytest

from models.grammar import Compiled, GrammarCompiler, JSONSchema, OutputFormat
from models.tokenizer import Tokenizer
from runner.engine.constraint import Constraint, Constraints, PendingConstraint
from runner.engine.thinking import ThinkingPlans
from tests.models.grammar.vocabularies import allowed
from tests.models.test_tokenizer import load, sentencepiece

OBJECT = JSONSchema('{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}')
CLOSINGS = ("</think>", "[/T]")


class Words:
    """A vocabulary of bytes and of some longer pieces."""

    stop_ids = frozenset({0})

    def __init__(self, *words: str) -> None:
        self.pieces = [b"<eos>", *(bytes([each]) for each in range(1, 256)), *(word.encode() for word in words)]

    @property
    def width(self) -> int:
        return len(self.pieces)

    def piece(self, token: int) -> bytes:
        return self.pieces[token]

    def is_special(self, token: int) -> bool:
        return token == 0

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        return list(text.encode())

    def id(self, word: str) -> int:
        return self.pieces.index(word.encode())


def completed(pending: PendingConstraint) -> Constraint:
    pending.complete()
    return pending.made


def constraint(words: Words, closings=CLOSINGS, grammar=OBJECT) -> Constraint:
    compiler = GrammarCompiler(words, words.width)
    return completed(Constraints(compiler, words, words.width).prepare(OutputFormat(grammar, closings)))


def said(held: Constraint, words: Words, *pieces: str) -> list[set[int] | None]:
    """What was allowed before each piece, all of which must have been."""
    masks = []
    for piece in pieces:
        held.make_masks(())
        mask = held.mask(0)
        masks.append(None if mask is None else allowed(mask))
        token = words.id(piece)
        assert mask is None or token in masks[-1], piece
        held.accept(token)
        assert held.error is None
    return masks


def free(held: Constraint) -> bool:
    held.make_masks(())
    return held.mask(0) is None


def test_thinking_is_free_until_its_closing_and_the_grammar_is_in_force_right_behind_it():
    words = Words("</think>")
    held = constraint(words)
    masks = said(held, words, *"so <b {", "</think>", *'\n{"a": 1}')
    assert masks[:8] == [None] * 8, "nothing was held back"
    assert masks[8] == {ord(each) for each in "\n\t\r {"}
    assert held.finished


def test_a_closing_may_lie_across_tokens_and_begin_over():
    words = Words("</th", "ink>")
    for pieces in (("</th", "ink>"), ("<", "</th", "ink>"), tuple("</</think>"), tuple("</think</think>")):
        held = constraint(words)
        said(held, words, *pieces)
        assert not free(held), pieces
        said(held, words, *'{"a":1}')
        assert held.finished


def test_each_of_several_closings_ends_the_thinking():
    words = Words("[/T]")
    for closing in CLOSINGS:
        held = constraint(words)
        said(held, words, *"a[/", *closing, *'{"a":1}')
        assert held.finished


def test_a_closing_may_end_inside_a_token_whose_rest_the_grammar_allows():
    words = Words("</think", ">\n\n", '>{"', ">Hello", "x</think>y", "x</think>\n", "> \u00e9")
    held = constraint(words)
    said(held, words, "</think", '>{"', *'a":1}')
    assert held.finished
    held = constraint(words)
    said(held, words, "x</think>\n", *'{"a":1}')
    assert held.finished


def test_a_token_is_refused_that_ends_the_closing_and_goes_on_with_something_else():
    words = Words("</think", ">\n\n", '>{"', ">Hello", "x</think>y", "> ", "><", ">a")
    held = constraint(words)
    (first, *_) = said(held, words, "</think", ">")
    assert first is not None
    assert first == {*range(words.width)} - {words.id("x</think>y")}
    held = constraint(words)
    said(held, words, "</think")
    held.make_masks(())
    within = allowed(held.mask(0))
    refused = {words.id(word) for word in (">Hello", "x</think>y", "><", ">a")}
    assert within & {*range(words.width)} == {*range(words.width)} - refused
    assert {words.id(word) for word in (">", ">\n\n", '>{"', "> ")} <= within, "these go on as the grammar says"


def test_elsewhere_such_a_token_is_as_good_as_any():
    words = Words(">Hello")
    held = constraint(words)
    assert said(held, words, "a", ">Hello", "<", ">Hello") == [None] * 4


def test_the_end_of_text_stays_possible_while_thinking():
    words = Words(">Hello")
    held = constraint(words)
    said(held, words, *"</think")
    held.make_masks(())
    assert 0 in allowed(held.mask(0))
    assert not held.finished


def test_drafts_reach_up_to_the_closing():
    words = Words("ink>", ">x")
    held = constraint(words)
    ids = [words.id(piece) for piece in ("a", *"</th", "ink>", "{")]
    assert held.admitted(ids) == 5
    held.make_masks(ids[:5])
    assert [held.mask(place) for place in range(6)] == [None] * 6
    said(held, words, *"a</thin")
    assert held.admitted([words.id("x"), words.id("<")]) == 2
    held.make_masks([words.id("k")])
    assert held.mask(0) is None
    assert words.id(">x") not in allowed(held.mask(1))


def test_a_closing_of_characters_that_are_several_bytes_is_found():
    words = Words("◁")
    held = constraint(words, ("◁/é▷",))
    for token in "◁/é▷".encode():
        assert free(held)
        held.accept(token)
    assert not free(held)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load(sentencepiece(), generation_config={"eos_token_id": [2]})


def test_closings_are_found_in_a_real_vocabulary(tokenizer: Tokenizer):
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    held = completed(Constraints(compiler, tokenizer, tokenizer.vocab_size).prepare(OutputFormat(OBJECT, CLOSINGS)))
    for token in tokenizer.encode("I think</think>", add_bos=False):
        assert not held.finished
        held.accept(token)
    assert not free(held)
    text = ""
    while not held.finished:
        held.make_masks(())
        options = allowed(held.mask(0)) - tokenizer.stop_ids
        token = max(options, key=lambda each: (tokenizer.piece(each).strip() != b"", tokenizer.piece(each)))
        held.accept(token)
        text += tokenizer.piece(token).decode()
        if len(text) > 40:
            break
    assert held.error is None
    assert text.lstrip().startswith('{"a"')


def test_the_places_of_closings_are_sought_once(monkeypatch: pytest.MonkeyPatch):
    words = Words(">x")
    grammar: Compiled = GrammarCompiler(words, words.width).compile(OBJECT, spaced=True)
    plans = ThinkingPlans(words, words.width)
    first = plans.plan(CLOSINGS, grammar)
    monkeypatch.setattr(words, "piece", None)
    assert plans.plan(CLOSINGS, grammar) == first
    assert plans.plan((), grammar) is None
    assert json.dumps(len(first.masks)) == str(len(first.automaton.depth))
