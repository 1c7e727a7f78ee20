"""Matrices that lie together in one tensor, experts above all, seen as matrices of their own, and read one by one."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from models.arch.base import Stack
from models.errors import CheckpointError
from models.quantization import Array, Blocks, Packed, Tensor
from models.sources.base import Mapped, NamedTensor, TensorInfo


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor that is a stack, by its name."""

    stack: Stack
    groups: tuple[str, ...]

    def names(self, expert: int) -> list[str]:
        """What the expert's entry holds."""
        return [part.format(*self.groups, n=expert) for part in self.stack.parts]


def separate_infos(infos: Iterable[TensorInfo], stacks: Sequence[Stack]) -> Iterator[TensorInfo]:
    """The tensors with an entry for each part in place of stacks. Thread: any.

    Raises:
        CheckpointError: a stack does not divide into its parts.
    """
    for info in infos:
        found = _found(info.name, stacks)
        if found is None:
            yield info
            continue
        is_whole, parts = found.stack.whole, len(found.stack.parts)
        shape = info.shape if is_whole else info.shape[1:]
        shape = (prod(shape[:-1]), shape[-1]) if found.stack.flat and shape else shape
        shape = shape[::-1] if found.stack.transposed else shape
        if not shape or shape[0] % parts or not info.shape[0]:
            reason = f"its shape {list(info.shape)} is not that of {parts} matrices{'' if is_whole else ' an expert'}"
            raise CheckpointError(reason, file=info.file, tensor=info.name)
        entries = 1 if is_whole else info.shape[0]
        own = (shape[0] // parts, *shape[1:])
        nbytes = info.nbytes // entries // parts
        quantized = info.quantized and len(own) > 1
        for expert in range(entries):
            for index, name in enumerate(found.names(expert)):
                entry = None if is_whole else expert
                mapped = info.mapped and partial(_mapped_part, info.mapped, entry, index, found.stack)
                yield replace(info, name=name, shape=own, nbytes=nbytes, quantized=quantized, mapped=mapped)


def separate_tensors(tensors: Iterable[NamedTensor], stacks: Sequence[Stack]) -> Iterator[NamedTensor]:
    """The same of tensors to be read; the infos say how many experts there are. Thread: any."""
    for tensor in tensors:
        found = _found(tensor.name, stacks)
        if found is not None and found.stack.whole:
            for index, name in enumerate(found.names(0)):
                mapped = tensor.mapped and partial(_mapped_part, tensor.mapped, None, index, found.stack)
                read = partial(_part, tensor.read, index, found.stack)
                yield NamedTensor(name, read, tensor.file, mapped=mapped)
            continue
        if found is None or tensor.read_entry is None:
            yield tensor
            continue
        for expert in range(tensor.entries):
            for index, name in enumerate(found.names(expert)):
                read = partial(_part, partial(tensor.read_entry, expert), index, found.stack)
                mapped = tensor.mapped and partial(_mapped_part, tensor.mapped, expert, index, found.stack)
                yield NamedTensor(name, read, tensor.file, mapped=mapped)


def _found(name: str, stacks: Sequence[Stack]) -> _Found | None:
    for stack in stacks:
        if match := re.fullmatch(stack.pattern, name):
            return _Found(stack, match.groups(default=""))
    return None


def _mapped_part(open_: Callable[[], Mapped], expert: int | None, part: int, stack: Stack) -> Mapped:
    """One part of an expert's entry, or of the whole, of what is mapped."""
    mapped = open_()
    value = mapped.value
    if mapped.order is not None:
        value = _in_order(value, mapped.order)
    own = value if expert is None else _entry(value, expert)
    return Mapped(_part(lambda: own, part, stack))


def _in_order(value: Tensor, order: npt.NDArray[np.intp]) -> Tensor:
    match value:
        case Packed():
            raise AssertionError("MLX's layout is stored in order")
        case Blocks():
            return replace(value, rows=value.rows[order])
        case _:
            ordered: Array = value[order]
            return ordered


def _entry(value: Tensor, index: int) -> Tensor:
    match value:
        case Packed():
            biases = None if value.biases is None else value.biases[index]
            scale = None if value.global_scale is None else value.global_scale.reshape(-1)
            own = scale if scale is None or len(scale) == 1 else scale[index : index + 1]
            return replace(
                value, weight=value.weight[index], scales=value.scales[index], biases=biases, global_scale=own
            )
        case Blocks():
            rows = len(value.rows) // value.shape[0]
            return replace(value, rows=value.rows[index * rows : (index + 1) * rows], shape=value.shape[1:])
        case _:
            entry: Array = value[index]
            return entry


def _part(read: Callable[[], Tensor], part: int, stack: Stack) -> Tensor:
    """One part of what is read."""
    value = read()
    if stack.transposed:
        assert isinstance(value, np.ndarray)
        value = np.ascontiguousarray(value.T)
    if stack.flat:
        assert isinstance(value, np.ndarray)
        value = value.reshape(-1, value.shape[-1])
    count = len(stack.parts)
    if count == 1:
        return value
    rows = value.shape[0]
    taken = slice(part, None, count) if stack.interleaved else slice(part * rows // count, (part + 1) * rows // count)
    match value:
        case Packed():
            biases = None if value.biases is None else value.biases[taken]
            return replace(value, weight=value.weight[taken], scales=value.scales[taken], biases=biases)
        case Blocks():
            return replace(value, rows=value.rows[taken], shape=(rows // count, *value.shape[1:]))
        case _:
            return value[taken]
