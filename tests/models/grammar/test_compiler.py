import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from models.errors import GrammarError
from models.grammar import GBNF, GrammarCompiler, JSONSchema
from models.grammar.compiler import KEPT, KEPT_CHARACTERS
from tests.fakes import VOCABULARY, ByteTokenizer
from tests.models.grammar.vocabularies import admits, allowed, compiled

OLLAMAS = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"
array  ::= "[" ws (value ("," ws value)*)? ws "]"
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F]))* "\""
number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= ([ \t\n] ws)?
"""


def test_a_schema_admits_what_satisfies_it_and_nothing_else():
    grammar = compiled('{"properties":{"a":{"type":"integer","maximum":7},"b":{"enum":["x",null]}},"required":["a"]}')
    for text in ('{"a":1}', '{"a": 7, "b": "x"}', '{\n\t"a":-2,"b":null\r\n}'):
        assert admits(grammar, text), text
    for text in (
        '{"a":8}',
        '{"a":1.5}',
        '{"b":null}',
        '{"a":1,"c":1}',
        '{"a":1} ',
        ' {"a":1}',
        '{"a":1',
        "",
        '{"a":1}{',
    ):
        assert not admits(grammar, text), text


def test_keys_come_in_the_order_of_the_schema():
    grammar = compiled('{"properties":{"z":{},"a":{}},"required":["z","a"]}')
    assert admits(grammar, '{"z":1,"a":2}')
    assert not admits(grammar, '{"a":2,"z":1}')


def test_undeclared_keys_are_allowed_only_where_the_schema_says_so():
    assert not admits(compiled('{"properties":{"a":{}}}'), '{"b":1}')
    assert admits(compiled('{"properties":{"a":{}},"additionalProperties":true}'), '{"b":1}')
    assert admits(compiled('{"type":"object"}'), '{"b":{"c":[]}}')


def test_a_schema_that_cannot_be_closed_is_left_open():
    grammar = compiled('{"properties":{"a":false},"required":["a"],"type":["object","null"]}')
    assert admits(grammar, "null")
    assert admits(compiled('{"properties":{"a":{}},"propertyNames":{"pattern":"^b"},"type":"object"}'), "{}")


def test_white_space_has_an_end():
    grammar = compiled('{"properties":{"a":{}},"required":["a"]}')
    assert admits(grammar, "{" + 20 * "\n" + '"a"' + 20 * " " + ":1}")
    assert not admits(grammar, "{" + 21 * " " + '"a":1}')


def test_behind_thinking_a_little_white_space_comes_first():
    grammar = compiled('{"type":"boolean"}', spaced=True)
    assert admits(grammar, "\n\ntrue")
    assert admits(grammar, "true")
    assert not admits(grammar, 21 * "\n" + "true")


def test_what_the_engine_cannot_express_is_left_out_and_named():
    grammar = compiled('{"type":"array","uniqueItems":true,"items":{"type":"integer"}}')
    assert "uniqueItems" in " ".join(grammar.ignored)
    assert admits(grammar, "[1,1]")
    assert not admits(grammar, '["a"]')
    assert compiled('{"type":"array"}').ignored == ()


def test_if_strict_it_is_refused_by_name():
    with pytest.raises(GrammarError, match="uniqueItems"):
        compiled('{"type":"array","uniqueItems":true}', strict=True)
    assert admits(compiled('{"type":"array"}', strict=True), "[1,1]")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "^Invalid type: foo$"),
        ({"enum": []}, "^Unsatisfiable schema"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "^Unsatisfiable schema: minimum"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "http://elsewhere/schema"}, "elsewhere"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason_in_one_line(schema, reason):
    with pytest.raises(GrammarError, match=reason) as raised:
        compiled(json.dumps(schema))
    assert "\n" not in str(raised.value)


def test_orders_to_the_engine_change_nothing():
    plain, ordered = ({"properties": {"a": {"type": "integer"}}, **more} for more in ({}, {"x-guidance": {}}))
    ordered["x-guidance"] = {"whitespace_flexible": False, "lenient": True, "item_separator": ";"}
    for text in ('{ "a" : 1 }', '{"a":1}', "{}"):
        assert admits(compiled(json.dumps(plain)), text)
        assert admits(compiled(json.dumps(ordered)), text)
    with pytest.raises(GrammarError, match="uniqueItems"):
        compiled('{"uniqueItems":true,"x-guidance":{"lenient":true}}', strict=True)


def test_ollamas_grammar_for_json_is_understood():
    grammar = compiled(GBNF(OLLAMAS))
    assert admits(grammar, '{"a": [1, -2.5e3, {"b": "\\u00e9\\n"}], "c": null }')
    assert not admits(grammar, "[1]")
    assert not admits(grammar, '{"a"}')


@pytest.mark.parametrize(
    ("text", "said", "unsaid"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["maybe", ""]),
        (r'root ::= "\u00e9" [\u0430-\u044f]+', ["éда"], ["e", "é"]),
        (r'root ::= "\x41\u0042"', ["AB"], ["A"]),
        ('root ::= [^0-9]{2,3} # three at most\n', ["ab", "a\nb"], ["a", "abcd", "a1"]),
        ("root ::= item+\nitem ::= \"- \" [a-z]+ \"\\n\"", ["- a\n- bc\n"], ["- a"]),
    ],
)  # fmt: skip
def test_a_grammar_admits_what_it_describes(text, said, unsaid):
    grammar = compiled(GBNF(text))
    assert [admits(grammar, each) for each in said] == [True] * len(said)
    assert [admits(grammar, each) for each in unsaid] == [False] * len(unsaid)


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        r'root ::= "\ud800"',
        "start ::= \"a\"",
        'root ::= "a',
        "root ::= missing",
        'root ::= "a" | %json {}',
        "root ::= " + "(" * 3000 + '"a"' + ")" * 3000,
        'root ::= "' + "x" * (1 << 20) + '"',
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_what_is_no_grammar_is_refused(text):
    with pytest.raises(GrammarError, match=r"^[^\n]+$"):
        compiled(GBNF(text))


def test_a_grammar_is_compiled_once_and_the_longest_unused_is_forgotten():
    compiler = GrammarCompiler(ByteTokenizer(), VOCABULARY)
    first, second = compiler.compile(JSONSchema("true")), compiler.compile(JSONSchema("{}"))
    assert compiler.compile(JSONSchema("true"), spaced=True) is not first
    for number in range(KEPT - 2):
        assert compiler.compile(JSONSchema("true")) is first
        compiler.compile(JSONSchema(json.dumps({"const": number})))
    assert compiler.compile(JSONSchema("true")) is first
    assert compiler.compile(JSONSchema("{}")) is not second


def test_large_grammars_are_forgotten_sooner():
    compiler = GrammarCompiler(ByteTokenizer(), VOCABULARY)
    schemas = [JSONSchema(json.dumps({"const": str(number) + "x" * (KEPT_CHARACTERS // 3)})) for number in range(3)]
    first, second, third = map(compiler.compile, schemas)
    assert compiler.compile(schemas[2]) is third
    assert compiler.compile(schemas[1]) is second
    assert compiler.compile(schemas[0]) is not first


def test_answers_to_one_grammar_are_independent():
    grammar = compiled('{"enum":["ab","cd"]}')
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(ord('"'))
    first.accept(ord("c"))
    assert allowed(first.mask()) == {ord("d")}
    assert allowed(second.mask()) == {ord('"')}


def test_grammars_are_compiled_in_several_threads_at_once():
    compiler = GrammarCompiler(ByteTokenizer(), VOCABULARY)
    schemas = [json.dumps({"enum": [number % 5, "x" * number]}) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda schema: compiler.compile(JSONSchema(schema)), schemas))
    assert all(admits(grammar, str(number % 5)) for number, grammar in enumerate(found))
