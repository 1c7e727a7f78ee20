"""Chat templates: messages to the prompt a model was trained on.

A template is a program that came with the weights. It runs in a sandbox that shows it strings and no Python objects;
what it does wrong becomes a TokenizerError. It can still waste time in nested loops: it is as trusted as the weights.

Source: the environment `transformers` gives chat templates (functions, filters, white-space rules).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import TokenizerError

_LONGEST_PRODUCT = 1_000_000

# What a template can raise in Python's name by using its values wrongly.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None,
    eos_token: str | None,
    **variables: object,
) -> str:
    """The prompt for `messages`.

    Args:
        template: A Jinja template as `tokenizer_config.json` carries it.
        messages: Each with `role` and `content`, and whatever else the template reads.
        add_generation_prompt: End with the opening of the assistant's turn.
        bos_token: Text of BOS; None is empty.
        eos_token: Text of EOS; None is empty.
        variables: Further variables that some templates read, such as `tools` or `enable_thinking`.

    Raises:
        TokenizerError: the template is malformed, refuses the messages, or breaks the sandbox's rules.
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                **variables,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token or "",
                eos_token=eos_token or "",
            )
        )
    except _TEMPLATE_FAULTS as error:
        reason = str(error) or type(error).__name__
        raise TokenizerError(f"the model's chat template cannot be used: {reason}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, and a bound on what `*` and `**` may build."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        """Refuse a product that is a memory bomb rather than text."""
        match operator, left, right:
            case "**", int(base), int(exponent):
                _check_product(base.bit_length() * exponent)
            case "*", int(count), str() | list() | tuple() as unit:
                _check_product(len(unit) * count)
            case "*", str() | list() | tuple() as unit, int(count):
                _check_product(len(unit) * count)
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's words for training and here only renders."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body in place of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., str]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _check_product(length: int) -> None:
    if length > _LONGEST_PRODUCT:
        raise jinja2.exceptions.SecurityError("a product is too large")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now(tz=UTC).astimezone().strftime(pattern)


def _to_json(
    value: object,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: not escaped for HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
