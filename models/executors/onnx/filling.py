"""What a recorded graph is filled with: a checkpoint's tensors in the kernels' forms, part by part."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.arch.base import Stack
from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.forms import Form, WeightChoice, form_of
from models.executors.onnx.graph import Graph, Part, cut, units, weights_nbytes
from models.executors.onnx.latent import latent_nbytes
from models.executors.onnx.products import ProductNodes, as_float32, filled
from models.executors.onnx.recorder import Recorder
from models.executors.onnx.recurrent import conv_nbytes, tap_weight
from models.executors.onnx.sessions import Sessions, part_arrays
from models.ops import Embedding, Experts, Joined, Linear, ShortConv, weights_in
from models.process_memory import trim
from models.quantization import Tensor
from models.sources.base import Checkpoint, NamedTensor, TensorInfo
from models.weights.latent import latent_matrices
from models.weights.stacks import separate_tensors

PART_BYTES = 64 << 20
PARTS = 16
"""A session has so many bytes of weights, or that part of them all: this much is held twice while it is made."""
LOADERS = 4
"""Parts of a large model that are made at once at most: making one keeps one core busy."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded model: its graph, and what it wants to be filled with."""

    graph: Graph
    products: ProductNodes
    attention: AttentionNodes
    recorder: Recorder
    outputs: Mapping[str, int]


def part_bytes(graph: Graph) -> int:
    """The weights of one session of a graph. Thread: any."""
    return max(PART_BYTES, sum(graph.weights.values()) // PARTS)


def transient_bytes(graph: Graph, most_bytes: int, threads: int) -> int:
    """What filling a graph holds besides for a while, a session having so many bytes of weights. Thread: any.

    Of a large model a second part is made meanwhile where there are cores for it.
    """
    largest = max((weights_nbytes(graph, nodes) for nodes in units(graph)), default=0)
    second = most_bytes if _loaders(most_bytes, threads) > 1 else 0
    return max(most_bytes, largest) + second + _twice(graph.weights.values())


def _loaders(most_bytes: int, threads: int) -> int:
    return min(threads, LOADERS) if most_bytes > PART_BYTES else 1


def _twice(sizes: Iterable[int]) -> int:
    """What making the greatest of some arrays takes besides: as the file has it, and on the way."""
    return 2 * max(sizes, default=0)


def forms_of(weights: object, found: Mapping[str, TensorInfo], choice: WeightChoice, *, large: bool) -> dict[str, Form]:
    """The form of every declared matrix, by its tensor's name. Thread: any."""
    forms: dict[str, Form] = {}
    for weight in weights_in(weights):
        for matrix in weight.matrices if isinstance(weight, Experts) else (weight,):
            parts = matrix.parts if isinstance(matrix, Joined) else (matrix,)
            names = [f"{part.name}.weight" for part in parts if isinstance(part, Linear | Embedding)]
            forms |= {name: form_of(found[name], choice, large=large) for name in names}
    return forms


class Source:
    """A checkpoint's tensors by declared name, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, NamedTensor]) -> None:
        self._tensors = tensors

    def value(self, name: str) -> Tensor:
        """The tensor's value. Raises CheckpointError."""
        return self._tensors[name].value


def source_of(checkpoint: Checkpoint, found: Mapping[str, TensorInfo], stacks: Sequence[Stack]) -> Source:
    """The tensors that were found for declared names. Thread: any. Raises CheckpointError."""
    tensors = {tensor.name: tensor for tensor in separate_tensors(checkpoint.tensors(), stacks)}
    return Source({name: tensors[info.name] for name, info in found.items()})


def sessions_of(
    recording: Recording,
    source: Source,
    threads: int,
    *,
    most_bytes: int,
    progress: Callable[[float], None] = lambda _: None,
    gives_back: bool = False,
) -> Sessions:
    """The sessions of a recording, with so many bytes of weights each. Thread: the executor's.

    Raises:
        CheckpointError: a tensor is unreadable.
        ExecutionError: ONNX Runtime refuses the graph.
        MemoryError: there is none for it.
    """
    graph = recording.graph
    sessions, parts = Sessions(graph, threads, gives_back=gives_back), cut(graph, most_bytes)
    sizes = [sum(graph.weights[name] for name in part.weights) for part in parts]
    total, done = sum(sizes) or 1, 0

    def make(index: int) -> None:
        sessions.put(index, parts[index], part_arrays(parts[index], _filled(recording, parts[index], source)))

    # The largest first: what is held twice while a part is made comes on top of all that were made before.
    order = sorted(range(len(parts)), key=lambda number: -sizes[number])
    costs = [sizes[index] + _twice(graph.weights[name] for name in parts[index].weights) for index in order]
    room = transient_bytes(graph, most_bytes, threads)
    with closing(_each_made(make, order, costs, room, _loaders(most_bytes, threads))) as each_made:
        for index in each_made:
            done += sizes[index]
            progress(min(done / total, 1.0))
            trim()
    return sessions


def _each_made(
    make: Callable[[int], None], order: Sequence[int], costs: Sequence[int], room: int, at_once: int
) -> Generator[int, None, None]:
    """Make all, some side by side where their costs leave room, and tell of each that is made.

    Who stops listening waits for those that are being made.
    """
    if at_once == 1:
        # In this thread, for another one's memory stays with it: 34 MiB of a small model.
        for index in order:
            make(index)
            yield index
        return
    waiting, running = deque(zip(order, costs, strict=True)), dict[Future[None], tuple[int, int]]()
    with ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            held = sum(cost for _, cost in running.values())
            while waiting and (not running or (len(running) < at_once and held + waiting[0][1] <= room)):
                index, cost = waiting.popleft()
                running[pool.submit(make, index)] = (index, cost)
                held += cost
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, _ = running.pop(future)
                future.result()
                yield index


def held_sizes(recording: Recording) -> Iterator[tuple[str, int]]:
    """What the kernels hold of each weight, by name. Thread: any."""
    for product in recording.products.products.values():
        bias = 4 * product.outputs * product.has_bias
        yield product.name, product.form.nbytes(product.outputs, product.inputs) + bias
    for name in recording.recorder.vectors:
        yield name, recording.graph.weights[name]
    for up in recording.recorder.ups:
        yield from latent_nbytes(up)
    for conv in recording.recorder.recurrent.convolutions:
        yield from conv_nbytes(conv)


def _filled(recording: Recording, part: Part, source: Source) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a part's weights by name."""
    made: dict[str, npt.NDArray[np.generic]] = {}
    wanted = set(part.weights)
    for product in recording.products.products.values():
        if not wanted & {name for name, _, _ in product.arrays()}:
            continue
        names = [name for each in product.parts for name, _ in each.tensors()]
        made |= filled(product, {name: source.value(name) for name in names})
    for up in recording.recorder.ups:
        if wanted & {name for name, _ in latent_nbytes(up)}:
            made |= latent_matrices(up, {name: as_float32(source.value(name)) for name, _ in up.tensors()})
    for conv in recording.recorder.recurrent.convolutions:
        if wanted & {name for name, _ in conv_nbytes(conv)}:
            made |= _taps(conv, source)
    for name, offset in recording.recorder.vectors.items():
        if name in wanted:
            made[name] = as_float32(source.value(name)).reshape(-1) + np.float32(offset)
    return made


def _taps(conv: ShortConv, source: Source) -> dict[str, npt.NDArray[np.generic]]:
    """A convolution's weights, an array a tap."""
    kernels = as_float32(source.value(f"{conv.name}.weight")).reshape(conv.channels, conv.taps)
    made = {tap_weight(conv, number): np.ascontiguousarray(kernels[:, number]) for number in range(conv.taps)}
    biases = [name for name, _ in conv.tensors()][1:]
    return {**made, **{name: as_float32(source.value(name)) for name in biases}}
