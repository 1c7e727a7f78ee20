"""What each kind of source becomes: the blobs, the other layers and the description of a model to be created."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from models.arch import build_model
from models.errors import CheckpointError, UnsupportedArchitecture
from models.sources.base import JSON
from models.sources.hf import HFDirectory, parse_config
from models.store.content import Content, span_of_file
from models.store.description import (
    REQUIRES,
    capabilities_of,
    description,
    generation_defaults,
    identifiers,
    rendering_of,
)
from models.store.gguf_source import plan_gguf
from models.store.go_json import go_json
from models.store.plan import Plan, QuantizeRule, plan_blobs
from models.store.planned import JSON_FILE, PlannedLayer, PlannedModel, chat_layers
from models.store.policy import check_architectures, language_quant_type, pipeline_quant_type
from models.vision import family_of, has_tower

# The parts of a pipeline that Ollama's image runner reads. Source: ollama v0.24.0 x/create/imagegen.go.
_COMPONENTS = ("text_encoder", "transformer", "vae")
_PIPELINE_FILES = (
    "text_encoder/config.json",
    "text_encoder/generation_config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    # Not among Ollama's: defaults that a pipeline's author chose, which this program reads.
    "generation_config.json",
)
_EDITING_PIPELINES = ("Flux2KleinPipeline",)
_INDEX = "model.safetensors.index.json"


def plan_model(source: Path, *, quantize: str | None, template: str | None) -> PlannedModel:
    """Look at a source and plan the model; no data is read, only headers and small files.

    Raises:
        CheckpointError: the source is missing, incomplete or damaged.
        QuantizationError: it cannot be quantised as asked.
    """
    if source.is_file() and source.suffix == ".safetensors":
        raise CheckpointError("name the folder it is in: a safetensors file needs its config.json", file=str(source))
    if source.is_file():
        return plan_gguf(source, quantize, template)
    if not source.is_dir():
        raise CheckpointError("no such file or folder", file=str(source))
    if (source / "model_index.json").is_file():
        return _plan_pipeline(source, quantize, template)
    if (source / "config.json").is_file():
        return _plan_language_model(source, quantize, template)
    raise CheckpointError("the folder has neither a config.json nor a model_index.json", file=str(source))


def _plan_language_model(folder: Path, quantize: str | None, template: str | None) -> PlannedModel:
    checkpoint = HFDirectory(folder)
    config = checkpoint.config
    rule = None
    if quantize is not None:
        check_architectures(identifiers(config))
        rule = _language_rule(quantize)
    plan = plan_blobs(checkpoint.table(), rule, requested=quantize or "")
    chat_template = _chat_template(checkpoint)
    rendering = rendering_of(config, chat_template)
    files = [*_json_files(folder), *_separate_template(checkpoint)]
    notes = _architecture_notes(config)
    chat, chat_notes = chat_layers(template, chat_template, rendering, _eos_token(checkpoint))
    defaults = generation_defaults(_json_of(checkpoint, "generation_config.json"))
    described = description(
        model_format="safetensors",
        file_type=plan.quant_type,
        defaults=defaults,
        rendering=rendering,
        requires=REQUIRES,
        capabilities=capabilities_of(config, chat_template, rendering, sees=_sees(checkpoint)),
    )
    return PlannedModel("safetensors", plan.blobs, [*files, *chat], described, [*notes, *chat_notes])


def _sees(checkpoint: HFDirectory) -> bool:
    """Whether this program can have the model look at pictures."""
    return family_of(checkpoint) is not None and has_tower(info.name for info in checkpoint.infos())


def _language_rule(quantize: str) -> QuantizeRule:
    return lambda name, shape: language_quant_type(name, shape, quantize)


def _pipeline_rule(component: str, quantize: str) -> QuantizeRule:
    return lambda name, shape: pipeline_quant_type(component, name, shape, quantize)


def _architecture_notes(config: Mapping[str, JSON]) -> list[str]:
    try:
        build_model(config)
    except (UnsupportedArchitecture, CheckpointError) as error:
        return [f"{error}: the model can be stored, but this runner cannot load it"]
    return []


def _json_files(folder: Path) -> Iterator[PlannedLayer]:
    """Every JSON file beside the weights, as Ollama has it."""
    for path in sorted(folder.iterdir(), key=lambda each: each.name):
        if path.suffix == ".json" and path.is_file() and path.name != _INDEX:
            yield PlannedLayer(JSON_FILE, Content((span_of_file(path),)), path.name)


def _chat_template(checkpoint: HFDirectory) -> str:
    """The model's own template: that of tokenizer_config.json, else a file of its own; empty if there is none."""
    template = _json_of(checkpoint, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if isinstance(template, str) and template:
        return template
    return (checkpoint.read("chat_template.jinja") or b"").decode("utf-8", "replace")


def _eos_token(checkpoint: HFDirectory) -> str | None:
    """The text of the token that ends an answer."""
    token = _json_of(checkpoint, "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _separate_template(checkpoint: HFDirectory, folder: str = "") -> Iterator[PlannedLayer]:
    """A template in a file of its own, in the older form: a store has no other place for it.

    Ollama passes it over and this program reads it.
    """
    template = checkpoint.read(f"{folder}chat_template.jinja")
    if template is not None and checkpoint.read(f"{folder}chat_template.json") is None:
        text = go_json({"chat_template": template.decode("utf-8", "replace")})
        yield PlannedLayer(JSON_FILE, Content((text,)), f"{folder}chat_template.json")


def _json_of(checkpoint: HFDirectory, name: str) -> Mapping[str, JSON]:
    text = checkpoint.read(name)
    return parse_config(text, f"{checkpoint.reference}/{name}") if text is not None else {}


def _plan_pipeline(folder: Path, quantize: str | None, template: str | None) -> PlannedModel:
    if template is not None:
        raise CheckpointError("an image pipeline takes no template", file=str(folder))
    checkpoint = HFDirectory(folder)
    index = _json_of(checkpoint, "model_index.json")
    plans = {
        component: plan_blobs(
            checkpoint.table(component),
            _pipeline_rule(component, quantize) if quantize is not None else None,
            requested=quantize or "",
            component=component,
        )
        for component in _COMPONENTS
        if (folder / component).is_dir()
    }
    if "transformer" not in plans:
        raise CheckpointError("the pipeline has no transformer", file=str(folder))
    normalised = _pipeline_index(checkpoint, index, plans, quantize)
    layers = [PlannedLayer(JSON_FILE, Content((normalised,)), "model_index.json")]
    layers += [
        PlannedLayer(JSON_FILE, Content((span_of_file(folder / name),)), name)
        for name in _PIPELINE_FILES
        if (folder / name).is_file()
    ]
    layers += _separate_template(checkpoint, "tokenizer/")
    others = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and any(path.glob("*.safetensors"))]
    left_out = [name for name in others if name not in _COMPONENTS]
    capabilities: list[JSON] = ["image"]
    if index.get("_class_name") in _EDITING_PIPELINES:
        capabilities.append("vision")
    described = description(
        model_format="safetensors", file_type=quantize or "", requires=REQUIRES, capabilities=capabilities
    )
    blobs = [blob for plan in plans.values() for blob in plan.blobs]
    notes = [f"left out, as Ollama has no place for it: {name}/" for name in left_out]
    return PlannedModel("image", blobs, layers, described, notes)


def _pipeline_index(
    checkpoint: HFDirectory, index: Mapping[str, JSON], plans: Mapping[str, Plan], quantize: str | None
) -> bytes:
    """model_index.json as Ollama's image runner reads it."""
    own = {key: value for key, value in index.items() if key not in {"_class_name", "_diffusers_version"}}
    if "_class_name" in index:
        own["architecture"] = index["_class_name"]
    own["parameter_count"] = sum(plan.elements for plan in plans.values())
    dtype = _json_of(checkpoint, "text_encoder/config.json").get("torch_dtype")
    own["quantization"] = quantize.upper() if quantize else dtype if isinstance(dtype, str) else ""
    return go_json(own, sort=True, indent=4)
