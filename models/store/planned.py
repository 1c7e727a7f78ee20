"""What is planned for a model before anything of it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from models.sources.base import JSON
from models.store.chat_format import chat_format_of
from models.store.content import Content
from models.store.description import Rendering
from models.store.go_chat import go_template
from models.store.go_json import go_json
from models.store.plan import PlannedBlob
from models.store.turns import turns_of

IMAGE = "application/vnd.ollama.image"
TENSOR, JSON_FILE, GGUF_MODEL = f"{IMAGE}.tensor", f"{IMAGE}.json", f"{IMAGE}.model"
PROJECTOR = f"{IMAGE}.projector"
ModelKind: TypeAlias = Literal["gguf", "safetensors", "image"]


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer that needs no tensor: its bytes are at hand or in a file."""

    media_type: str
    content: Content
    name: str = ""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """All that a model will be. `notes` is what the person who creates it should know."""

    kind: ModelKind
    blobs: Sequence[PlannedBlob]
    layers: Sequence[PlannedLayer]
    config: Mapping[str, JSON]
    notes: Sequence[str] = field(default=())


def chat_layers(
    template: str | None, chat_template: str, rendering: Rendering, eos_token: str | None
) -> tuple[list[PlannedLayer], list[str]]:
    """The layers that say how a chat becomes a prompt, and what is to be said about them.

    The model's own template is put into Go's language where its texts are all there is to it; else a known format is
    written, as it is where the parent's parser expects one.
    """
    if template is not None:
        return [_template_layer(template)], []
    if rendering.renderer or not chat_template:
        return [], []
    known = chat_format_of(chat_template)
    turns = None if rendering.parser else turns_of(chat_template, eos_token)
    if turns is not None:
        layers = [_template_layer(go_template(turns))]
        name = "the model's own" + (", with tools" if turns.calls is not None else "")
    elif known is not None:
        layers, name = [_template_layer(known.template)], known.name
    else:
        return [], ["the model's chat format is not a known one: give Ollama a template with --template"]
    if known is not None:
        stop = go_json({"stop": list(known.stop)}) + b"\n"
        layers.append(PlannedLayer(f"{IMAGE}.params", Content((stop,))))
    return layers, [f"chat format: {name}"]


def _template_layer(text: str) -> PlannedLayer:
    return PlannedLayer(f"{IMAGE}.template", Content((text.encode(),)))
