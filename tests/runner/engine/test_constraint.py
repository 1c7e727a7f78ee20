import logging

import pytest

from models.grammar import GBNF, GrammarCompiler, JSONSchema, OutputFormat
from models.grammar.schema import MAX_BYTES, MAX_DEPTH
from runner.engine.constraint import Constraint, Constraints, MaskWorker
from runner.errors import BadRequest
from tests.fakes import EOS, VOCABULARY, ByteTokenizer
from tests.models.grammar.vocabularies import allowed

LIST = JSONSchema('{"type":"array","items":{"type":"boolean"},"maxItems":2}')


def constraints(**options) -> Constraints:
    return Constraints(GrammarCompiler(ByteTokenizer(), VOCABULARY, **options), ByteTokenizer(), VOCABULARY)


def held(said: str = "", grammar=LIST) -> Constraint:
    pending = constraints().prepare(OutputFormat(grammar))
    pending.complete()
    made = pending.made
    for token in said.encode():
        made.accept(token)
    return made


REFUSED = r"^invalid structured output grammar: ."


def test_what_is_no_format_is_a_bad_request_before_anything_is_compiled():
    deep = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    large = "x" * (MAX_BYTES + 1)
    for grammar in (JSONSchema("["), JSONSchema(deep), JSONSchema("false"), JSONSchema(large), GBNF(large)):
        with pytest.raises(BadRequest, match=REFUSED):
            constraints().prepare(OutputFormat(grammar))


def test_a_format_that_cannot_be_enforced_is_a_bad_request_when_it_is_compiled():
    for grammar in (JSONSchema('{"type":"foo"}'), JSONSchema('{"enum":[]}'), GBNF("root")):
        pending = constraints().prepare(OutputFormat(grammar))
        with pytest.raises(BadRequest, match=REFUSED):
            pending.complete()
        assert pending.made is None


def test_what_was_compiled_before_is_complete_at_once():
    makes = constraints()
    first = makes.prepare(OutputFormat(LIST))
    assert first.made is None
    first.complete()
    second = makes.prepare(OutputFormat(LIST))
    assert second.made is not None
    assert second.made is not first.made
    assert makes.prepare(OutputFormat(LIST, ("</think>",))).made is None, "white space is allowed behind the closing"


def test_what_is_not_enforced_is_named_in_the_log(caplog: pytest.LogCaptureFixture):
    wanted = OutputFormat(JSONSchema('{"uniqueItems":true}'))
    with caplog.at_level(logging.WARNING):
        constraints().prepare(wanted).complete()
    (record,) = caplog.records
    assert "uniqueItems" in record.fields["ignored"]
    with pytest.raises(BadRequest, match="uniqueItems"):
        constraints(strict=True).prepare(wanted).complete()


def test_masks_are_of_the_next_place_and_of_those_behind_drafts():
    row = held("[tr")
    row.make_masks(b"ue")
    assert [allowed(row.mask(place)) for place in range(2)] == [{ord("u")}, {ord("e")}]
    assert ord("]") in allowed(row.mask(2))
    row.make_masks(())
    assert allowed(row.mask(0)) == {ord("u")}


def test_drafts_are_cut_where_the_grammar_refuses_them_and_where_the_text_ends():
    assert held("[").admitted(list(b"true]]")) == 5
    assert held("[true").admitted([ord("]"), EOS]) == 1
    assert held("[").admitted(list(b"x")) == 0


def test_a_finished_answer_is_known_as_such():
    assert held("[]").finished
    assert not held("[true").finished


def test_a_grammar_that_fails_fails_for_good():
    row = held("[")
    row.accept(ord("x"))
    assert "grammar" in row.error
    assert not row.finished
    before = row.error
    row.make_masks(())
    assert (row.mask(0), row.error) == (None, before)


def test_masks_of_several_rows_are_made_in_a_thread_of_their_own():
    worker = MaskWorker()
    rows = [held(), held("["), held("[true")]
    assert worker.begin([]) == []
    for pending in worker.begin([(row, ()) for row in rows]):
        pending.result(timeout=30)
    assert [ord("[") in allowed(row.mask(0)) for row in rows] == [True, False, False]
    worker.close()
