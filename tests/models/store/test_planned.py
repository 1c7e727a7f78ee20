"""Which layers say how a chat becomes a prompt."""

import pytest

from models.store.description import Rendering
from models.store.planned import chat_layers

OWN = "{# <|im_start|> #}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
NOBODY = Rendering("", "")


@pytest.mark.parametrize(
    ("given", "rendering", "begins", "notes"),
    [
        (None, NOBODY, '{{ $system := "" }}', ["chat format: the model's own"]),
        # A parser reads one format: the parent's own, not the model's words for it.
        (None, Rendering("", "harmony"), "{{- range .Messages -}}", ["chat format: ChatML"]),
        ("{{ .Prompt }}", NOBODY, "{{ .Prompt }}", []),
    ],
)
def test_the_template_is_the_given_one_or_the_models_own_or_a_known_one(given, rendering, begins, notes):
    layers, said = chat_layers(given, OWN, rendering, None)
    (text,) = (b"".join(layer.content.chunks()).decode() for layer in layers if layer.media_type.endswith(".template"))
    assert text.startswith(begins)
    assert said == notes


@pytest.mark.parametrize(("rendering", "own"), [(Rendering("qwen3", "qwen3"), OWN), (NOBODY, "")])
def test_no_template_is_written_where_the_parent_renders_or_the_model_has_none(rendering, own):
    assert chat_layers(None, own, rendering, None) == ([], [])
