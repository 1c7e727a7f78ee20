"""A JSON schema made ready for the engine, with nothing changed in which answers satisfy it.

What validates nothing is taken out where the engine stumbles over it (annotations beside a `$ref`, formats that the
specification does not know), and `x-guidance`, by which a schema could give the engine orders of its own.

JSON Schema allows keys that a schema does not declare, and what is no object where it declares some but names no type;
Ollama generates neither. `narrowed` follows Ollama: a part of the answers that the schema allows. It leaves schemas
alone in which a value is described by several subschemas at once, for what one does not declare may be another's.

Source: JSON Schema draft 2020-12, core and validation.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from models.errors import GrammarError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Schema: TypeAlias = dict[str, "JSON"]
_Change: TypeAlias = Callable[[Schema], Schema]

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 128
"""Ollama's limits."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OLD_DRAFT: Final = re.compile(r"json-schema\.org/draft-0[3467]/")
_ORDERS: Final = "x-guidance"
_SUBSCHEMA: Final = _words(
    "additionalItems additionalProperties contains contentSchema else if items not propertyNames then "
    "unevaluatedItems unevaluatedProperties"
)
_SUBSCHEMAS: Final = _words("allOf anyOf items oneOf prefixItems")
_NAMED_SUBSCHEMAS: Final = _words("$defs definitions dependencies dependentSchemas patternProperties properties")
_ANNOTATIONS: Final = _words(
    "$comment $schema default deprecated description example examples readOnly title writeOnly"
)
_DEFINITIONS: Final = _words("$defs $id definitions id")
_IN_PLACE: Final = _words("allOf anyOf oneOf")
_FORMATS: Final = _words(
    "date date-time duration email hostname idn-email idn-hostname ipv4 ipv6 iri iri-reference json-pointer "
    "regex relative-json-pointer time uri uri-reference uri-template uuid"
)
_SHARING: Final = _words(
    "$dynamicRef $recursiveRef allOf dependencies dependentSchemas if not oneOf unevaluatedProperties"
)
"""Keywords by which several subschemas describe one value, or by which a schema asks what does not satisfy another."""
_TELLING: Final = {"object": _words("properties"), "array": _words("items prefixItems")}
"""Keywords that tell a type that is not named."""
_OF_OBJECTS: Final = _words(
    "additionalProperties maxProperties minProperties patternProperties properties propertyNames required"
)


def parsed(text: str) -> Schema:
    """The schema as it is given to the engine; `true` becomes the empty schema.

    Raises:
        GrammarError: it is no schema, or larger or deeper than a request may bring.
    """
    check_size(text, "schema")
    try:
        schema: JSON = json.loads(text)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise GrammarError("the schema is not UTF-8, or holds half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from error
    if depth(schema) > MAX_DEPTH:
        raise GrammarError(f"the schema is nested deeper than {MAX_DEPTH} levels")
    if schema is True:
        return {}
    if schema is False:
        raise GrammarError("the schema is false, which no answer satisfies")
    if not isinstance(schema, dict):
        raise GrammarError("a schema must be an object")
    return _Plain.of(schema, text)(schema)


def check_size(text: str, what: str) -> None:
    """Raises GrammarError where a request may not bring so much."""
    if len(text) > MAX_BYTES:
        raise GrammarError(f"the {what} is larger than {MAX_BYTES >> 20} MiB")


def narrowed(schema: Schema) -> Schema:
    """A part of what a schema allows: what declares keys is an object and has no others, what has items an array."""
    if any(map(_is_shared, _nodes(schema))):
        return schema
    return _narrowed(schema)


def depth(value: JSON) -> int:
    """How many arrays and objects lie within each other at most."""
    deepest, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        deepest += 1
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    return deepest


@dataclass(frozen=True, slots=True)
class _Plain:
    """Writes a schema in fewer words of the same meaning."""

    ref_is_alone: bool
    """To draft 7 what stands beside a `$ref` says nothing."""
    counts_evaluated: bool
    """Whether a keyword has looked at a key matters to another."""
    root: Schema | None
    """What a `$ref` that begins with # is into; None: subschemas have addresses of their own."""

    @classmethod
    def of(cls, root: Schema, text: str) -> "_Plain":
        named = any(isinstance(node.get(name), str) for node in _nodes(root)[1:] for name in ("$id", "id"))
        old = _OLD_DRAFT.search(str(root.get("$schema"))) is not None
        return cls(old, '"unevaluated' in text, None if named else root)

    def __call__(self, schema: Schema) -> Schema:
        kept = {name: _applied(name, value, self) for name, value in schema.items() if not self._idle(name, schema)}
        inner = kept.get("allOf")
        if isinstance(inner, list) and len(inner) == 1 and isinstance(only := inner[0], dict):
            outer = {name: value for name, value in kept.items() if name != "allOf"}
            apart = _ANNOTATIONS | _DEFINITIONS | (set() if "$ref" in only else {"type"})
            # Other keywords look at what stands beside them.
            if outer.keys() <= apart and not outer.keys() & only.keys():
                return outer | only
        return kept

    def _idle(self, name: str, schema: Schema) -> bool:
        """Whether a keyword validates nothing where it stands."""
        value = schema[name]
        if name == _ORDERS or (name == "format" and not (isinstance(value, str) and value in _FORMATS)):
            return True
        if "$ref" in schema and name != "$ref" and name not in _DEFINITIONS:
            return self.ref_is_alone or name in _ANNOTATIONS
        if name == "additionalProperties" and value in (True, {}):
            of_others = schema.keys() & {"properties", "patternProperties"}
            return not of_others and bool(schema.keys() & _IN_PLACE) and not self.counts_evaluated
        return name == "type" and self._says(schema, value)

    def _says(self, schema: Schema, kind: JSON) -> bool:
        """Whether subschemas in place of this one have its type already."""
        return any(
            isinstance(branches, list) and branches and all(self._target(each).get("type") == kind for each in branches)
            for branches in (schema.get(name) for name in _IN_PLACE)
        )

    def _target(self, schema: JSON) -> Schema:
        """What a schema that is a reference refers to, or itself; empty if that is not known."""
        found: JSON = schema
        if isinstance(schema, dict) and isinstance(path := schema.get("$ref"), str):
            found = self.root
            for name in path.split("/")[1:]:
                found = found.get(name) if isinstance(found, dict) and path.startswith("#/") else None
        return found if isinstance(found, dict) else {}


def _narrowed(schema: Schema) -> Schema:
    schema = {name: _applied(name, value, _narrowed) for name, value in schema.items()}
    if schema.keys() & {"enum", "const"}:
        return schema
    declared, required = schema.get("properties"), schema.get("required", [])
    kinds = [kind for kind, words in _TELLING.items() if schema.keys() & words]
    if len(kinds) == 1 and not schema.keys() & {"type", "$ref", "anyOf"}:
        schema["type"] = kinds[0]
    if (
        isinstance(declared, dict)
        and declared
        and not schema.keys() & {"additionalProperties", "patternProperties"}
        and isinstance(required, list)
        and all(name in declared for name in required)
        and not _exceeds(schema.get("minProperties"), len(declared))
    ):
        schema["additionalProperties"] = False
    return schema


def _exceeds(count: JSON, most: int) -> bool:
    return isinstance(count, int | float) and count > most


def _is_shared(schema: Schema) -> bool:
    """Whether an object may be described by this and by another subschema as well."""
    beside = schema.keys() & _OF_OBJECTS
    return bool(schema.keys() & _SHARING) or bool(beside and schema.keys() & {"$ref", "anyOf"})


def _applied(name: str, value: JSON, change: _Change) -> JSON:
    """A keyword's value with the schemas in it changed."""
    if isinstance(value, dict):
        if name in _SUBSCHEMA:
            return change(value)
        if name in _NAMED_SUBSCHEMAS:
            return {key: change(each) if isinstance(each, dict) else each for key, each in value.items()}
    if isinstance(value, list) and name in _SUBSCHEMAS:
        return [change(each) if isinstance(each, dict) else each for each in value]
    return value


def _nodes(schema: Schema) -> list[Schema]:
    """The schema and all in it."""
    found = [schema]

    def note(each: Schema) -> Schema:
        found.append(each)
        return each

    for each in found:
        for name, value in each.items():
            _applied(name, value, note)
    return found
