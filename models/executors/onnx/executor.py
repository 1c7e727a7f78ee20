"""The executor on ONNX Runtime's CPU kernels.

A row's logits are the same to the last bit whatever rows run beside it: every product and every query is summed by
itself, in an order that depends on the row alone. A row that runs one token in a step sums its scores in another order
than one that runs several; where drafts are on, layers without a window compute one as several, and then it does not
matter how a row's tokens are cut into steps either; the same holds for state spaces. Tested for the kernels of x86-64
with AVX-512.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.executors.base import Checkpoint, Logits, Row, Segment, Step
from models.executors.onnx import steps, two_way
from models.executors.onnx.memory import Rotations
from models.executors.onnx.sessions import Sessions
from models.executors.onnx.slabs import WINDOW_SLACK, state_nbytes
from models.executors.onnx.state import HostCheckpoint, HostSegment, Slabs
from models.executors.onnx.tables import EmbeddingTable
from models.executors.onnx.values import Lookup
from models.executors.replay import MOST_REPLAYED, Replays
from models.ops import PositionScale, RelativeBias
from models.process_memory import trim
from models.sampling import Draw, Drawn
from models.sampling.host import sample

COUNTED_TOKENS = 64
"""What a row takes is asked for in every step, and counted once for so many tokens."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HostLogits:
    """Logits that were computed. Shapes: float32 (N, V)."""

    values: Floats

    def read(self) -> Floats:
        """See `Logits.read`."""
        return self.values

    def last(self) -> "HostLogits":
        """See `Logits.last`."""
        return HostLogits(self.values[-1:])


@dataclass(frozen=True, slots=True)
class HostSampled:
    """Tokens that were drawn."""

    drawn: list[Drawn]

    def read(self) -> list[Drawn]:
        """See `Sampled.read`."""
        return self.drawn


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model's parts on this executor, as `models.executors.onnx.loading` makes them."""

    sessions: Sessions
    tables: Mapping[str, EmbeddingTable]
    """By the graph's input."""
    ropes: Sequence[Rotations]
    slabs: Slabs
    outputs: Mapping[str, int]
    """The graph's outputs besides state, and how wide each is."""
    weight_bytes: int
    even_rows: bool = False
    """A step runs an even number of tokens."""
    looks_twice: bool = False
    """See `OnnxOptions.drafts`."""
    suppressed: Sequence[int] = ()
    """Tokens whose logits are -inf, whatever they are."""
    scales: Sequence[PositionScale] = ()
    """What queries grow by; each has an input."""
    chunks: Sequence[int] = ()
    """See `AttentionNodes.chunks`."""
    lookups: Mapping[str, Lookup] = field(default_factory=dict)
    """What the tables' inputs are looked up by."""
    scores: Mapping[str, tuple[int | None, RelativeBias | None]] = field(default_factory=dict)
    """See `BidirectionalNodes.scores`."""
    bias_tables: Mapping[str, Floats] = field(default_factory=dict)
    """Of relative positions, by name. Shapes: (buckets, H) each."""
    taps: frozenset[int] = frozenset()
    """The lengths of convolutions."""
    sees: bool = False
    """Rows may hold pictures."""
    spare: int = 0
    """Rows of the tables of rotations for positions with several axes: tokens of the longest step, or none."""
    deep: Mapping[str, int] = field(default_factory=dict)
    """See `Recorder.deep`."""
    two_way_masks: frozenset[two_way.Mask] = frozenset()
    """See `TwoWayNodes.masks`."""


class OnnxExecutor:
    """Implements `Executor`. Thread: the executor's, but for what says otherwise."""

    depth = 0

    def __init__(self, loaded: Loaded, vocab_size: int) -> None:
        self._loaded: Loaded | None = loaded
        self._slabs = loaded.slabs
        self._weight_bytes = loaded.weight_bytes
        self.vocab_size = vocab_size
        self._written_by_cells = {spec.heads for spec in self._slabs.specs if spec.flat}
        self._lengths: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._replays: Replays[HostCheckpoint] = Replays(self._slabs.checkpoint, self._slabs.go_to)

    @property
    def needs_checkpoints(self) -> bool:
        """See `Executor.needs_checkpoints`. Thread: any."""
        return self._slabs.is_recurrent

    def forward(self, step: Step) -> HostLogits | None:
        """See `Executor.forward`. Computes when it is called."""
        if not self.needs_checkpoints:
            return self._forward(step.rows)
        logits = None
        for rows in self._replays.passes(step.rows):
            logits = self._forward(rows)
        return logits

    def _forward(self, rows: Sequence[Row]) -> HostLogits | None:
        """Run the rows, each from where its state stands."""
        assert self._loaded is not None
        wanted, suppressed = sum(row.wanted for row in rows), list(self._loaded.suppressed)
        found: dict[int, Floats] = {}
        for run in steps.runs(rows, by_slot=self.needs_checkpoints):
            (made,) = self.run(run).values()
            made[:, suppressed] = -np.inf
            if run.rows == rows:
                return HostLogits(made[:wanted]) if wanted else None
            ends = np.cumsum([row.wanted for row in run.rows])
            found |= {row.slot: made[end - row.wanted : end] for row, end in zip(run.rows, ends, strict=True)}
        return HostLogits(np.concatenate([found[row.slot] for row in rows])) if wanted else None

    def run(self, run: steps.Run, **more: Array) -> dict[str, Floats]:
        """One pass. Shapes: an array (N, width) for each of the graph's outputs."""
        loaded, slabs = self._loaded, self._slabs
        assert loaded is not None
        even, twice = loaded.even_rows, loaded.looks_twice
        inputs = steps.arrays(run, capacity=slabs.capacity, even=even, twice=twice, spare=loaded.spare) | more
        if self.needs_checkpoints:
            inputs |= steps.recurrent_arrays(run, loaded.taps, len(inputs["unpad"]))
            for row in run.rows:
                if row.begin == 0:
                    slabs.clear(row.slot)
        ids = np.array([token for row in run.rows for token in row.tokens], np.int64)
        ids = np.append(ids, ids[-1:].repeat(len(inputs["unpad"]) - len(ids)))
        places = steps.positions(run, len(ids))
        inputs |= {name: table.rows(loaded.lookups[name].rows_of(ids, places)) for name, table in loaded.tables.items()}
        inputs |= self._seen(run, inputs)
        explicit = [position for row in run.rows for position in row.positions]
        for index, rope in enumerate(loaded.ropes):
            rope.reach(run.reach)
            rope.put(explicit)
            inputs |= {f"cos.{index}": rope.cos, f"sin.{index}": rope.sin}
        inputs |= {f"scale.{index}": scale.factors(places) for index, scale in enumerate(loaded.scales)}
        inputs |= {f"chunk.{length}": steps.chunked(run, length, int(inputs["total"])) for length in loaded.chunks}
        for heads in self._written_by_cells:
            inputs[f"cells.{heads}"] = steps.cells(run, heads, slabs.capacity, len(ids))
        made = {name: np.empty((len(inputs["wanted"]), width), np.float32) for name, width in loaded.outputs.items()}
        views = slabs.views(run.first, run.end)
        loaded.sessions.run((run.first, run.end), views, inputs, made)
        for row in run.rows:
            self._lengths[row.slot] = row.begin + row.length
        return made

    def _seen(self, run: steps.Run, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What pictures change: their rows in place of embeddings and added deeper, and runs that look both ways."""
        loaded = self._loaded
        assert loaded is not None
        if not loaded.sees:
            return {}
        embedded = inputs["embed.0"]
        made = {name: np.zeros_like(embedded) for name in loaded.deep}
        start = 0
        for row in run.rows:
            for span in row.spans:
                own = slice(start + span.at, start + span.at + span.end - span.begin)
                embedded[own] = span.picture.rows[span.begin : span.end]
                for name, layers in loaded.deep.items():
                    made[name][own] = span.picture.deep[layers - 1][span.begin : span.end]
            start += row.length
        own_row = next((row for row in run.rows if row.runs), None)
        return made | two_way.arrays(own_row, loaded.two_way_masks, self._slabs.held)

    def sample(self, logits: Logits, draws: Sequence[Draw]) -> HostSampled:
        """See `Executor.sample`."""
        assert isinstance(logits, HostLogits)
        return HostSampled(sample(logits.values, draws))

    def draft_room(self, begin: int) -> int:
        """See `Executor.draft_room`: a window must not move over the drafts. Thread: any."""
        room = min((spec.room(begin + 1) for spec in self._slabs.specs), default=WINDOW_SLACK)
        return max(room - MOST_REPLAYED, 0) if self.needs_checkpoints else room

    def state_nbytes(self, tokens: int) -> int:
        """See `Executor.state_nbytes`, rounded up to some tokens. Thread: any."""
        blocks = -(-tokens // COUNTED_TOKENS)
        if blocks not in self._sizes:
            own = self._slabs.recurrent_nbytes
            self._sizes[blocks] = state_nbytes(self._slabs.specs, blocks * COUNTED_TOKENS) + own
        return self._sizes[blocks] if tokens else 0

    def first_held(self, tokens: int) -> int:
        """See `Executor.first_held`. Thread: any."""
        return self._slabs.first_held(tokens)

    def segment(self, slot: int, tokens: int, begin: int, end: int) -> HostSegment:
        """See `Executor.segment`."""
        return self._slabs.segment(slot, tokens, begin, end)

    def checkpoint(self, slot: int, tokens: int) -> HostCheckpoint | None:
        """See `Executor.checkpoint`."""
        return self._slabs.checkpoint(slot) if self._replays.stands(slot) == tokens else None

    def restore(self, slot: int, segments: Sequence[Segment], checkpoint: Checkpoint | None = None) -> None:
        """See `Executor.restore`."""
        own = [segment for segment in segments if isinstance(segment, HostSegment)]
        assert len(own) == len(segments)
        self._slabs.restore(slot, own)
        self._lengths[slot] = sum(segment.length for segment in own)
        if self.needs_checkpoints:
            assert isinstance(checkpoint, HostCheckpoint)
            self._slabs.go_to(slot, checkpoint)
            self._replays.restored(slot, self._lengths[slot])

    def read_segment(self, arrays: Mapping[str, Array], length: int) -> HostSegment:
        """See `Executor.read_segment`."""
        return self._slabs.read(arrays, length)

    def read_checkpoint(self, arrays: Mapping[str, Array]) -> HostCheckpoint:
        """See `Executor.read_checkpoint`."""
        return self._slabs.read_checkpoint(arrays)

    def release(self, slot: int) -> None:
        """See `Executor.release`."""
        self._replays.forget(slot)
        if self._lengths.pop(slot, 0):
            self._slabs.forget(slot)

    def memory_bytes(self) -> int:
        """See `Executor.memory_bytes`: weights as the kernels hold them, and the slots' states."""
        return self._weight_bytes + sum(self.state_nbytes(tokens) for tokens in list(self._lengths.values()))

    def give_back(self) -> None:
        """See `Executor.give_back`: the C library's freed memory."""
        trim()

    def close(self) -> None:
        """See `Executor.close`."""
        self._loaded = None
        self._lengths.clear()
        trim()
