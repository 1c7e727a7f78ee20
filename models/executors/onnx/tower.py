"""A vision tower on ONNX Runtime: recorded once, run part by part, in float32."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.executors.base import EncodedPicture, HostArray
from models.executors.footprint import Footprint
from models.executors.groups import grouped
from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.filling import (
    PART_BYTES,
    Recording,
    forms_of,
    held_sizes,
    sessions_of,
    source_of,
    transient_bytes,
)
from models.executors.onnx.forms import WeightChoice, is_large
from models.executors.onnx.graph import Array, Graph, TensorType
from models.executors.onnx.kernels import EXACT
from models.executors.onnx.products import ProductNodes
from models.executors.onnx.recorder import FLOAT
from models.executors.onnx.sessions import Sessions
from models.executors.onnx.tables import EmbeddingTable
from models.executors.onnx.tower_recorder import TowerRecorder
from models.process_memory import trim
from models.sources.base import Checkpoint, TensorInfo
from models.vision.base import Tower
from models.weights.matching import tower_tensors_of

LIBRARY_BYTES = 4 << 20
"""Sessions and graphs beside those of a language model."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A recorded tower."""

    recording: Recording
    recorder: TowerRecorder
    outputs: tuple[str, ...]
    """The rows, and behind them those that are added deeper."""


class OnnxPictureEncoder:
    """Implements `PictureEncoder`. Thread: the executor's, but for what says otherwise."""

    def __init__(self, recorded: _Recorded, sessions: Sessions, tables: Mapping[str, EmbeddingTable]) -> None:
        self._recorder: TowerRecorder | None = recorded.recorder
        self._outputs = recorded.outputs
        self._sessions: Sessions | None = sessions
        self._tables = tables
        held = sum(nbytes for _, nbytes in held_sizes(recorded.recording))
        self._nbytes = held + sum(table.nbytes for table in tables.values())

    def encode(self, passes: Sequence[Mapping[str, HostArray]]) -> Generator[None, None, EncodedPicture]:
        """See `PictureEncoder.encode`."""
        made: list[Sequence[Array]] = []
        for given in passes:
            if made:
                yield
            assert self._sessions is not None
            outputs = yield from self._sessions.parts((0, 0), {}, self._inputs(given), {})
            made.append([outputs[name] for name in self._outputs])
            trim()
        rows, *deep = (np.concatenate(parts) for parts in zip(*made, strict=True))
        return EncodedPicture(rows, tuple(deep))

    def memory_bytes(self) -> int:
        """See `PictureEncoder.memory_bytes`. Thread: any."""
        return self._nbytes

    def close(self) -> None:
        """See `PictureEncoder.close`."""
        self._sessions = self._recorder = None
        self._tables = {}
        self._nbytes = 0
        trim()

    def _inputs(self, given: Mapping[str, HostArray]) -> dict[str, Array]:
        """What the graph is given of a pass."""
        recorder = self._recorder
        assert recorder is not None
        inputs: dict[str, Array] = {}
        for name, value in given.items():
            kind = np.int64 if value.dtype.kind in "iu" else np.float32
            inputs[name] = np.ascontiguousarray(value, kind)
        for name, turned in recorder.angles.items():
            angles = inputs[name]
            inputs |= {turned.cos: np.cos(angles), turned.sin: np.sin(angles)}
        for name, parts in recorder.groups.items():
            groups = grouped(inputs[name])
            inputs |= {
                parts.pad: groups.pad,
                parts.unpad: groups.unpad,
                parts.visible: groups.visible.astype(np.int32),
                parts.rows: np.array([groups.count, groups.longest, -1], np.int64),
            }
        for name, (_, rows) in recorder.tables.items():
            inputs[name] = self._tables[name].rows(inputs[rows])
        return inputs


def load_tower(
    checkpoint: Checkpoint,
    tower: Tower,
    *,
    weights: WeightChoice = "keep",
    threads: int = 1,
    progress: Callable[[float], None] = lambda _: None,
) -> OnnxPictureEncoder:
    """Load a vision tower with its projector. Thread: the executor's.

    Raises:
        CheckpointError: a tensor is missing, left over under the tower's prefixes, misshaped or unreadable.
        ExecutionError: ONNX Runtime refuses the graph.
        MemoryError: there is none for it.
    """
    found = tower_tensors_of(tower, checkpoint)
    recorded = _record(tower, found, weights)
    source = source_of(checkpoint, found, tower.stacks)
    sessions = sessions_of(
        recorded.recording, source, threads, most_bytes=PART_BYTES, progress=progress, gives_back=True
    )
    tables = {
        name: EmbeddingTable(source.value(f"{table.name}.weight"))
        for name, (table, _) in recorded.recorder.tables.items()
    }
    return OnnxPictureEncoder(recorded, sessions, tables)


def tower_footprint(tower: Tower, found: Mapping[str, TensorInfo], *, weights: WeightChoice = "keep") -> Footprint:
    """What a tower will take besides `Tower.working_bytes`, its tensors by declared name. Thread: any."""
    recorded = _record(tower, found, weights)
    graph = recorded.recording.graph
    tables = {f"{table.name}.weight" for table, _ in recorded.recorder.tables.values()}
    return Footprint(
        embedding=sum(found[name].nbytes for name in tables),
        layers=(sum(nbytes for _, nbytes in held_sizes(recorded.recording)),),
        output=0,
        transient=transient_bytes(graph, PART_BYTES, threads=1),
        library=LIBRARY_BYTES,
        state=lambda _: (),
    )


def _record(tower: Tower, found: Mapping[str, TensorInfo], weights: WeightChoice) -> _Recorded:
    """Record a tower. What is quantised in the file stays so, what is dense stays dense. Thread: any."""
    choice: WeightChoice = "float32" if weights == "float32" else "keep"
    graph = Graph()
    forms = forms_of(tower.weights, found, choice, large=is_large(found.values()))
    products = ProductNodes(graph, forms, level=EXACT)
    attention = AttentionNodes(graph, (), "f16")
    recorder = TowerRecorder(graph, products, attention)
    made = tower.forward(recorder)
    outputs = {value.name: value.width for value in made}
    graph.outputs |= {name: TensorType(FLOAT, ("N", width)) for name, width in outputs.items()}
    recording = Recording(graph, products, attention, recorder, outputs)
    return _Recorded(recording, recorder, tuple(outputs))
