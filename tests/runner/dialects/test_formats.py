"""What parents and people say of an answer's form, in all three dialects."""

import io
import json

import pytest

from models.grammar import GBNF, JSONSchema, OutputFormat
from runner.config import DialectName
from runner.dialects.formats import MAX_BYTES, output_format
from runner.errors import BadRequest
from tests.fakes_wire import serve

OBJECT = {"type": "object"}
SCHEMA = {"properties": {"z": {"type": "string"}, "a": {"const": "é"}}}
SCHEMA_TEXT = '{"properties":{"z":{"type":"string"},"a":{"const":"é"}}}'
PATHS = {DialectName.MLX: "/v1/completions", DialectName.CLASSIC: "/completion", DialectName.IMAGEGEN: "/completion"}
every_dialect = pytest.mark.parametrize("dialect", DialectName)


def tag(schema):
    return {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}


def const(text):
    return {"type": "const_string", "value": text}


def thinking(schema, closing, excludes):
    content = {"type": "sequence", "elements": [closing, {"type": "json_schema", "json_schema": schema}]}
    elements = [{"type": "any_text", "excludes": excludes}, {"type": "optional", "content": content}]
    return {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}


UNDERSTOOD = [
    ({"Format": "json"}, OutputFormat(JSONSchema('{"type":"object"}'))),
    ({"Format": SCHEMA}, OutputFormat(JSONSchema(SCHEMA_TEXT))),
    ({"Format": tag(SCHEMA)}, OutputFormat(JSONSchema(SCHEMA_TEXT))),
    ({"Format": tag(OBJECT)}, OutputFormat(JSONSchema('{"type":"object"}'))),
    ({"Format": thinking(SCHEMA, const("</t>"), ["</t>"])}, OutputFormat(JSONSchema(SCHEMA_TEXT), ("</t>",))),
    (
        {"Format": thinking(OBJECT, {"type": "or", "elements": [const("a"), const("b")]}, ["b", "a"])},
        OutputFormat(JSONSchema('{"type":"object"}'), ("a", "b")),
    ),
    ({"Grammar": 'root ::= "é"'}, OutputFormat(GBNF('root ::= "é"'))),
    ({"Format": SCHEMA, "Grammar": "root ::= x"}, OutputFormat(JSONSchema(SCHEMA_TEXT))),
    ({"Format": "", "Grammar": ""}, None),
    ({"Format": None}, None),
    ({}, None),
]


@every_dialect
@pytest.mark.parametrize(("fields", "wanted"), UNDERSTOOD, ids=range(len(UNDERSTOOD)))
async def test_a_format_is_understood(dialect, fields, wanted):
    spelled = {name.lower(): value for name, value in fields.items()} if dialect is DialectName.IMAGEGEN else fields
    async with serve(dialect) as served:
        assert (await served.post(PATHS[dialect], json={"prompt": "p", **spelled}))[0] == 200
        (request,) = served.loop.requests
        assert request.format == wanted


REFUSED = [
    ({"Format": "xml"}, "must be"),
    ({"Format": True}, "must be"),
    ({"Format": []}, "must be"),
    ({"Format": 3}, "must be"),
    ({"Format": {"type": "structural_tag"}}, "needs a format"),
    ({"Format": {"type": "structural_tag", "format": "json"}}, "needs a format"),
    ({"Format": {"type": "structural_tag", "format": {"type": "regex", "pattern": "a"}}}, "regex"),
    ({"Format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {}, "style": 1}}}, "form"),
    ({"Format": thinking(OBJECT, const("a"), ["b"])}, "any_text must exclude"),
    ({"Format": thinking(OBJECT, const("a"), ["a", "b"])}, "any_text must exclude"),
    ({"Format": thinking(OBJECT, const(""), [""])}, "const_string"),
    ({"Format": thinking(OBJECT, {"type": "any_text"}, ["a"])}, "const_string"),
    ({"Format": thinking(OBJECT, {"type": "or", "elements": []}, ["a"])}, "any_text must exclude"),
    ({"Format": thinking(OBJECT, const("x" * 65), ["x" * 65])}, "closings"),
    ({"Format": {"const": "x" * MAX_BYTES}}, "larger than 1 MiB"),
    ({"Grammar": "x" * (MAX_BYTES + 1)}, "larger than 1 MiB"),
]


@every_dialect
@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=range(len(REFUSED)))
async def test_what_is_no_format_is_refused_with_the_reason_before_the_first_header(dialect, fields, reason):
    async with serve(dialect) as served:
        large = io.BytesIO(json.dumps({"prompt": "p", **fields}).encode())
        status, body = await served.post(PATHS[dialect], data=large)
        assert status == 400
        assert body.decode().startswith("invalid ")
        assert reason in body.decode()
        assert served.loop.requests == []


@every_dialect
@pytest.mark.parametrize("value", [b'{"const":"\xff"}', b'{"const":"\\ud800"}', b'{"\xc3":1}'])
async def test_a_format_that_is_not_utf_8_is_refused(dialect, value):
    async with serve(dialect) as served:
        status, body = await served.post(PATHS[dialect], data=b'{"prompt":"p","format":' + value + b"}")
        assert (status, body) == (400, b"invalid format: not UTF-8, or half of a surrogate pair\n")
        status, body = await served.post(PATHS[dialect], data=b'{"prompt":"p","grammar":"root ::= \xff"}')
        assert (status, body) == (400, b"invalid grammar: not UTF-8\n")


@every_dialect
async def test_a_format_of_a_thousand_levels_is_refused(dialect):
    async with serve(dialect) as served:
        for levels in (900, 20_000):
            schema = b'{"not":' * levels + b"{}" + b"}" * levels
            status, _ = await served.post(PATHS[dialect], data=b'{"prompt":"p","format":' + schema + b"}")
            assert status in (200, 400), "the engine refuses what the dialect lets through"
            assert (await served.post(PATHS[dialect], json={"prompt": "p"}))[0] == 200


def test_a_number_beyond_all_measure_is_refused():
    with pytest.raises(BadRequest, match="out of range"):
        output_format(grammar="", schema=json.loads('{"maximum":1e999}'))
