"""The texts of a chat format as a template in Go's language, for a parent that runs those.

Source: ollama's docs/template.mdx for the variables; v0.34.4 tools/template.go: what is in front of a call's name,
behind `if .ToolCalls`, is by what it finds calls in an answer.
"""

from collections.abc import Mapping

from models.store.turns import DATE, SYSTEM, TOOLS, Calls, Turns

_FIRST = '{{ $system := "" }}{{ range $i, $m := .Messages }}{{ if and (eq $i 0) (eq $m.Role "system") }}\
{{ $system = $m.Content }}{{ end }}{{ end }}'


def go_template(turns: Turns) -> str:
    """The template: what precedes the first user's words, then each message behind what leads from the last to it."""
    calls = turns.calls
    made = _FIRST + _opening(turns) + '{{ $last := "" }}{{ range $i, $m := .Messages }}'
    made += '{{ if and (eq $i 0) (eq .Role "system") }}{{ else if eq .Role "assistant" }}' + _before(turns, "a")
    if calls is not None:
        made += f'{{{{ if .ToolCalls }}}}{_called(calls)}{{{{ $last = "c" }}}}{{{{ else }}}}'
    made += '{{ .Content }}{{ $last = "a" }}' + ("{{ end }}" if calls is not None else "")
    if calls is not None:
        content = "{{ json .Content }}" if _quotes_results(turns) else "{{ .Content }}"
        made += '{{ else if eq .Role "tool" }}' + _before(turns, "r") + content + '{{ $last = "r" }}'
    made += (
        "{{ else }}{{ if $last }}" + _before(turns, "u") + '{{ end }}{{ .Content }}{{ $last = "u" }}{{ end }}{{ end }}'
    )
    return made + '{{ if not $last }}{{ $last = "u" }}{{ end }}' + _before(turns, "end")


def _opening(turns: Turns) -> str:
    texts = {kind: _filled(_literal(text), turns.calls) for kind, text in turns.openings.items()}
    plain = f"{{{{ if $system }}}}{texts[True, False]}{{{{ else }}}}{texts[False, False]}{{{{ end }}}}"
    if turns.calls is None:
        return plain
    told = f"{{{{ if $system }}}}{texts[True, True]}{{{{ else }}}}{texts[False, True]}{{{{ end }}}}"
    return f"{{{{ if .Tools }}}}{told}{{{{ else }}}}{plain}{{{{ end }}}}"


def _filled(text: str, calls: Calls | None) -> str:
    values = {SYSTEM: "{{ $system }}", DATE: "{{ currentDate }}"} | ({} if calls is None else {TOOLS: _tools(calls)})
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def _tools(calls: Calls) -> str:
    one = "{{ json .Function }}" if calls.of_functions else "{{ json . }}"
    if calls.between_tools is not None:
        between = _literal(calls.between_tools)
        return f"{{{{ range $i, $t := .Tools }}}}{{{{ if $i }}}}{between}{{{{ end }}}}{one}{{{{ end }}}}"
    return f"[{{{{ range $i, $t := .Tools }}}}{{{{ if $i }}}}, {{{{ end }}}}{one}{{{{ end }}}}]"


def _called(calls: Calls) -> str:
    opening, within, between = map(_literal, (calls.opening, calls.within, calls.between))
    call = "{{ .Function.Name }}" + within + "{{ .Function.Arguments }}"
    return f"{opening}{{{{ range $k, $c := .ToolCalls }}}}{{{{ if $k }}}}{between}{{{{ end }}}}{call}{{{{ end }}}}"


def _quotes_results(turns: Turns) -> bool:
    """Whether what a tool says is JSON text: then its quotes are in the texts around it."""
    around = {pair: text for pair, text in turns.following.items() if "r" in pair}
    return all(
        (pair[1] != "r" or text.endswith('"')) and (pair[0] != "r" or text.startswith('"'))
        for pair, text in around.items()
    )


def _before(turns: Turns, role: str) -> str:
    """What leads to a role from whoever spoke last; what is not known leads as if the assistant had said nothing."""
    quotes = turns.calls is not None and _quotes_results(turns)
    texts: dict[str, str] = {}
    for last in "uacr" if turns.calls is not None else "ua":
        text = _leading(turns.following, last, role)
        if quotes and role == "r":
            text = text.removesuffix('"')
        if quotes and last == "r":
            text = text.removeprefix('"')
        if text:
            texts[last] = _literal(text)
    made = ""
    for last, text in texts.items():
        made += f'{{{{ {"else " if made else ""}if eq $last "{last}" }}}}{text}'
    return made + "{{ end }}" if made else ""


def _leading(following: Mapping[tuple[str, str], str], last: str, role: str) -> str:
    known = following.get((last, role))
    if known is not None:
        return known
    match last, role:
        case "u", "u":
            return following["a", "u"]
        case "r", "u":
            return following["r", "a"] + following["a", "u"]
        case ("u", "r") | ("c", "u"):
            return following["a", "u"]
        case _:
            # The assistant goes on, or nobody is known to speak so.
            return ""


def _literal(text: str) -> str:
    """Text that Go's template language takes as it is."""
    text = text.replace("{{", '{{ "{{" }}')
    return text[:-1] + '{{ "{" }}' if text.endswith("{") else text
