"""What runs a model: an executor, and the plain data that it is told.

The engine says in integers which rows run; an executor holds weights, state and logits: nobody else has arrays.
A row lives in a *slot*. Its state there is of the tokens that it was fed; a step says how many of those count
(`begin`), so taking back drafted tokens is beginning earlier.

One step is two calls, `forward` and `sample`, so that masks and counts can come between them.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from models.sampling import Draw, Drawn

HostArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPicture:
    """What a vision tower made of a picture. Shapes: rows and each of `deep` float32 (N, D)."""

    rows: npt.NDArray[np.float32]
    """In place of the embeddings of N tokens, as the decoder's table has them."""
    deep: tuple[npt.NDArray[np.float32], ...] = ()
    """What is added to the same tokens behind each of the first layers."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in (self.rows, *self.deep))


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) of a picture, in place of as many tokens of a row's step."""

    at: int
    """The first of these tokens, counted from the first one that the step runs."""
    picture: EncodedPicture
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one step."""

    slot: int
    begin: int
    """Tokens that its state holds before this step; what it holds behind them is forgotten."""
    tokens: tuple[int, ...]
    """What is run. Empty: the one token that was sampled for the slot last, which nobody may have read yet."""
    wanted: int = 1
    """Of so many of its last tokens logits are wanted; 0: of none."""
    shift: int = 0
    """What is added to a token's place in the row to give its position. 0 where positions have no axes."""
    positions: tuple[tuple[int, int, int], ...] = ()
    """The positions of each token along three axes (time, height, width), where they are not its place and `shift`."""
    spans: tuple[Span, ...] = ()
    """Where pictures' rows stand; what `tokens` says there is for other tables than the embedding."""
    runs: tuple[tuple[int, int], ...] = ()
    """Of its tokens those [begin, end) that look at each other both ways, whole runs alone."""

    @property
    def length(self) -> int:
        """Tokens that are run."""
        return len(self.tokens) or 1


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one step, each slot once. Rows that decode come first, and behind them those that prefill."""

    rows: tuple[Row, ...]

    @property
    def wanted(self) -> int:
        """Places whose logits are wanted, row behind row."""
        return sum(row.wanted for row in self.rows)


class Segment(Protocol):
    """What all layers remember of some consecutive tokens, copied out of a slot; of use to the same executor only."""

    @property
    def length(self) -> int:
        """Its tokens."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def part(self, begin: int, end: int) -> Self:
        """A copy of its tokens [begin, end)."""
        ...

    def arrays(self) -> Iterator[tuple[str, HostArray]]:
        """Its arrays by name, on the host, for a file. Waits for them. Floats narrower than numpy's come as ints."""
        ...


class Checkpoint(Protocol):
    """What recurrent layers remember of a row's first tokens, copied; of use to the same executor only."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def arrays(self) -> Iterator[tuple[str, HostArray]]:
        """Its arrays by name, on the host, for a file. Waits for them."""
        ...


class Logits(Protocol):
    """Logits of a step's wanted places, perhaps not computed yet."""

    def read(self) -> npt.NDArray[np.float32]:
        """Wait for them. Shapes: (N, V)."""
        ...

    def last(self) -> Self:
        """Those of the last place alone, to be drawn from later."""
        ...


class Sampled(Protocol):
    """Tokens that were drawn, perhaps not computed yet."""

    def read(self) -> list[Drawn]:
        """Wait for them, in the order of the draws."""
        ...


class Executor(Protocol):
    """Runs one model. Thread: the executor's thread, all of it but for what says otherwise."""

    @property
    def depth(self) -> int:
        """How many steps may be under way before one is read: 0 where `forward` computes, 1 where it only begins to."""
        ...

    @property
    def vocab_size(self) -> int:
        """Logits of a place. Thread: any."""
        ...

    @property
    def needs_checkpoints(self) -> bool:
        """Whether some layer is recurrent, so that a row can go on only where a checkpoint was taken. Thread: any."""
        ...

    def forward(self, step: Step) -> Logits | None:
        """Run the rows' tokens, and append to their states. None where no logits are wanted.

        Raises:
            ExecutionError: the device could not; the states of the step's rows are worth nothing then.
        """
        ...

    def sample(self, logits: Logits, draws: Sequence[Draw]) -> Sampled:
        """Draw a token for each wanted place, in order; the last of a slot's is what an empty `Row.tokens` means."""
        ...

    def draft_room(self, begin: int) -> int:
        """How many tokens may be drafted behind the next one of a row of `begin` tokens, so that any may be taken back.

        Thread: any.
        """
        ...

    def state_nbytes(self, tokens: int) -> int:
        """The bytes that one row's state of that many tokens takes over all layers. Thread: any."""
        ...

    def first_held(self, tokens: int) -> int:
        """The position of the oldest of a row's `tokens` tokens that every layer still holds. Thread: any."""
        ...

    def segment(self, slot: int, tokens: int, begin: int, end: int) -> Segment:
        """A copy of [begin, end) of a slot of `tokens` tokens; `first_held(tokens) <= begin < end <= tokens`."""
        ...

    def checkpoint(self, slot: int, tokens: int) -> Checkpoint | None:
        """A copy of what recurrent layers remember of a slot's first `tokens` tokens.

        None: they remember another number of tokens, as they do behind drafts that were taken back.
        """
        ...

    def restore(self, slot: int, segments: Sequence[Segment], checkpoint: Checkpoint | None = None) -> None:
        """Fill a slot with the first tokens of a row, stored earlier; the checkpoint is of as many tokens."""
        ...

    def read_segment(self, arrays: Mapping[str, HostArray], length: int) -> Segment:
        """The segment of so many tokens that had these `arrays()`.

        Raises:
            ValueError: they are not what this executor's segments have.
        """
        ...

    def read_checkpoint(self, arrays: Mapping[str, HostArray]) -> Checkpoint:
        """The checkpoint that had these `arrays()`.

        Raises:
            ValueError: they are not what this executor's checkpoints have.
        """
        ...

    def release(self, slot: int) -> None:
        """Forget a slot's state and give its memory back. Idempotent."""
        ...

    def memory_bytes(self) -> int:
        """What weights and slots hold of the device's memory now; segments are whoever has them's. Thread: any."""
        ...

    def give_back(self) -> None:
        """Return to the system what is kept of freed memory. Thread: any."""
        ...

    def close(self) -> None:
        """Free everything; the executor is of no use afterwards."""
        ...


class Encoder(Protocol):
    """A language model of which only the layers are asked. Thread: the executor's."""

    def residuals(self, tokens: Sequence[int], layers: Sequence[int], *, visible: int | None = None) -> HostArray:
        """What the first so many layers make of a text of its own, for each number in `layers`, before the final norm.

        Keys from `visible` on are padding that no query sees. Shapes: returns float32 (len(layers), T, D).
        """
        ...

    def close(self) -> None:
        """Free everything; the encoder is of no use afterwards."""
        ...


class PictureEncoder(Protocol):
    """A vision tower with its projector. Thread: the executor's, but for what says otherwise."""

    def encode(self, passes: Sequence[Mapping[str, HostArray]]) -> Generator[None, None, EncodedPicture]:
        """What the tower makes of a picture, by what a family's `Prepared.passes` has.

        Yields after each piece of the work, so that others may run between; may be given up there.

        Raises:
            ExecutionError: the device could not.
        """
        ...

    def memory_bytes(self) -> int:
        """What weights hold of the device's memory now. Thread: any."""
        ...

    def close(self) -> None:
        """Free everything; the encoder is of no use afterwards."""
        ...


class Embedder(Protocol):
    """A model of which whole texts' hidden states are asked. Thread: the executor's, but for what says otherwise."""

    def padded(self, length: int) -> int:
        """What a text of so many tokens is padded to: texts that share a pass are padded alike. Thread: any."""
        ...

    def hidden(self, texts: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """The hidden states behind the final norm of texts of one padded length, which do not see each other.

        Shapes: returns float32 (L, D) for each text.

        Raises:
            ExecutionError: the device could not.
        """
        ...

    def memory_bytes(self) -> int:
        """What weights and state hold of the device's memory now. Thread: any."""
        ...

    def give_back(self) -> None:
        """Return to the system what is kept of freed memory. Thread: any."""
        ...

    def close(self) -> None:
        """Free everything; the embedder is of no use afterwards."""
        ...
