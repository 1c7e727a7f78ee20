"""Chats with models of several families, created by Ollama servers: what prompt arrives, and where an answer ends."""

import dataclasses
import json
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")

from models.chat_template import render_chat  # noqa: E402
from tests.models.store.test_turns import LISTED, TAGGED  # noqa: E402
from tests.ollama import record, scripted  # noqa: E402
from tests.ollama.families import CLASSIC, CONVERSATION, HARMONY, HARMONY_CALL, HARMONY_THOUGHTS, NEWEST, YES  # noqa: E402
from tests.ollama.programs import BIN, VERSIONS  # noqa: E402
from tests.ollama.server import RUNNER, Server, run_ollama  # noqa: E402
from tests.ollama.store import Store  # noqa: E402

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(180)]
MESSAGES = [{"role": role, "content": content} for role, content in CONVERSATION]
GREEDY = {"temperature": 0, "num_predict": 20}
# Replaces what the parent would add, so that the model's tokens alone end the answer.
NO_STRING = {"stop": ["nothing like it"]}
AFTER = "no"
classic = pytest.mark.parametrize("version", ["classic"], indirect=True, scope="module")
newest = pytest.mark.parametrize("version", ["newest"], indirect=True, scope="module")
NAMES = (f"model{number}" for number in count())


@pytest.fixture(scope="module")
def recorder(version, tmp_path_factory):
    """A server whose runner's requests are kept, and the folder of these."""
    folder = tmp_path_factory.mktemp("families")
    script = folder / "recorder"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{record.__file__}" "$@"\n')
    script.chmod(0o755)
    kept = {"OLLAMA_MLX_RUNNER_RECORDED": RUNNER, "OLLAMA_MLX_RUNNER_RECORD": folder / "record"}
    with Server(version, Store(folder / "models"), folder, runner=script, **kept) as server:
        yield server


@pytest.fixture(scope="module")
def jinja():
    """The Jinja templates that the classic parent recognises, by name: the models' own."""
    if not shutil.which("go"):
        pytest.skip("there is no Go to ask for Ollama's templates")
    module = ["-modfile", f"{VERSIONS['classic']}.mod", "-m", "-f", "{{.Dir}}", "github.com/ollama/ollama"]
    folder = subprocess.run(["go", "list", *module], cwd=BIN.parent, capture_output=True, text=True, check=True).stdout
    entries = json.loads((Path(folder.strip()) / "template" / "index.json").read_text(encoding="utf-8"))
    return lambda name, number: [entry["template"] for entry in entries if entry["name"] == name][number]


@pytest.fixture
def create(recorder, parity, tmp_path):
    """`create(family, pieces)`: the name of a model that says these behind the family's prompt, and then AFTER."""

    def make(family, says, chat_template="{{ messages }}"):
        name = next(NAMES)
        says = (family.opening, *says, *AFTER)
        if recorder.version == VERSIONS["classic"]:
            base, source = parity / f"{family.base}.gguf", tmp_path / f"{name}.gguf"
            scripted.write_gguf(base, source, family.vocabulary, says, chat_template)
        else:
            source = tmp_path / name
            scripted.write_folder(parity / family.base, source, family.vocabulary, says, chat_template)
        modelfile = tmp_path / "Modelfile"
        modelfile.write_text(f"FROM {source}\n" + (f'TEMPLATE """{family.template}"""\n' if family.template else ""))
        flags = [] if recorder.version == VERSIONS["classic"] else ["--experimental"]
        created = run_ollama(recorder, "create", name, *flags, "-f", str(modelfile))
        assert created.returncode == 0, created.stderr
        return name

    return make


def prompt_of(server):
    """The last prompt that reached a runner."""
    requests = (server.home / "record").glob("*completion*.request")
    return json.loads(max(requests, key=lambda file: file.stat().st_mtime_ns).read_bytes())["Prompt"]


def chat(server, name, **options):
    return server.client.chat(name, MESSAGES, options={**GREEDY, **options}, keep_alive=0)


@classic
@pytest.mark.parametrize("family", [name for name, family in CLASSIC.items() if family.known_as[0]])
def test_a_files_own_template_makes_the_prompt(recorder, create, jinja, family):
    family = CLASSIC[family]
    template = jinja(*family.known_as)
    bos = family.vocabulary.bos
    expected = render_chat(template, MESSAGES, bos_token=bos, eos_token=family.vocabulary.eos[0])
    assert expected.removeprefix(bos) == family.prompt
    answer = chat(recorder, create(family, (*YES, family.ends[0]), template))
    assert prompt_of(recorder) == family.prompt
    assert answer.prompt_eval_count == family.vocabulary.count(family.prompt)
    assert (answer.message.content, answer.done_reason) == ("Yes", "stop")


ENDS = [(name, end) for name, family in CLASSIC.items() for end in family.ends]


@classic
@pytest.mark.parametrize(("family", "end"), ENDS)
def test_each_of_a_familys_end_tokens_ends_the_answer_by_itself(recorder, create, family, end):
    family = CLASSIC[family]
    name = create(family, (*YES, end))
    answer = recorder.client.generate(name, family.prompt, raw=True, options={**GREEDY, **NO_STRING}, keep_alive=0)
    assert (answer.response, answer.done_reason) == ("Yes", "stop")


@classic
def test_a_template_of_a_users_own_makes_the_prompt(recorder, create):
    family = CLASSIC["mistral v7"]
    answer = chat(recorder, create(family, (*YES, "</s>")))
    assert prompt_of(recorder) == family.prompt
    assert answer.prompt_eval_count == family.vocabulary.count(family.prompt)
    assert (answer.message.content, answer.done_reason) == ("Yes", "stop")


@classic
@pytest.mark.parametrize("end", HARMONY.ends)
def test_harmonys_channels_reach_the_parents_parser_and_its_two_ends_end(recorder, create, end):
    answer = chat(recorder, create(HARMONY, ("<|channel|>", "final", "<|message|>", *YES, end)))
    assert prompt_of(recorder) == HARMONY.prompt
    assert answer.prompt_eval_count == HARMONY.vocabulary.count(HARMONY.prompt)
    assert (answer.message.content, answer.message.thinking) == ("Yes", None)
    assert answer.done_reason == "stop"


@classic
def test_harmonys_end_of_a_message_is_not_the_end_of_the_answer(recorder, create):
    answer = chat(recorder, create(HARMONY, (*HARMONY_THOUGHTS, "<|return|>")))
    assert (answer.message.thinking, answer.message.content) == ("Hm", "Yes")
    assert answer.done_reason == "stop"


@newest
@pytest.mark.parametrize(("family", "end"), [(name, end) for name, family in NEWEST.items() for end in family.ends])
def test_a_safetensors_models_renderer_makes_the_prompt_and_its_tokens_end_the_answer(recorder, create, family, end):
    family = NEWEST[family]
    name = create(family, (*YES, end))
    answer = recorder.client.chat(name, MESSAGES, think=False, options={**GREEDY, **NO_STRING}, keep_alive=0)
    assert prompt_of(recorder) == family.prompt
    assert answer.prompt_eval_count == family.vocabulary.count(family.prompt)
    assert (answer.message.content, answer.done_reason) == ("Yes", "stop")


@pytest.fixture
def gpt_oss(recorder, parity, tmp_path):
    """`gpt_oss(pieces)`: the name of a gpt-oss that this runner created and that says these, and then AFTER."""

    def make(says):
        name, marks = next(NAMES), "".join(HARMONY.vocabulary.special)
        pieces = (HARMONY.opening, *says, *AFTER)
        source = scripted.write_folder(parity / "gpt_oss", tmp_path / name, HARMONY.vocabulary, pieces, marks)
        command = [RUNNER, "create", name, "--from", source, "--store", recorder.environ["OLLAMA_MODELS"]]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return name

    return make


@newest
@pytest.mark.parametrize(("think", "level"), [(None, "medium"), ("high", "high")])
def test_gpt_oss_as_this_runner_creates_it_speaks_harmony(recorder, gpt_oss, think, level):
    name = gpt_oss((*HARMONY_THOUGHTS, "<|return|>"))
    messages = [{"role": "system", "content": "Be."}, *MESSAGES]
    answer = recorder.client.chat(name, messages, think=think, options=GREEDY, keep_alive=0)
    system, rest = prompt_of(recorder).split("<|end|>", 1)
    assert system.startswith("<|start|>system<|message|>You are ChatGPT")
    assert f"\nReasoning: {level}\n" in system
    assert system.endswith("# Valid channels: analysis, commentary, final. Channel must be included for every message.")
    assert rest == "<|start|>developer<|message|># Instructions\n\nBe.<|end|>" + HARMONY.prompt
    assert (answer.message.thinking, answer.message.content) == ("Hm", "Yes")
    assert answer.done_reason == "stop"


WEATHER = {
    "type": "function",
    "function": {
        # Harmony's names are TypeScript's, and the parent translates them both ways.
        "name": "get-weather",
        "description": "Look out of the window.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string", "description": "Which one."},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "days": {"type": ["integer", "null"]},
            },
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TYPES = """# Tools

## functions

namespace functions {

// Look out of the window.
type get_weather = (_: {
// Which one.
city: string,
days?: number | null,
unit?: "C" | "F",
}) => any;

type now = () => any;

} // namespace functions"""


@newest
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be."}]])
def test_gpt_oss_is_told_of_tools_and_calls_one(recorder, gpt_oss, system):
    name = gpt_oss(HARMONY_CALL)
    answer = recorder.client.chat(name, [*system, *MESSAGES], tools=[WEATHER, CLOCK], options=GREEDY, keep_alive=0)
    opening, developer, rest = prompt_of(recorder).split("<|end|>", 2)
    assert opening.endswith("message.\nCalls to these tools must go to the commentary channel: 'functions'.")
    instructions = "# Instructions\n\nBe.\n\n" if system else ""
    assert developer == f"<|start|>developer<|message|>{instructions}{TYPES}"
    assert rest == HARMONY.prompt
    (call,) = answer.message.tool_calls
    assert (call.function.name, dict(call.function.arguments)) == ("get-weather", {"city": "Paris"})
    assert (answer.message.content, answer.done_reason) == ("", "stop")


@newest
def test_gpt_oss_hears_what_its_tools_said_and_what_it_thought_of_them(recorder, gpt_oss):
    name = gpt_oss(("<|channel|>", "final", "<|message|>", *YES, "<|return|>"))
    call = {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
    turn = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo", "thinking": "forgotten"},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "I look.", "thinking": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_name": "now", "content": "noon"},
        {"role": "tool", "content": "sharp"},
    ]
    answer = recorder.client.chat(name, turn, options=GREEDY, keep_alive=0)
    assert prompt_of(recorder).split("<|end|>", 1)[1] == (
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Yo<|end|>"
        "<|start|>user<|message|>When?<|end|><|start|>assistant<|channel|>analysis<|message|>Hm<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"zone":"UTC"}<|call|>'
        "<|start|>functions.now to=assistant<|channel|>commentary<|message|>noon<|end|>"
        "<|start|>functions.now to=assistant<|channel|>commentary<|message|>sharp<|end|><|start|>assistant"
    )
    assert (answer.message.content, answer.done_reason) == ("Yes", "stop")


@newest
def test_gpt_oss_goes_on_with_an_answer_that_was_begun(recorder, gpt_oss):
    name = gpt_oss((*YES, "<|return|>"))
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "But"}]
    answer = recorder.client.chat(name, begun, options=GREEDY, keep_alive=0)
    assert prompt_of(recorder).endswith(
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>But"
    )
    assert (answer.message.content, answer.message.thinking, answer.done_reason) == ("Yes", None, "stop")


SUNNY = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Rome"}}}]},
    {"role": "tool", "tool_name": "look", "content": 'It is "sunny".'},
    {"role": "assistant", "content": "Sun."},
    {"role": "user", "content": "Go"},
]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look out of the window.",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}
CALLS = {
    "tagged": (TAGGED, '<tool_call>Ċ{"name":Ġ"look",Ġ"arguments":Ġ{"city":Ġ"Oslo"}}Ċ</tool_call>'),
    "listed": (LISTED, '{"name":Ġ"look",Ġ"parameters":Ġ{"city":Ġ"Oslo"}}'),
}


@newest
@pytest.mark.parametrize("format_", CALLS)
def test_a_models_own_chat_format_reaches_the_parent_tools_included(recorder, parity, tmp_path, format_):
    (template, says), name = CALLS[format_], next(NAMES)
    vocabulary = dataclasses.replace(CLASSIC["chatml"].vocabulary, words=(says,))
    opening = "Ċ" if template is TAGGED else "]"
    pieces = (opening, says, "<|im_end|>", *AFTER)
    source = scripted.write_folder(parity / "llama_gqa", tmp_path / name, vocabulary, pieces, template)
    command = [RUNNER, "create", name, "--from", source, "--store", recorder.environ["OLLAMA_MODELS"]]
    created = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert "chat format: the model's own, with tools" in created.stdout + created.stderr
    answer = recorder.client.chat(name, SUNNY, tools=[LOOK], options={**GREEDY, **NO_STRING}, keep_alive=0)
    eos = vocabulary.eos[0]
    assert without_spaces(prompt_of(recorder)) == without_spaces(
        render_chat(template, SUNNY, tools=[LOOK], bos_token="", eos_token=eos)
    )
    (call,) = answer.message.tool_calls
    assert (call.function.name, dict(call.function.arguments)) == ("look", {"city": "Oslo"})
    assert answer.done_reason == "stop"


def without_spaces(text):
    """JSON is spaced otherwise in Go."""
    return "".join(text.split())


THOUGHTS = {
    "gemma 4": ("<|channel>", "thoughtĊ", "H", "m", "<channel|>", *YES, "<turn|>"),
    "glm 4.7": ("H", "m", "</think>", *YES, "<|user|>"),
}


@newest
@pytest.mark.parametrize("family", THOUGHTS)
def test_a_safetensors_models_thoughts_reach_the_parents_parser(recorder, create, family):
    said = THOUGHTS[family]
    opening = {"glm 4.7": "<think>"}.get(family, NEWEST[family].opening)
    name = create(dataclasses.replace(NEWEST[family], opening=opening), said)
    answer = recorder.client.chat(name, MESSAGES, think=True, options=GREEDY, keep_alive=0)
    assert (answer.message.thinking, answer.message.content) == ("Hm", "Yes")
    assert answer.done_reason == "stop"
