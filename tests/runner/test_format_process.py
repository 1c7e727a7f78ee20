"""Structured output by the real process, of the real default model, as parents of each dialect ask for it."""

import asyncio
import json
from pathlib import Path

import jsonschema
import pytest

from runner.config import DialectName
from runner.parent import Child

pytestmark = [pytest.mark.model, pytest.mark.process]

SCHEMA = {
    "$defs": {
        "Kind": {"enum": ["lake", "sea", "river"], "title": "Kind", "type": "string"},
        "Place": {
            "type": "object",
            "title": "Place",
            "properties": {"name": {"type": "string", "maxLength": 30}, "kind": {"$ref": "#/$defs/Kind"}},
            "required": ["name", "kind"],
        },
    },
    "title": "Country",
    "type": "object",
    "properties": {
        "capital": {"title": "Capital", "type": "string", "maxLength": 20},
        "population": {"title": "Population", "type": "integer", "minimum": 0, "maximum": 10**9},
        "waters": {"type": "array", "items": {"$ref": "#/$defs/Place"}, "minItems": 1, "maxItems": 2},
        "note": {"anyOf": [{"type": "string", "maxLength": 40}, {"type": "null"}], "default": None},
    },
    "required": ["capital", "population", "waters"],
}
PROMPT = "<|im_start|>user\nTell me about {} as JSON.<|im_end|>\n<|im_start|>assistant\n"
COUNTRIES = ("France", "Kenya")
PATHS = {DialectName.MLX: "/v1/completions", DialectName.CLASSIC: "/completion", DialectName.IMAGEGEN: "/completion"}
DRAFTED = ["--draft=4", "--parallel=4", "--context=2048"]


def tag(schema):
    return {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}


async def post(child: Child, body) -> tuple[int, list[dict] | str]:
    """The status, and the lines of the answer or why there is none."""
    async with child.session.post(child.url + PATHS[child.dialect], json=body) as response:
        said = await response.text()
        return response.status, [json.loads(line) for line in said.splitlines()] if response.status == 200 else said


def text_of(lines: list[dict]) -> str:
    assert lines[-1].get("Done") or lines[-1].get("done"), lines[-1]
    assert not any("Error" in line or "error" in line for line in lines)
    return "".join(line.get("Content") or line.get("content") or "" for line in lines)


async def ready(child: Child) -> None:
    if child.dialect is DialectName.CLASSIC:
        await child.wait_answering()
        await child.load(context=2048, parallel=4)
    await child.wait_ready()


@pytest.mark.parametrize("dialect", DialectName)
async def test_the_default_model_answers_by_a_schema(spawn_runner, default_model: Path, dialect: DialectName):
    wanted = tag(SCHEMA) if dialect is DialectName.MLX else SCHEMA
    async with spawn_runner(default_model, dialect=dialect, flags=DRAFTED) as child:
        await ready(child)
        bodies = [
            {"prompt": PROMPT.format(country), "format": wanted, "options": {"num_predict": 300, **more}}
            for country in COUNTRIES
            for more in ({"temperature": 0}, {"temperature": 1.5, "seed": 3})
        ]
        free = {"prompt": PROMPT.format("Norway"), "options": {"num_predict": 60}}
        answers = await asyncio.gather(*(post(child, body) for body in [*bodies, free]))
        for status, lines in answers[:-1]:
            assert status == 200, lines
            jsonschema.validate(json.loads(text_of(lines)), SCHEMA)
        assert answers[-1][0] == 200
        assert len({text_of(lines) for _, lines in answers}) > len(COUNTRIES)


async def test_a_format_that_cannot_be_enforced_is_told_before_the_first_header(spawn_runner, default_model: Path):
    loose = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}, "maxItems": 3}
    async with spawn_runner(default_model, flags=["--strict-format", "--context=512"]) as child:
        await child.wait_ready()
        for schema, reason in ((loose, "uniqueItems"), ({"type": "foo"}, "foo"), ({"enum": []}, "Unsatisfiable")):
            status, said = await post(child, {"Prompt": "p", "Format": schema})
            assert (status, reason in said) == (400, True), said
        status, lines = await post(child, {"Prompt": "p", "Format": {"enum": [7]}})
        assert (status, text_of(lines)) == (200, "7")


async def test_what_is_not_enforced_is_named_in_the_log(spawn_runner, default_model: Path):
    loose = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}, "maxItems": 3}
    async with spawn_runner(default_model, flags=["--context=512"]) as child:
        await child.wait_ready()
        status, lines = await post(child, {"Prompt": "Count: ", "Format": loose})
        assert status == 200
        assert {*json.loads(text_of(lines))} <= {1, 2, 3}
        assert any("uniqueItems" in line and "enforced in part" in line for line in child.lines)


async def test_the_default_model_thinks_before_it_answers_by_a_schema(spawn_runner, default_model: Path):
    content = {
        "type": "sequence",
        "elements": [{"type": "const_string", "value": "."}, {"type": "json_schema", "json_schema": SCHEMA}],
    }
    elements = [{"type": "any_text", "excludes": ["."]}, {"type": "optional", "content": content}]
    thinking = {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}
    async with spawn_runner(default_model, flags=DRAFTED) as child:
        await child.wait_ready()
        body = {"Prompt": PROMPT.format("Iceland"), "Format": thinking, "Options": {"num_predict": 300}}
        status, lines = await post(child, body)
        assert status == 200
        thoughts, _, answer = text_of(lines).partition(".")
        assert thoughts
        jsonschema.validate(json.loads(answer), SCHEMA)
