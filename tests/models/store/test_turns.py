"""Chat formats are found by asking a template; what they say is what it says."""

import pytest

from models.store.go_chat import go_template
from models.store.turns import DATE, SYSTEM, TOOLS, Turns, turns_of

# Names and arguments between tags, tools in the system message, a turn for each run of results.
TAGGED = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = 'Be kind.' %}{% set rest = messages %}{% endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{{- '\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools>' }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
{%- if message.role == 'tool' %}
{%- if rest[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or rest[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# Tools as a list of functions in front of the first user's words, one call at a time, results as JSON text.
LISTED = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- '[S]' + messages[0].content + '[/S]' }}
{%- set messages = messages[1:] %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[U]' }}
{%- if loop.first and tools %}{{- tools | map(attribute='function') | list | tojson(indent=2) + '\\n' }}{% endif %}
{{- message.content | trim + '[/U]' }}
{%- elif message.role == 'tool' %}{{- '[R]' + message.content | tojson + '[/R]' }}
{%- elif message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson + '}' + eos_token }}
{%- else %}{{- message.content + eos_token }}{% endif %}
{%- endfor %}"""
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


def test_a_format_is_the_texts_between_the_words():
    turns = turns_of(PLAIN, None)
    assert turns == Turns(
        openings={(False, False): "<user>", (True, False): f"<system>{SYSTEM}</system><user>"},
        following={
            ("u", "a"): "</user><assistant>",
            ("a", "u"): "</assistant><user>",
            ("u", "end"): "</user><assistant>",
        },
    )
    assert turns.text(("s", "u1", "a1", "u2")) == (
        "<system>zq-s-qz</system><user>zq-u1-qz</user><assistant>zq-a1-qz</assistant><user>zq-u2-qz</user><assistant>"
    )


def test_tools_that_are_told_of_one_by_one_and_called_between_tags():
    turns = turns_of(TAGGED, None)
    assert turns is not None
    assert turns.openings[True, True] == (
        f"<|im_start|>system\n{SYSTEM}\n<tools>\n{TOOLS}\n</tools><|im_end|>\n<|im_start|>user\n"
    )
    assert turns.openings[False, False] == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    calls = turns.calls
    assert calls is not None
    assert (calls.of_functions, calls.between_tools) == (False, "\n")
    assert (calls.opening, calls.within) == ('<tool_call>\n{"name": "', '", "arguments": ')
    assert calls.between == '}\n</tool_call><tool_call>\n{"name": "'
    assert turns.following["c", "r"] == "}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n"
    assert turns.following["r", "r"] == "\n</tool_response>\n<tool_response>\n"
    assert turns.following["r", "end"] == "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def test_tools_that_are_a_list_of_functions_and_called_one_at_a_time():
    turns = turns_of(LISTED, "</s>")
    assert turns is not None
    calls = turns.calls
    assert calls is not None
    assert (calls.of_functions, calls.between_tools) == (True, None)
    assert turns.openings == {
        (False, False): "[U]",
        (True, False): f"[S]{SYSTEM}[/S][U]",
        (False, True): f"[U]{TOOLS}\n",
        (True, True): f"[S]{SYSTEM}[/S][U]{TOOLS}\n",
    }
    assert (turns.following["c", "r"], turns.following["r", "a"]) == ('}</s>[R]"', '"[/R]')
    assert calls.between == '\n{"name": "'


def test_what_a_tool_says_is_json_in_gos_language_where_it_was_json_text():
    turns = turns_of(LISTED, "</s>")
    assert turns is not None
    made = go_template(turns)
    assert '{{ else if eq $last "c" }}}</s>[R]{{ else if eq $last "r" }}[/R][R]{{ end }}{{ json .Content }}' in made
    assert "{{ if $i }}, {{ end }}{{ json .Function }}" in made


def test_what_precedes_a_call_is_behind_the_condition_where_parents_look_for_it():
    turns = turns_of(TAGGED, None)
    assert turns is not None
    assert '{{ if .ToolCalls }}<tool_call>\n{"name": "{{ range $k, $c := .ToolCalls }}' in go_template(turns)


@pytest.mark.parametrize(
    ("template", "eos"),
    [
        # The last question is another than those before.
        ("{% for m in messages %}{% if loop.last %}[last]{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}", ""),
        # Answers are numbered.
        ("{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}", ""),
        ("{% for m in messages %}{{ bos_token }}[{{ m.role }}]{{ m.content }}{% endfor %}", ""),
        ("{{ messages[-1].content }}", ""),
        ("{{ raise_exception('never') }}", ""),
        ("{% for", ""),
        # Nobody knows how an answer ends.
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}", None),
    ],
)
def test_what_goes_by_more_than_whose_turn_it_is_is_given_up(template: str, eos: str | None):
    assert turns_of(template, eos) is None


@pytest.mark.parametrize(
    "tools",
    [
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
        "{% for t in tools or [] %}- {{ t.function.description }} {{ t | tojson }}{% endfor %}",
        "",
    ],
)
def test_tools_that_are_told_of_otherwise_than_in_json_are_left_out(tools: str):
    turns = turns_of(tools + TAGGED.replace("{%- if tools %}", "{%- if false %}"), None)
    assert turns is not None
    assert turns.calls is None
    assert ".Tools" not in go_template(turns)


def test_calls_that_go_by_their_ids_are_left_out():
    turns = turns_of(TAGGED.replace("'<tool_call>", "call.id + '<tool_call>"), None)
    assert turns is not None
    assert turns.calls is None


def test_tools_of_which_more_is_said_than_whose_turn_it_is_are_left_out():
    """The second result is numbered, which no single round of calls shows."""
    turns = turns_of(
        TAGGED.replace("'\\n<tool_response>\\n'", "'\\n<tool_response>\\n' + '.' * (loop.index // 4)"), None
    )
    assert turns is not None
    assert turns.calls is None


def test_a_question_behind_what_a_tool_said_follows_an_answer_of_nothing():
    turns = turns_of(LISTED, "</s>")
    assert turns is not None
    assert '{{ else if eq $last "r" }}[/R]</s>[U]{{ end }}' in go_template(turns)


def test_a_model_without_system_messages_hears_them_from_the_user():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    silent = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    for template in (refusing, silent):
        turns = turns_of(template, None)
        assert turns is not None
        assert turns.openings[True, False] == f"<user>{SYSTEM}\n\n"


def test_the_date_is_the_day_of_the_chat():
    turns = turns_of("{{ strftime_now('%d %b %Y') }}" + PLAIN, None)
    assert turns is not None
    assert turns.openings[False, False] == f"{DATE}<user>"
    assert "{{ currentDate }}<user>" in go_template(turns)


def test_braces_are_text():
    turns = turns_of(PLAIN.replace("<assistant>", "{{ '{{ x }} {' }}"), None)
    assert turns is not None
    assert turns.following["u", "end"] == "</user>{{ x }} {"
    assert '</user>{{ "{{" }} x }} {{ "{" }}' in go_template(turns)
