"""What a model's own chat template writes between the words of a chat, found by asking it.

The template renders some chats whose words are marks, and the texts between the marks are kept. Other chats show if
these texts are all there is to it: a template that goes by more than whose turn follows whose is given up.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.chat_template import render_chat
from models.errors import TokenizerError

SYSTEM, DATE, TOOLS = "zq-system-qz", "zq-date-qz", "zq-tools-qz"
"""Stand for a system message, the date and the tools in the texts before the first user's words."""
_BOS = "zq-bos-qz"
_CALL_ID = "zqcall001"
# Who speaks: the user, the assistant, the assistant that calls tools, and a tool.
_ROLES = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "r": "tool"}
_END = "end"

_WITHOUT_TOOLS = (("u1",), ("u1", "a1", "u2"), ("u1", "a1", "u2", "a2", "u3"))
_WITH_TOOLS = (
    ("u1",),
    ("u1", "a1", "u2"),
    ("u1", "c1", "r1"),
    ("u1", "c1", "r1", "a1", "u2"),
    ("u1", "c1", "r1", "c2", "r2", "a1", "u2"),
)


@dataclass(frozen=True, slots=True)
class Calls:
    """How tools are told of and called."""

    of_functions: bool
    """A tool is told of by its function alone, not with its type."""
    between_tools: str | None
    """None: they are a list."""
    opening: str
    """From where an answer would begin to the function's name."""
    within: str
    """From there to the arguments, which are JSON."""
    between: str
    """From the arguments to the next call's name."""


@dataclass(frozen=True, slots=True)
class Turns:
    """The texts of a chat format."""

    openings: Mapping[tuple[bool, bool], str]
    """Up to the first user's words: with a system message or none, with tools or none."""
    following: Mapping[tuple[str, str], str]
    """From who has spoken to who speaks next, `u`, `a`, `c`, `r` or `end`."""
    calls: Calls | None = None

    def text(self, chat: Sequence[str], tools: int = 0) -> str:
        """What a chat of marks is by these texts."""
        words = [each for each in chat if each != "s"]
        text = self.openings[len(words) < len(chat), tools > 0].replace(SYSTEM, _mark("s"))
        if self.calls is not None and tools:
            text = text.replace(TOOLS, _told(self.calls, tools))
        before = ""
        for each in words:
            role = each[0]
            text += self.following[before, "a" if role == "c" else role] if before else ""
            text += self._called(each) if role == "c" else _mark(each)
            before = role
        return text + self.following[before, _END]

    def _called(self, each: str) -> str:
        assert self.calls is not None
        return self.calls.opening + self.calls.between.join(
            _name(number) + self.calls.within + _arguments(number) for number in each[1:]
        )


def turns_of(template: str, eos_token: str | None) -> Turns | None:
    """The texts of a Jinja template, with tools if it knows any; None where such texts are not all. Thread: any.

    BOS is left out, for whoever tokenizes puts it there.
    """
    if eos_token is None and "eos_token" in template:
        return None
    ask = _Asked(template, eos_token or "")
    turns = _plain(ask)
    return turns and (_with_tools(ask, turns) or turns)


class _Asked:
    """Asks a template for chats of marks."""

    def __init__(self, template: str, eos_token: str) -> None:
        self._template = template
        self._eos_token = eos_token

    def __call__(self, chat: Sequence[str], tools: int = 0) -> str:
        """The chat, JSON of tools and arguments replaced by marks; empty where the template refuses it."""
        try:
            text = render_chat(
                self._template,
                [_message(each) for each in chat],
                bos_token=_BOS,
                eos_token=self._eos_token,
                strftime_now=lambda _: DATE,
                tools=[_tool(number) for number in range(1, tools + 1)] or None,
            )
        except TokenizerError:
            return ""
        text = _without_json(text.removeprefix(_BOS))
        # What is told of calls by their numbers cannot be said without these.
        return "" if _BOS in text or _CALL_ID in text else text


def _mark(each: str) -> str:
    return f"zq-{each}-qz"


def _name(number: object) -> str:
    return f"zq_f{number}_qz"


def _arguments(number: object) -> str:
    return f"zq-arguments{number}-qz"


def _tool(number: int) -> dict[str, Any]:
    values = {"type": "object", "properties": {"zq": {"type": "string", "description": "zq"}}, "required": ["zq"]}
    return {"type": "function", "function": {"name": _name(number), "description": "zq", "parameters": values}}


def _message(each: str) -> dict[str, object]:
    role, numbers = each[0], each[1:]
    message: dict[str, object] = {"role": _ROLES[role], "content": _mark(each)}
    if role == "c":
        functions = [{"name": _name(number), "arguments": {"zq": number}} for number in numbers]
        calls = [{"type": "function", "id": _CALL_ID, "function": each} for each in functions]
        return message | {"content": "", "tool_calls": calls}
    return message | ({"name": _name(1), "tool_call_id": _CALL_ID} if role == "r" else {})


def _told(calls: Calls, tools: int) -> str:
    kind = "function" if calls.of_functions else "tool"
    if calls.between_tools is None:
        return f"zq-{kind}s{tools}-qz"
    return calls.between_tools.join(f"zq-{kind}{number}-qz" for number in range(1, tools + 1))


def _known() -> Iterator[tuple[object, str]]:
    """JSON values that have a mark, those first that have others in them."""
    for count in (2, 1):
        tools = [_tool(number) for number in range(1, count + 1)]
        yield tools, f"zq-tools{count}-qz"
        yield [each["function"] for each in tools], f"zq-functions{count}-qz"
    for number in (1, 2):
        yield _tool(number), f"zq-tool{number}-qz"
        yield _tool(number)["function"], f"zq-function{number}-qz"
        yield {"zq": str(number)}, _arguments(number)


def _without_json(text: str) -> str:
    """Known JSON values replaced by their marks, however they are spaced."""
    decoder, known, made, place = json.JSONDecoder(), list(_known()), "", 0
    while place < len(text):
        mark, end = text[place], place + 1
        if mark in "[{":
            try:
                value, stop = decoder.raw_decode(text, place)
            except ValueError:
                value = None
            found = next((each for known_value, each in known if known_value == value), None)
            if found is not None:
                mark, end = found, stop
        made, place = made + mark, end
    return made


def _cut(text: str, *marks: str) -> list[str] | None:
    """The texts before, between and behind marks, each of which is there once, in this order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _plain(ask: _Asked) -> Turns | None:
    cut = _cut(ask(("u1", "a1", "u2")), *map(_mark, ("u1", "a1", "u2")))
    if cut is None:
        return None
    opening, answer, question, end = cut
    said = _cut(ask(("s", "u1")), _mark("s"), _mark("u1"))
    # Where the model has no system messages, it is the beginning of what the user says.
    with_system = f"{opening}{SYSTEM}\n\n" if said is None else f"{said[0]}{SYSTEM}{said[1]}"
    following = {("u", "a"): answer, ("a", "u"): question, ("u", _END): end}
    turns = Turns({(False, False): opening, (True, False): with_system}, following)
    return turns if _holds(ask, turns, _WITHOUT_TOOLS, 0, with_system=said is not None) else None


def _holds(ask: _Asked, turns: Turns, chats: Sequence[Sequence[str]], tools: int, *, with_system: bool) -> bool:
    """Whether the template writes these chats so."""
    both = [*chats, *(("s", *each) for each in chats if with_system)]
    return all(ask(each, tools) == turns.text(each, tools) for each in both)


def _with_tools(ask: _Asked, plain: Turns) -> Turns | None:
    called = ("u1", "c1", "r1", "a1", "u2")
    marks = (_mark("u1"), _name(1), _arguments(1), _mark("r1"), _mark("a1"), _mark("u2"))
    answer = plain.following["u", "a"]
    for calls in _ways_of_telling(ask):
        # Tools tell their names: they are cut off first.
        text = ask(called, 1).replace(_told(calls, 1), TOOLS)
        cut = _cut(text, *marks)
        last = _cut(ask(("u1", "c1", "r1"), 1), _mark("r1"))
        if cut is None or last is None:
            continue
        opening, call, within, result, said, *_ = cut
        more = _cut(ask(("u1", "c1", "r1", "r2"), 1), _mark("r1"), _mark("r2"))
        two = _cut(ask(("u1", "c12", "r1"), 2), _name(1), _arguments(1), _name(2), _arguments(2))
        own = call.removeprefix(answer)
        following = {
            ("c", "r"): result,
            ("r", "a"): said,
            ("r", "r"): more[1] if more else said + result,
            ("r", _END): last[1],
        }
        turns = replace(
            plain,
            openings={**plain.openings, (False, True): opening, (True, True): _with_both(ask, calls)},
            following={**plain.following, **following},
            calls=replace(calls, opening=own, within=within, between=two[2] if two else f"\n{own}"),
        )
        if not _has_marks(turns) and _holds(ask, turns, _WITH_TOOLS, 2, with_system=True):
            return turns
    return None


def _has_marks(turns: Turns) -> bool:
    """Whether something of the tools that were asked with is left in the texts."""
    assert turns.calls is not None
    calls = (turns.calls.opening, turns.calls.within, turns.calls.between, turns.calls.between_tools or "")
    text = "".join((*turns.openings.values(), *turns.following.values(), *calls))
    for mark in (SYSTEM, DATE, TOOLS):
        text = text.replace(mark, "")
    return "zq" in text


def _ways_of_telling(ask: _Asked) -> Iterator[Calls]:
    """How the template may tell of two tools."""
    text = ask(("u1",), 2)
    for of_functions, kind in ((False, "tool"), (True, "function")):
        if f"zq-{kind}s2-qz" in text:
            yield Calls(of_functions, None, "", "", "")
        between = _cut(text, f"zq-{kind}1-qz", f"zq-{kind}2-qz")
        if between is not None:
            yield Calls(of_functions, between[1], "", "", "")


def _with_both(ask: _Asked, calls: Calls) -> str:
    """What is before the first user's words where there are a system message and tools."""
    text = ask(("s", "u1"), 1).replace(_told(calls, 1), TOOLS).replace(_mark("s"), SYSTEM)
    return text.partition(_mark("u1"))[0]
