"""Templates in Go's language for the chat formats that are told by their markers.

Ollama runs Go templates, models carry Jinja ones, and nothing translates the one into the other. A handful of formats
covers what is common; Ollama's own `create` has such a list for GGUF files too.

Source: the model cards' descriptions of each format, OpenAI's of Harmony; ollama's docs/template.mdx for the variables.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A format: the markers that its Jinja template contains, all of them, its Go template, and where to stop."""

    name: str
    markers: Sequence[str]
    template: str
    stop: Sequence[str]


# Formats without a system role put the system message before the next user message.
_INST = """\
{{- $system := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}{{ $system = printf "%s" .Content }}
{{- else if eq .Role "user" }}[INST] {{ $system }}{{ .Content }} [/INST]{{ $system = "" }}
{{- else }} {{ .Content }}</s>
{{- end }}
{{- end }}"""

# A developer's message has instructions and tools, as types of TypeScript. Thoughts stand as long as the turn goes on
# that they began; an answer that the client has begun is left open.
_HARMONY = """\
{{- $last := -1 }}{{ $asked := -1 }}{{ $instructions := "" }}{{ $tool := "" }}
{{- range $i, $m := .Messages }}{{ $last = $i }}
{{- if eq $m.Role "user" }}{{ $asked = $i }}{{ end }}
{{- if and (eq $i 0) (eq $m.Role "system") }}{{ $instructions = $m.Content }}{{ end }}
{{- end -}}
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ currentDate }}

Reasoning: {{ if .ThinkLevel }}{{ .ThinkLevel }}{{ else }}medium{{ end }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.
{{- if .Tools }}
Calls to these tools must go to the commentary channel: 'functions'.
{{- end }}<|end|>
{{- if or $instructions .Tools }}<|start|>developer<|message|>
{{- if $instructions }}# Instructions

{{ $instructions }}{{ if .Tools }}

{{ end }}
{{- end }}
{{- if .Tools }}# Tools

## functions

namespace functions {
{{ range .Tools }}
{{- $parameters := .Function.Parameters }}
{{ if .Function.Description }}// {{ .Function.Description }}
{{ end }}type {{ .Function.Name }} = (
{{- if $parameters.Properties }}_: {
{{- range $name, $value := $parameters.Properties }}
{{- $mark := "?" }}
{{- range $parameters.Required }}{{ if eq . $name }}{{ $mark = "" }}{{ end }}{{ end }}
{{ if $value.Description }}// {{ $value.Description }}
{{ end }}{{ $name }}{{ $mark }}: {{ if $value.Enum }}
{{- range $i, $each := $value.Enum }}{{ if $i }} | {{ end }}{{ json $each }}{{ end }}
{{- else }}{{ toTypeScriptType $value }}
{{- end }},
{{- end }}
}{{ end }}) => any;
{{ end }}
} // namespace functions
{{- end }}<|end|>
{{- end }}
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "system" }}
{{- if $i }}<|start|>developer<|message|># Instructions

{{ $m.Content }}<|end|>
{{- end }}
{{- else if eq $m.Role "tool" }}<|start|>functions.{{ if $m.ToolName }}{{ $m.ToolName }}{{ else }}{{ $tool }}{{ end }}
{{- /**/}} to=assistant<|channel|>commentary<|message|>{{ $m.Content }}<|end|>
{{- else if eq $m.Role "assistant" }}
{{- if and $m.Thinking (gt $i $asked) }}<|start|>assistant<|channel|>analysis<|message|>{{ $m.Thinking }}
{{- if or $m.Content $m.ToolCalls (lt $i $last) }}<|end|>{{ end }}
{{- end }}
{{- if $m.Content }}<|start|>assistant<|channel|>{{ if $m.ToolCalls }}commentary{{ else }}final{{ end }}<|message|>
{{- $m.Content }}{{ if or $m.ToolCalls (lt $i $last) }}<|end|>{{ end }}
{{- end }}
{{- range $m.ToolCalls }}{{ $tool = .Function.Name }}<|start|>assistant<|channel|>commentary to=functions.{{ $tool }}
{{- /**/}} <|constrain|>json<|message|>{{ .Function.Arguments }}<|call|>
{{- end }}
{{- else }}<|start|>{{ $m.Role }}<|message|>{{ $m.Content }}<|end|>
{{- end }}
{{- if and (eq $i $last) (or (ne $m.Role "assistant") $m.ToolCalls) }}<|start|>assistant{{ end }}
{{- end }}"""

_FORMATS = (
    ChatFormat(
        "Harmony",
        ("<|start|>", "<|channel|>", "<|message|>"),
        _HARMONY,
        ("<|return|>", "<|call|>"),
    ),
    ChatFormat(
        "ChatML",
        ("<|im_start|>",),
        """\
{{- range .Messages -}}
<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end -}}
<|im_start|>assistant
""",
        ("<|im_start|>", "<|im_end|>"),
    ),
    ChatFormat(
        "Llama 3",
        ("<|start_header_id|>", "<|eot_id|>"),
        """\
{{- range .Messages -}}
<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>
{{- end -}}
<|start_header_id|>assistant<|end_header_id|>

""",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    ChatFormat(
        "Llama 2",
        ("[INST]", "<<SYS>>"),
        _INST.replace('"%s"', r'"<<SYS>>\n%s\n<</SYS>>\n\n"').replace("}}</s>", "}} </s>"),
        ("[INST]", "[/INST]"),
    ),
    ChatFormat("Mistral", ("[INST]",), _INST.replace('"%s"', r'"%s\n\n"'), ("[INST]", "[/INST]")),
    ChatFormat(
        "Gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        """\
{{- $system := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}{{ $system = printf "%s\\n\\n" .Content }}
{{- else }}<start_of_turn>
{{- if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}
{{ $system }}{{ $system = "" }}{{ .Content }}<end_of_turn>
{{ end }}
{{- end }}<start_of_turn>model
""",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    ChatFormat(
        "Phi 3",
        ("<|end|>", "<|assistant|>"),
        """\
{{- range .Messages -}}
<|{{ .Role }}|>
{{ .Content }}<|end|>
{{ end -}}
<|assistant|>
""",
        ("<|end|>", "<|user|>", "<|assistant|>"),
    ),
    ChatFormat(
        "Zephyr",
        ("<|user|>", "<|assistant|>"),
        """\
{{- range .Messages -}}
<|{{ .Role }}|>
{{ .Content }}</s>
{{ end -}}
<|assistant|>
""",
        ("<|system|>", "<|user|>", "<|assistant|>", "</s>"),
    ),
)


def chat_format_of(chat_template: str) -> ChatFormat | None:
    """The format that a model's Jinja template writes, if it is one of these."""
    return next(
        (each for each in _FORMATS if all(marker in chat_template for marker in each.markers)),
        None,
    )
