"""ONNX Runtime's sessions: one for each part of a graph, run one behind the other on memory that is bound to them."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from models.errors import ExecutionError
from models.executors.onnx.arena import SharedArena
from models.executors.onnx.graph import Array, Graph, Part, serialized

SPIN_US = 20
"""A thread that waits for work spins so long before it sleeps: enough from one product to the next on a quiet machine,
and too little to take a core from another process (measured: quiet 5.0 ms a step for one row, 6.6 without spinning;
beside a busy process 6.9, and 9.0 with the library's own second of spinning)."""
SLOWER = ("MatMulAddFusion", "SkipLayerNormFusion")
"""What ONNX Runtime would make one of, and its kernels are slower at (1.32, 256 rows of 384: LayerNormalization behind
an Add 0.025 ms, fused 0.20; a product of 384 columns and an Add behind it 0.15 ms, fused to a Gemm 0.26)."""
_QUIET = 4
"""ONNX Runtime logs what is fatal: errors are raised."""


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Say what ONNX Runtime refused.

    Raises:
        ExecutionError: it raised in here.
        MemoryError: for want of memory.
    """
    try:
        yield
    except (RuntimeError, ValueError, *_RAISED) as error:  # type: ignore[misc]  # its own kinds, found by looking
        reason = str(error).strip().splitlines()[0]
        if "bad_alloc" in reason or "Failed to allocate" in reason:
            raise MemoryError(reason) from error
        raise ExecutionError(f"{what}: {reason}") from error


_RAISED: tuple[type[Exception], ...] = tuple(
    kind
    for kind in vars(ort.capi.onnxruntime_pybind11_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)


def session_options(threads: int) -> ort.SessionOptions:
    """Options of every session: so many threads, which soon sleep where there is nothing to do."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


@dataclass(slots=True)
class _Binding:
    """Where a session reads and writes. An array that lies where the last one of its name lay is bound already."""

    part: Part
    own: ort.IOBinding
    places: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def put(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Bind those of the part's inputs and outputs that are here. An output may be a later part's input."""
        for names, known, bind in (
            (self.part.inputs, inputs, self.own.bind_input),
            (self.part.outputs, outputs, self.own.bind_output),
        ):
            for name in names:
                if (value := known.get(name)) is None:
                    continue
                place = (value.ctypes.data, value.shape)
                if self.places.get(name) != place:
                    bind(name, "cpu", 0, value.dtype.type, value.shape, place[0])
                    self.places[name] = place

    def read(self, name: str, value: ort.OrtValue) -> None:
        """Bind an input to what another session made."""
        self.own.bind_ortvalue_input(name, value)
        self.places.pop(name, None)

    def leave(self, name: str) -> None:
        """Let the session find a place for an output."""
        self.own.bind_output(name, "cpu")
        self.places.pop(name, None)


@dataclass(slots=True)
class _Session:
    """A part's session, and its bindings by the slots they see."""

    part: Part
    session: ort.InferenceSession
    bindings: dict[tuple[int, int], _Binding] = field(default_factory=dict)


class Sessions:
    """Runs a graph part by part. Thread: the executor's."""

    def __init__(self, graph: Graph, threads: int, *, gives_back: bool = False) -> None:
        """Sessions of a graph; `gives_back`: what a run works with is given back behind it, not kept for the next."""
        self._graph = graph
        self._arena = SharedArena() if gives_back else None
        self._threads = threads
        self._sessions: dict[int, _Session] = {}
        self._nothing = ort.OrtValue.ortvalue_from_numpy(np.zeros((0, 0), np.float32))

    def put(self, index: int, part: Part, weights: Mapping[str, Array]) -> None:
        """Make the session of the part with that index; its kernels pack the weights, and hold what they need.

        Raises:
            ExecutionError: ONNX Runtime refuses the graph.
            MemoryError: there is none for it.
        """
        options = session_options(self._threads)
        if self._arena is not None:
            self._arena.lend(options)
        with refusals("ONNX Runtime refuses the graph"):
            values = [ort.OrtValue.ortvalue_from_numpy(weights[name]) for name in part.weights]
            options.add_external_initializers(list(part.weights), values)
            text = serialized(self._graph, part, weights)
            session = ort.InferenceSession(
                text, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOWER)
            )
        self._sessions[index] = _Session(part, session)

    def run(
        self,
        slots: tuple[int, int],
        slabs: Mapping[str, Array],
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> None:
        """Run the graph once; see `parts`."""
        for _ in self.parts(slots, slabs, inputs, outputs):
            pass

    def parts(
        self,
        slots: tuple[int, int],
        slabs: Mapping[str, Array],
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> Generator[None, None, dict[str, Array]]:
        """Run the graph once, and yield behind each part but the last: others may run between, or it is given up.

        Returns the outputs that have no place.

        Args:
            slots: the run's, [first, end).
            slabs: the state's views of these slots by name of input and output; the same each time for these slots.
            inputs: the step's.
            outputs: where results go.

        Raises:
            ExecutionError: ONNX Runtime could not.
            MemoryError: there was none for it.
        """
        crossing: dict[str, ort.OrtValue] = {}
        try:
            for index in range(len(self._sessions)):
                if index:
                    yield
                with refusals("ONNX Runtime could not run a step"):
                    self._run_part(
                        self._sessions[index],
                        slots,
                        slabs=slabs,
                        inputs={**outputs, **inputs},
                        outputs=outputs,
                        crossing=crossing,
                    )
                if self._arena is not None:
                    self._let_go(slots, self._read_for_the_last_time(index, crossing))
            return self._without_a_place(crossing)
        finally:
            self._let_go(slots, crossing)
            if self._arena is not None:
                crossing.clear()
                self._arena.give_back()

    def _without_a_place(self, crossing: Mapping[str, ort.OrtValue]) -> dict[str, Array]:
        """The graph's outputs among these; copies of what lies in an arena, which is given back behind the run."""
        made = {name: value.numpy() for name, value in crossing.items() if name in self._graph.outputs}
        return made if self._arena is None else {name: value.copy() for name, value in made.items()}

    def _read_for_the_last_time(self, index: int, crossing: dict[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """Take out what no part behind this one reads."""
        later = {name for number, each in self._sessions.items() if number > index for name in each.part.inputs}
        read = [name for name in crossing if name not in later and name not in self._graph.outputs]
        return {name: crossing.pop(name) for name in read}

    def _run_part(
        self,
        each: _Session,
        slots: tuple[int, int],
        *,
        slabs: Mapping[str, Array],
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        crossing: dict[str, ort.OrtValue],
    ) -> None:
        binding = each.bindings.get(slots)
        if binding is None:
            binding = each.bindings[slots] = _Binding(each.part, each.session.io_binding())
            binding.put(slabs, slabs)
        binding.put(inputs, outputs)
        self._bind_crossing(binding, outputs, slabs, crossing)
        each.session.run_with_iobinding(binding.own)
        self._keep_crossing(binding, outputs, slabs, crossing)

    def _bind_crossing(
        self,
        binding: _Binding,
        bound: Mapping[str, Array],
        slabs: Mapping[str, Array],
        crossing: Mapping[str, ort.OrtValue],
    ) -> None:
        """What comes from an earlier part, and what goes to a later one or has no place."""
        for name in binding.part.inputs:
            if name in crossing and name not in bound:
                binding.read(name, crossing[name])
        for name in binding.part.outputs:
            if name not in bound and name not in slabs:
                binding.leave(name)

    def _keep_crossing(
        self,
        binding: _Binding,
        outputs: Mapping[str, Array],
        slabs: Mapping[str, Array],
        crossing: dict[str, ort.OrtValue],
    ) -> None:
        part = binding.part
        names = [name for name in part.outputs if name not in outputs and name not in slabs]
        if not names:
            return
        # The state's were bound first, then those with a place; what is bound again keeps its turn.
        order = sorted(part.outputs, key=lambda name: (name not in slabs, name not in outputs))
        made = dict(zip(order, binding.own.get_outputs(), strict=True))
        crossing |= {name: made[name] for name in names}
        for name in names:
            # Else the binding holds it until these slots run again.
            binding.leave(name)

    def _let_go(self, slots: tuple[int, int], crossing: Mapping[str, ort.OrtValue]) -> None:
        """Have no binding hold what crossed: the bindings of other slots would until they run again."""
        for each in self._sessions.values():
            binding = each.bindings.get(slots)
            if binding is None:
                continue
            for name in each.part.inputs:
                if name in crossing:
                    binding.read(name, self._nothing)


def part_arrays(part: Part, made: Mapping[str, Array]) -> dict[str, Array]:
    """The part's weights among those that were made, contiguous as the kernels want them."""
    return {name: np.ascontiguousarray(made[name]) for name in part.weights}
