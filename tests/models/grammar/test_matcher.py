import pytest

from models.errors import GrammarError
from models.grammar.matcher import reason_of
from tests.models.grammar.vocabularies import allowed, compiled

SCHEMA = '{"type":"array","items":{"type":"boolean"},"maxItems":2}'


def matcher(said=""):
    made = compiled(SCHEMA).matcher()
    for token in said.encode():
        made.accept(token)
    return made


def test_an_answer_is_finished_when_nothing_more_may_follow():
    assert not matcher("[true").finished
    assert matcher("[true]").finished


def test_drafted_tokens_are_admitted_up_to_the_first_that_is_not():
    assert matcher("[").admitted(b"true,x") == 5
    assert matcher("[").admitted(b"]") == 1
    assert matcher("[").admitted(b"") == 0


def test_each_drafted_place_has_its_own_mask_and_none_is_taken():
    begun = matcher("[tr")
    masks = begun.masks(b"ue,")
    assert [allowed(mask) & set(b"uetf,]") for mask in masks] == [{ord("u")}, {ord("e")}, set(b",]"), set(b"tf")]
    assert begun.masks(b"ue]")[:3] == masks[:3], "the drafts were taken back"
    begun.accept(ord("u"))
    assert begun.mask() == masks[1]


def test_a_draft_may_complete_the_answer():
    begun = matcher("[true")
    begun.masks(b"]")
    assert not begun.finished
    begun.accept(ord(","))
    assert allowed(begun.mask()) >= set(b"tf")


def test_a_token_that_the_grammar_refuses_is_an_error_in_one_line():
    begun = matcher("[")
    with pytest.raises(GrammarError, match="doesn't satisfy the grammar") as raised:
        begun.accept(ord("x"))
    assert "\n" not in str(raised.value)
    with pytest.raises(GrammarError):
        begun.mask()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("at 1(8): failed to compile JSON schema: Invalid type: foo\n<state>", "Invalid type: foo"),
        ("failed to compile JSON schema: bad regex:\n  (\n  ^\nerror: unclosed group", "bad regex: unclosed group"),
        ("3(13): lexer error\n   1 | start", "lexer error"),
        ("", ""),
    ],
)  # fmt: skip
def test_of_the_engines_message_the_reason_is_told(message, reason):
    assert reason_of(message) == reason
