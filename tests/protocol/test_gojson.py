import base64
import json
from typing import Annotated

import pytest
from pydantic import Field

from protocol.gojson import (
    FAIL_FAST,
    NULL_IS_OBJECT,
    OMIT_EMPTY,
    Bool,
    Bytes,
    Float32,
    GoModel,
    Int,
    Int32,
    Ints,
    NilInts,
    Str,
    Strings,
    TextLine,
    WireError,
    parse,
    write_line,
)
from protocol.imagegen import CompletionLine
from protocol.mlxrunner import ContentLine


class Inner(GoModel):
    name: Str = Field(default="", alias="Name")


class Outer(GoModel):
    text: Str = Field(default="", alias="Text")
    count: Int = Field(default=0, alias="Count")
    small: Int32 = 0
    ratio: Float32 = 0.0
    flag: Bool = False
    data: Bytes = b""
    words: Strings = ()
    numbers: Ints = ()
    inner: Inner | None = None
    inners: Annotated[tuple[Inner, ...], FAIL_FAST, NULL_IS_OBJECT] = ()
    anything: object = None


class Answer(GoModel):
    done: Bool = False
    content: Annotated[Str, OMIT_EMPTY] = ""
    items: NilInts = Field(default=None, alias="Items")
    data: Annotated[Bytes, OMIT_EMPTY] = b""
    nested: Annotated[tuple[Inner, ...], OMIT_EMPTY] = ()


def test_absent_fields_are_zero():
    assert Outer.from_json(b"{}") == Outer()


def test_null_leaves_every_field_zero():
    names = ["Text", "Count", "small", "ratio", "flag", "data", "words", "numbers", "inner", "inners", "anything"]
    assert Outer.from_json(json.dumps(dict.fromkeys(names)).encode()) == Outer()


def test_a_null_body_is_a_zero_struct():
    assert Outer.from_json(b"null") == Outer()


def test_null_elements_are_zero_elements():
    read = Outer.from_json(b'{"words":["a",null],"numbers":[1,null],"inners":[null,{"Name":"x"}]}')
    assert read.words == ("a", "")
    assert read.numbers == (1, 0)
    assert read.inners == (Inner(), Inner(name="x"))


def test_field_names_match_in_any_case_at_every_depth():
    read = Outer.from_json(b'{"TEXT":"a","cOUNT":3,"inner":{"NAME":"b"},"INNERS":[{"name":"c"}]}')
    assert (read.text, read.count, read.inner, read.inners) == ("a", 3, Inner(name="b"), (Inner(name="c"),))


def test_go_folds_the_long_s_and_the_kelvin_sign():
    assert Outer.from_json('{"\u017fmall":4}'.encode()).small == 4


@pytest.mark.parametrize(
    "body", [b'{"Text":"a","text":"b"}', b'{"text":"a","Text":"b"}', b'{"Text":"x","text":"y","Text":"b"}']
)
def test_the_last_of_several_spellings_wins(body):
    assert Outer.from_json(body).text == "b"


def test_a_python_name_is_no_wire_name():
    class Renamed(GoModel):
        inside: Int = Field(default=0, alias="Outside")

    assert Renamed.from_json(b'{"inside":1}').inside == 0
    assert Renamed(inside=1).inside == 1


def test_unknown_fields_are_ignored_whatever_they_hold():
    body = b'{"Text":"a","more":[1e999,' + b"9" * 4000 + b',{"x":null}]}'
    assert Outer.from_json(body).text == "a"


def test_bytes_after_the_first_value_are_ignored():
    assert Outer.from_json(b' \n{"Count":1} trailing').count == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Count", "1.5"),
        ("Count", "1.0"),
        ("Count", "1e2"),
        ("Count", '"1"'),
        ("Count", "true"),
        ("Count", "9223372036854775808"),
        ("Count", "9" * 4000),
        ("Count", "9" * 5_000_000),
        ("small", "2147483648"),
        ("ratio", "true"),
        ("ratio", '"0.5"'),
        ("ratio", "1e39"),
        ("ratio", "1e999"),
        ("flag", "1"),
        ("flag", '"true"'),
        ("Text", "1"),
        ("Text", "[]"),
        ("words", '"a"'),
        ("words", "[1]"),
        ("data", "1"),
        ("data", '"?"'),
        ("data", '"aGk"'),
        ("inner", "[]"),
        ("inner", '"x"'),
        ("inners", "[1]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_and_the_field_named(field, value):
    with pytest.raises(WireError, match=f"{field}|digits") as refusal:
        Outer.from_json(f'{{"{field}":{value}}}'.encode())
    assert len(str(refusal.value)) < 120


def test_a_list_of_wrong_elements_is_refused_at_its_first():
    body = b'{"words":[' + b"1," * 1_000_000 + b"1]}"
    with pytest.raises(WireError, match=r"words\.0 of type string"):
        Outer.from_json(body)


def test_the_refusal_is_worded_as_gos():
    with pytest.raises(WireError, match=r"^cannot unmarshal number 1\.5 into field Count of type int$"):
        Outer.from_json(b'{"Count":1.5}')


def test_limits_of_integers_are_read():
    assert Outer.from_json(b'{"Count":-9223372036854775808}').count == -(2**63)
    assert Outer.from_json(b'{"Count":9223372036854775807}').count == 2**63 - 1


def test_an_integer_is_a_float():
    assert Outer.from_json(b'{"ratio":1}').ratio == 1.0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  \n",
        b"{",
        b"[]",
        b"1",
        b'"x"',
        b'{"Count":NaN}',
        b'{"more":Infinity}',
        b'{"more":-Infinity}',
        b'{"Count":01}',
        b"{'Count':1}",
        b'{"Count":1,}',
        b'{"Text":"a\nb"}',
        b"\xff{}",
        b"\xef\xbb\xbf{}",
        b"\x00",
    ],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(WireError):
        Outer.from_json(body)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting_is_refused(opening, closing, closed):
    depth = 200_000
    body = b'{"more":' + opening * depth + b"1" + (closing * depth + b"}" if closed else b"")
    with pytest.raises(WireError, match="depth"):
        Outer.from_json(body)


def test_a_body_of_millions_of_arrays_is_refused():
    with pytest.raises(WireError, match="1000000 objects and arrays"):
        Outer.from_json(b'{"more":[' + b"[]," * 2_000_000 + b"1]}")


def test_moderate_nesting_is_read():
    assert Outer.from_json(b'{"anything":' + b"[" * 200 + b"]" * 200 + b"}").anything is not None


def test_lone_surrogates_and_invalid_utf8_become_replacement_characters():
    assert Outer.from_json(b'{"Text":"a\\ud800b\\udc00\\ud83d\\ude00"}').text == "a\ufffdb\ufffd\U0001f600"
    assert Outer.from_json(b'{"Text":"a\xffb"}').text == "a\ufffdb"
    assert Outer.from_json(b'{"Text":"\\ud800\xe2\x82a"}').text == "\ufffd\ufffd\ufffda"


def test_nul_characters_are_text():
    assert Outer.from_json(b'{"Text":"a\\u0000b"}').text == "a\0b"


def test_bytes_are_base64_with_line_breaks_allowed():
    assert Outer.from_json(b'{"data":"aG\\r\\nk="}').data == b"hi"


def test_bytes_may_be_an_array_of_numbers():
    assert Outer.from_json(b'{"data":[104,null,105]}').data == b"h\0i"


@pytest.mark.parametrize("value", ["[256]", "[-1]", '["a"]', "[true]", "[1.0]"])
def test_an_array_of_anything_else_is_no_bytes(value):
    with pytest.raises(WireError, match="data"):
        Outer.from_json(f'{{"data":{value}}}'.encode())


def test_the_largest_float32_is_read_and_what_rounds_to_it():
    assert Outer.from_json(b'{"ratio":3.4028235e38}').ratio == 3.4028235e38
    with pytest.raises(WireError, match="float32"):
        Outer.from_json(b'{"ratio":-3.4028236e38}')


def test_parse_gives_the_first_value():
    assert parse(b'[1,{"a":2}] x') == [1, {"a": 2}]


def test_zero_values_are_written_unless_omitted_and_nil_is_null():
    assert Answer().to_line() == b'{"done":false,"Items":null}\n'


def test_set_values_are_written_under_their_wire_names():
    answer = Answer(done=True, content="é\u2028\n", items=(), data=b"\xff", nested=(Inner(name="n"),))
    line = answer.to_line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "done": True,
        "content": "é\u2028\n",
        "Items": [],
        "data": base64.b64encode(b"\xff").decode(),
        "nested": [{"Name": "n"}],
    }


def test_what_json_cannot_say_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        write_line(float("nan"))


@pytest.mark.parametrize("text", ["", "plain", '"quoted" \\ and\nbroken', "\u2028 é 🙂 \x00 \x1f", "0"])
@pytest.mark.parametrize("model", [ContentLine(done_reason=3), CompletionLine()])
def test_a_text_line_is_the_line_of_a_model_with_that_text(model, text):
    assert TextLine(model, "content")(text) == model.model_copy(update={"content": text}).to_line()
