"""Chat templates as models ship them, and as nobody should."""

import json
from datetime import UTC, datetime

import pytest

from models.chat_template import render_chat
from models.errors import TokenizerError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def render(template: str, messages: list[dict[str, object]] = HELLO, **options: object) -> str:
    return render_chat(template, messages, **{"bos_token": "<s>", "eos_token": "</s>"} | options)


def test_a_chat_ends_with_the_opening_of_the_answer():
    assert render(CHATML) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_begin_and_end_are_known_to_the_template():
    assert render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}") == "<s>Hello</s>"
    assert render("{{ bos_token }}{{ eos_token }}", bos_token=None, eos_token=None) == ""


def test_blocks_leave_no_white_space_behind():
    assert render("  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n") == "Hello\n"


def test_loops_can_be_left_early():
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert render(template) == "02"


def test_json_is_not_escaped_for_html():
    messages = [{"role": "user", "content": "<é & 'x'>", "more": {"b": 1, "a": [None, True]}}]
    assert json.loads(render("{{ messages[0] | tojson }}", messages)) == messages[0]
    assert render("{{ messages[0].content | tojson }}", messages) == "\"<é & 'x'>\""
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_today_can_be_asked_for():
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now(tz=UTC).astimezone().year)


def test_training_marks_are_rendered_through():
    assert render("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}") == "Hello!"


def test_more_variables_reach_the_template():
    assert render("{{ tools[0] }}{{ enable_thinking }}", tools=["t"], enable_thinking=False) == "tFalse"


def test_a_template_may_refuse_the_messages():
    with pytest.raises(TokenizerError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0].content.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages | nosuchfilter }}",
        "{% include 'secret' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(strftime_now) }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * ['a'] }}",
        "{{ 9 ** 999999999 }}",
        "{{ ((((9 ** 99) ** 99) ** 99) ** 99) ** 99 }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | tojson(indent='x') | int(base=99) }}" + "{{ nothing() }}",
        "{{ lipsum.__globals__.os.popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error_and_nothing_else(template):
    with pytest.raises(TokenizerError, match="chat template"):
        render(template)


def test_ordinary_repetition_is_allowed():
    assert render("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}") == "---102412"


def test_the_messages_given_are_not_changed():
    messages = [{"role": "user", "content": "x"}]
    render("{% set m = messages[0] %}{{ m.content }}", messages)
    assert messages == [{"role": "user", "content": "x"}]
