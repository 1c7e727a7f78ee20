"""From a checkpoint to an executor on ONNX Runtime: record, cut, fill part by part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.arch import Model
from models.executors.footprint import Footprint, by_layer
from models.executors.onnx.attention import STEP_INPUTS, AttentionNodes
from models.executors.onnx.bidirectional import PADDED
from models.executors.onnx.executor import Loaded
from models.executors.onnx.filling import (
    Recording,
    forms_of,
    held_sizes,
    part_bytes,
    sessions_of,
    source_of,
    transient_bytes,
)
from models.executors.onnx.forms import Activations, WeightChoice, is_large
from models.executors.onnx.graph import Graph, TensorType
from models.executors.onnx.kernels import EXACT, ROUNDED
from models.executors.onnx.memory import Rotations
from models.executors.onnx.products import ProductNodes, as_float32
from models.executors.onnx.recorder import FLOAT, Recorder
from models.executors.onnx.recurrent import state_name
from models.executors.onnx.slabs import CacheType, SlabSpec, layer_nbytes, slab_specs
from models.executors.onnx.state import Slabs
from models.executors.onnx.tables import EmbeddingTable
from models.ops import KV, Recurrent
from models.sources.base import Checkpoint, TensorInfo
from models.suppressed import suppressed_tokens
from models.weights.matching import tensors_of

LIBRARY_BYTES = 20 << 20
"""ONNX Runtime's sessions, threads and graphs, and the package that wrote these."""


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a model is held and run."""

    weights: WeightChoice = "keep"
    activations: Activations = "int8"
    cache_type: CacheType = "f16"
    slots: int = 1
    capacity: int = 4096
    """Tokens of a row, the longest step's padding included."""
    reach: int = 0
    """Tokens that a row may have; some ropes turn by it."""
    threads: int = 1
    drafts: bool = False
    """One token is computed as several are, to the last bit, so that drafts change nothing; costs some attention."""
    pictures: int = 0
    """Tokens of the longest step that may hold a picture's; 0: the model sees none."""
    taps: tuple[int, ...] = ()
    """Record a text encoder instead: its outputs are what the first so many layers make, padding is hidden."""
    hidden: bool = False
    """Record for embeddings: the output is the hidden states of the wanted places, or of all for an encoder."""

    @property
    def says_words(self) -> bool:
        """The output is logits."""
        return not self.hidden and not self.taps


def record(model: Model, found: Mapping[str, TensorInfo], options: OnnxOptions) -> Recording:
    """Record a model's forward pass, its tensors by declared name. Thread: any.

    Raises:
        QuantizationError: the heads cannot be held as the cache type wants.
    """
    graph, large = Graph(padded=model.is_encoder), is_large(found.values())
    forms = forms_of(model.weights, found, options.weights, large=large)
    level = ROUNDED if options.activations == "int8" else EXACT
    products = ProductNodes(graph, forms, level=level, finely=not large)
    attention = AttentionNodes(
        graph, model.state, options.cache_type, masked=bool(options.taps), sees=options.pictures > 0
    )
    recorder = Recorder(
        graph,
        products,
        attention,
        even=products.any_wants_even_rows,
        exact=options.drafts,
        context=model.context_length,
    )
    hidden = model.forward(recorder)
    outputs: dict[str, int] = {}
    if options.taps:
        for layers in options.taps:
            value = recorder.residuals[layers]
            outputs[value.name] = value.width
    elif options.hidden:
        if not model.is_encoder:
            graph.inputs["wanted"] = STEP_INPUTS["wanted"]
            hidden = recorder.pick(hidden, "wanted")
        outputs[hidden.name] = hidden.width
    else:
        assert model.logits is not None, "an encoder says no words"
        graph.inputs["wanted"] = STEP_INPUTS["wanted"]
        logits = model.logits(recorder, recorder.pick(hidden, "wanted"))
        outputs[logits.name] = logits.width
    axes = graph.axes if graph.padded else ("N",)
    graph.outputs |= {name: TensorType(FLOAT, (*axes, width)) for name, width in outputs.items()}
    return Recording(graph, products, attention, recorder, outputs)


def load(
    checkpoint: Checkpoint,
    model: Model,
    options: OnnxOptions,
    *,
    progress: Callable[[float], None] = lambda _: None,
    unused: tuple[str, ...] = (),
) -> Loaded:
    """Load a model. Thread: the executor's.

    Raises:
        CheckpointError: a tensor is missing, left over, misshaped or unreadable.
        QuantizationError: weights or cache cannot be held so.
        ExecutionError: ONNX Runtime refuses the graph.
        MemoryError: there is none for it.
    """
    found = tensors_of(model, checkpoint, unused)
    recording = record(model, found, options)
    again = recording.attention.again
    specs, states = slabs_of(model, options.cache_type), recurrent_states(model)
    slabs = Slabs(specs, options.slots, options.capacity, again=again, states=states)
    source = source_of(checkpoint, found, model.stacks)
    most_bytes = part_bytes(recording.graph)
    sessions = sessions_of(recording, source, options.threads, most_bytes=most_bytes, progress=progress)
    recorder = recording.recorder
    lookups = {f"embed.{index}": lookup for index, lookup in enumerate(recorder.lookups)}
    tables = {name: EmbeddingTable(source.value(f"{lookup.table.name}.weight")) for name, lookup in lookups.items()}
    biases = {relative.table.name for _, relative in recorder.bidirectional.scores.values() if relative is not None}
    bias_tables = {name: as_float32(source.value(f"{name}.weight")) for name in biases}
    turned = recording.attention.ropes or recorder.bidirectional.ropes
    spare = options.pictures if recording.attention.has_axes else 0
    ropes = [Rotations(rope, options.capacity, options.reach, spare) for rope in turned]
    nbytes = sum(size for _, size in held_sizes(recording)) + sum(table.nbytes for table in tables.values())
    return Loaded(
        sessions,
        tables,
        ropes,
        slabs,
        recording.outputs,
        nbytes,
        even_rows=recording.products.any_wants_even_rows,
        looks_twice=options.drafts,
        suppressed=suppressed_tokens(checkpoint, model.config.vocab_size) if options.says_words else (),
        scales=recording.attention.scales,
        chunks=tuple(recording.attention.chunks),
        lookups=lookups,
        scores=recorder.bidirectional.scores,
        bias_tables=bias_tables,
        taps=frozenset(conv.taps for conv in recorder.recurrent.convolutions),
        sees=options.pictures > 0,
        spare=spare,
        deep=recorder.deep,
        two_way_masks=frozenset(recording.attention.two_way.masks),
    )


def footprint(model: Model, found: Mapping[str, TensorInfo], options: OnnxOptions) -> Footprint:
    """What a model will take, its tensors by declared name. Thread: any.

    Raises:
        QuantizationError: the heads cannot be held as the cache type wants.
    """
    recording = record(model, found, options)
    layers, output = by_layer(held_sizes(recording), model.config.num_layers)
    embedding = sum(found[f"{lookup.table.name}.weight"].nbytes for lookup in recording.recorder.lookups)
    transient = transient_bytes(recording.graph, part_bytes(recording.graph), options.threads)

    def state(tokens: int) -> tuple[int, ...]:
        return tuple(layer_nbytes(each, layer, options.cache_type, tokens) for layer, each in enumerate(model.state))

    bidirectional = recording.recorder.bidirectional
    scored = PADDED if model.is_encoder and bidirectional.long and not bidirectional.scores else None
    return Footprint(embedding, layers, output, transient, LIBRARY_BYTES, state, scored)


def slabs_of(model: Model, cache_type: CacheType) -> list[SlabSpec]:
    """The arrays of all layers' state. Thread: any. Raises QuantizationError."""
    kinds = ((layer, state) for layer, state in enumerate(model.state) if isinstance(state, KV))
    return [spec for layer, state in kinds for spec in slab_specs(state, layer, cache_type)]


def recurrent_states(model: Model) -> dict[str, Recurrent]:
    """The arrays of recurrent layers' state, by name. Thread: any."""
    return {state_name(layer): state for layer, state in enumerate(model.state) if isinstance(state, Recurrent)}
