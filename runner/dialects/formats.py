"""What a request says of its answer's form: "json", a schema, one of Ollama's structural tags, or a GBNF grammar.

Parents up to v0.24 send a schema together with the grammar that they made of it; the schema says more. From v0.34 on
they wrap it into a structural tag, since v0.34.4 with the thinking that comes before it.

Source: llm/server.go at v0.24.0; mlxrunner/client.go and mlxrunner/grammar.go at v0.34.0 and v0.34.4.
"""

import json
from typing import Final

from models.grammar import GBNF, JSONSchema, OutputFormat
from protocol.gojson import JSON
from runner.errors import BadRequest

MAX_BYTES: Final = 1 << 20
MAX_CLOSINGS, MAX_CLOSING_BYTES = 8, 64
"""Each place in a closing is sought in the whole vocabulary."""
_ANY_OBJECT: Final = JSONSchema('{"type":"object"}')


def output_format(*, grammar: str, schema: object) -> OutputFormat | None:
    """What the answer is held to; null and "" mean nothing.

    Raises:
        BadRequest: it is none of what this runner knows, or larger than a request may bring.
    """
    if schema is not None and schema != "":
        return _format(schema)
    if not grammar:
        return None
    if "\ufffd" in grammar:
        raise BadRequest("invalid grammar: not UTF-8")
    if len(grammar.encode()) > MAX_BYTES:
        raise BadRequest(f"invalid grammar: larger than {MAX_BYTES >> 20} MiB")
    return OutputFormat(GBNF(grammar))


def _format(value: object) -> OutputFormat:
    match value:
        case "json":
            return OutputFormat(_ANY_OBJECT)
        case {"type": "structural_tag", "format": dict(tag)}:
            return _tag(tag)
        case {"type": "structural_tag"}:
            raise _invalid("a structural tag needs a format that is an object")
        case dict():
            return OutputFormat(_schema(value))
    raise _invalid('it must be "json", a JSON schema or a structural tag')


def _tag(tag: dict[str, JSON]) -> OutputFormat:
    match tag:
        case {"type": "json_schema", "json_schema": schema, **others} if not others:
            return OutputFormat(_schema(schema))
        case {
            "type": "sequence",
            "elements": [
                {"type": "any_text", "excludes": list(excluded)},
                {
                    "type": "optional",
                    "content": {
                        "type": "sequence",
                        "elements": [closing, {"type": "json_schema", "json_schema": schema}],
                    },
                },
            ],
        }:
            return OutputFormat(_schema(schema), _closings(closing, excluded))
    raise _invalid(f"a structural tag of the type {_shown(tag.get('type'))} and this form is not known")


def _closings(closing: JSON, excluded: list[JSON]) -> tuple[str, ...]:
    """What ends the thinking."""
    alternatives = closing["elements"] if isinstance(closing, dict) and closing.get("type") == "or" else [closing]
    found: list[str] = []
    for each in alternatives if isinstance(alternatives, list) else ():
        match each:
            case {"type": "const_string", "value": str(text)} if text:
                found.append(text)
            case _:
                raise _invalid("what ends any_text must be a const_string, or an or of several")
    if {*map(_shown, excluded)} != {*map(_shown, found)}:
        raise _invalid("any_text must exclude what follows it, and nothing else")
    if len(found) > MAX_CLOSINGS or any(len(_utf8(text)) > MAX_CLOSING_BYTES for text in found):
        raise _invalid(f"at most {MAX_CLOSINGS} closings of {MAX_CLOSING_BYTES} bytes are allowed")
    return tuple(dict.fromkeys(found))


def _schema(value: object) -> JSONSchema:
    """A schema as text; whether it can be enforced is found out where it is compiled."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise _invalid(f"a number is out of range: {error}") from error
    except RecursionError as error:
        raise _invalid("nested too deeply") from error
    if len(_utf8(text)) > MAX_BYTES:
        raise _invalid(f"larger than {MAX_BYTES >> 20} MiB")
    return JSONSchema(text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _invalid("not UTF-8, or half of a surrogate pair") from error


def _shown(value: JSON) -> str:
    return json.dumps(value)[:64]


def _invalid(reason: str) -> BadRequest:
    return BadRequest(f"invalid format: {reason}")
