import json

import jsonschema
import pytest

from models.errors import GrammarError
from models.grammar.schema import MAX_BYTES, MAX_DEPTH, depth, narrowed, parsed
from tests.models.grammar.vocabularies import admits, compiled


def plain(schema):
    return parsed(json.dumps(schema))


def nested(levels):
    schema = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize("text", ["", "{", '"json"', "[]", "1", "null", "false", '{"minimum":1e999}', '{"a":NaN}'])
def test_what_is_no_schema_is_refused(text):
    with pytest.raises(GrammarError, match="schema"):
        parsed(text)


def test_a_schema_that_allows_everything_may_be_true():
    assert parsed("true") == {}


def test_a_schema_may_be_as_large_and_as_deep_as_ollamas_and_no_more():
    assert depth(plain(nested(MAX_DEPTH))) == MAX_DEPTH
    with pytest.raises(GrammarError, match="deeper than 128"):
        plain(nested(MAX_DEPTH + 1))
    fitting = {"const": "x" * (MAX_BYTES - len('{"const": ""}'))}
    assert plain(fitting) == fitting
    with pytest.raises(GrammarError, match="larger than 1 MiB"):
        plain({"const": "x" * MAX_BYTES})


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(GrammarError, match="UTF-8"):
        parsed('{"const":"\\ud800"}')


def test_orders_to_the_engine_are_taken_out_wherever_a_schema_stands_and_nowhere_else():
    orders = {"x-guidance": {"lenient": True}}
    schema = {
        **orders,
        "properties": {"x-guidance": {"type": "null", **orders}},
        "$defs": {"a": {"items": [{"anyOf": [orders]}], **orders}},
        "additionalProperties": orders,
        "enum": [orders],
    }
    assert plain(schema) == {
        "properties": {"x-guidance": {"type": "null"}},
        "$defs": {"a": {"items": [{"anyOf": [{}]}]}},
        "additionalProperties": {},
        "enum": [orders],
    }


def test_a_format_that_the_specification_does_not_know_says_nothing():
    assert plain({"format": "topic"}) == {}
    assert plain({"format": {}}) == {}
    assert plain({"format": "date-time"}) == {"format": "date-time"}


def test_annotations_beside_a_reference_go_and_constraints_stay():
    reference = {"$ref": "#/$defs/a", "description": "d", "default": 1, "minimum": 3}
    assert plain(reference) == {"$ref": "#/$defs/a", "minimum": 3}
    assert plain({"properties": {"description": reference}}) == {
        "properties": {"description": {"$ref": "#/$defs/a", "minimum": 3}}
    }


def test_to_draft_seven_what_stands_beside_a_reference_says_nothing():
    definitions = {"definitions": {"a": {"type": "integer"}}}
    old = {"$schema": "http://json-schema.org/draft-07/schema#", **definitions, "items": {"$ref": "#", "minimum": 3}}
    assert plain(old)["items"] == {"$ref": "#"}
    assert plain({**old, "$schema": "https://json-schema.org/draft/2020-12/schema"})["items"] == old["items"]


TREE = {"type": "object", "properties": {"child": {"$ref": "#/$defs/tree"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "anyOf": [{"$ref": "#/$defs/tree"}]},
        {"type": "object", "additionalProperties": {}, "anyOf": [{"$ref": "#/$defs/tree"}]},
        {"allOf": [{"$ref": "#/$defs/tree"}], "description": "d"},
        {"allOf": [{"type": "object", "properties": {"a": {"$ref": "#/$defs/tree"}}}], "title": "t"},
    ],
)
def test_schemas_around_a_reference_that_leads_back_are_understood(schema):
    grammar = compiled(json.dumps({**schema, "$defs": {"tree": TREE}}))
    assert grammar.ignored == ()
    assert admits(grammar, "{}")
    assert not admits(grammar, "1")


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"allOf": [{"properties": {"a": {}}}], "additionalProperties": {"type": "boolean"}}, '{"b":true}', '{"a":1}'),
        ({"allOf": [{"prefixItems": [{"minimum": 3}]}], "items": {"minimum": 5}}, "[5]", "[3]"),
    ],
)
def test_a_keyword_that_looks_at_its_neighbours_keeps_them(schema, allowed, refused):
    grammar = compiled(json.dumps(schema))
    assert (admits(grammar, allowed), admits(grammar, refused)) == (True, False)


def test_a_type_beside_subschemas_stays_where_they_do_not_say_it():
    for branches in ([{"$ref": "#/$defs/tree"}, {}], [{"$ref": "http://elsewhere/"}], [{"$ref": "#/$defs/none"}], []):
        assert "type" in plain({"type": "object", "anyOf": branches, "$defs": {"tree": TREE}})
    moved = {"tree": TREE, "other": {"$id": "http://elsewhere/", "anyOf": []}}
    assert "type" in plain({"type": "object", "anyOf": [{"$ref": "#/$defs/tree"}], "$defs": moved})


def test_objects_are_closed_where_they_declare_their_keys():
    schema = {"properties": {"a": {"properties": {"b": {}}}, "c": {"type": "object"}}, "required": ["a"]}
    closed = {"type": "object", "additionalProperties": False}
    assert narrowed(schema) == {
        "properties": {"a": {"properties": {"b": {}}, **closed}, "c": {"type": "object"}},
        "required": ["a"],
        **closed,
    }


def test_what_declares_keys_is_an_object_and_what_has_items_an_array():
    assert narrowed({"properties": {}, "additionalProperties": {}})["type"] == "object"
    assert narrowed({"items": {}}) == {"items": {}, "type": "array"}
    assert narrowed({"anyOf": [{"prefixItems": [{}]}]}) == {"anyOf": [{"prefixItems": [{}], "type": "array"}]}
    for untold in ({}, {"minimum": 1}, {"items": {}, "properties": {}}, {"items": {}, "const": 1}, {"required": ["a"]}):
        assert "type" not in narrowed(untold)
    assert narrowed({"items": {}, "type": ["array", "null"]})["type"] == ["array", "null"]


DECLARED = {"properties": {"a": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**DECLARED, "additionalProperties": True},
        {**DECLARED, "patternProperties": {"^x": {}}},
        {**DECLARED, "required": ["b"]},
        {**DECLARED, "minProperties": 2},
        {**DECLARED, "const": {"b": 1}},
        {**DECLARED, "anyOf": [{"required": ["b"]}]},
        {**DECLARED, "$ref": "#/$defs/other"},
        {"allOf": [DECLARED, {"properties": {"b": {}}, "required": ["b"]}]},
        {"oneOf": [DECLARED, {"properties": {"a": {}, "b": {}}}]},
        {"not": DECLARED},
        {"if": DECLARED, "then": DECLARED},
        {"dependentSchemas": {"a": DECLARED}},
    ],
    ids=lambda schema: next(reversed(schema)),
)
def test_an_object_stays_open_where_closing_it_could_rule_out_what_it_asks_for(schema):
    assert "false" not in json.dumps(narrowed(schema))


def test_what_a_closed_schema_allows_the_schema_itself_allows():
    schema = {"properties": {"a": {"properties": {"b": {"type": "integer"}}}}, "anyOf": [{"type": "object"}, {}]}
    for instance in ({}, {"a": {}}, {"a": {"b": 1}}, {"c": 1}, {"a": {"c": 1}}, 3):
        if jsonschema.Draft202012Validator(narrowed(schema)).is_valid(instance):
            assert jsonschema.Draft202012Validator(schema).is_valid(instance)
