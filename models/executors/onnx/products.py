"""Products with matrices: the nodes, and the arrays that the kernels are given for them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models.errors import CheckpointError
from models.executors.onnx.forms import Form, finer, joined
from models.executors.onnx.graph import CONTRIB, Array, Graph
from models.executors.onnx.kernels import ROUNDED, treats_rows_alike
from models.ops import Embedding, Linear
from models.quantization import Blocks, Tensor, dequantize
from models.weights.integers import integers, quantized
from models.weights.patches import as_matrix

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Product:
    """A product with one matrix, or with several side by side: `name` begins its arrays' names."""

    name: str
    parts: tuple[Linear | Embedding, ...]
    form: Form

    @property
    def inputs(self) -> int:
        """K, the values of a row."""
        first = self.parts[0]
        return first.width if isinstance(first, Embedding) else first.inputs

    @property
    def outputs(self) -> int:
        """N, the rows of all parts."""
        return sum(part.rows if isinstance(part, Embedding) else part.outputs for part in self.parts)

    @property
    def has_bias(self) -> bool:
        """A vector is added."""
        return any(isinstance(part, Linear) and part.bias for part in self.parts)

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and bytes of each array that the kernels are given."""
        n, k = self.outputs, self.inputs
        if self.form.is_dense:
            yield f"{self.name}.dense", (k, n), 4 * k * n
        else:
            blocks, width = k // self.form.block, self.form.block * self.form.bits // 8
            yield f"{self.name}.codes", (n, blocks, width), n * blocks * width
            yield f"{self.name}.scales", (n, blocks), 4 * n * blocks
            if self.form.offset_block:
                offsets = k // self.form.offset_block
                yield f"{self.name}.offsets", (offsets, n), 4 * n * offsets
        if self.has_bias:
            yield f"{self.name}.bias", (n,), 4 * n


class ProductNodes:
    """Records products. Thread: any."""

    def __init__(self, graph: Graph, forms: Mapping[str, Form], *, level: int = ROUNDED, finely: bool = True) -> None:
        """Record into `graph`.

        Args:
            graph: what is recorded.
            forms: the form of each matrix by its tensor's name.
            level: whether activations are rounded.
            finely: round in smaller blocks where precision is asked for.
        """
        self._graph = graph
        self._forms = forms
        self._level = level
        self._finely = finely and level == ROUNDED
        self._sums: dict[tuple[str, int], str] = {}
        self.products: dict[str, Product] = {}

    def may_join(self, parts: Sequence[Linear]) -> bool:
        """Whether these matrices of one input can be one."""
        return joined([self._forms[f"{part.name}.weight"] for part in parts]) is not None

    def wants_even_rows(self, parts: Iterable[Linear | Embedding]) -> bool:
        """Whether an odd last row of one of these products would be computed in another order than the others'."""
        forms = {self._forms[f"{part.name}.weight"] for part in parts}
        return any(self._is_uneven(form) for form in forms)

    @property
    def any_wants_even_rows(self) -> bool:
        """Whether that holds for some matrix."""
        return any(self._is_uneven(form) or self._is_uneven(finer(form)) for form in set(self._forms.values()))

    def _is_uneven(self, form: Form) -> bool:
        return not form.is_dense and not treats_rows_alike(form.bits, form.block, self._level)

    def leaves_bias(self, part: Linear | Embedding) -> bool:
        """Whether the bias is added by a node of its own, which something behind it may be able to do as well."""
        return isinstance(part, Linear) and part.bias and self._forms[f"{part.name}.weight"].is_dense

    def record(
        self, x: str, parts: Sequence[Linear | Embedding], *, precise: bool = False, without_bias: bool = False
    ) -> str:
        """The product of `x` (…, K) with the parts side by side, biases added; the name of the result (…, N).

        Where `without_bias`, of a product that `leaves_bias`, somebody else adds `NAME.bias`.
        """
        form = joined([self._forms[f"{part.name}.weight"] for part in parts])
        assert form is not None
        if precise and self._finely:
            form = finer(form)
        graph, product = self._graph, self._declared(parts, form)
        bias = f"{product.name}.bias" if product.has_bias else ""
        if form.is_dense:
            (y,) = graph.add("MatMul", [x, f"{product.name}.dense"])
            return graph.add("Add", [y, bias])[0] if bias and not without_bias else y
        (y,) = graph.add(
            "MatMulNBits",
            [x, f"{product.name}.codes", f"{product.name}.scales", *(["", "", bias] if bias else [])],
            domain=CONTRIB,
            K=product.inputs,
            N=product.outputs,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=self._level,
        )
        if not form.offset_block:
            return y
        sums = self._block_sums(x, product.inputs, form.offset_block)
        if graph.padded:
            return graph.add("Add", [y, *graph.add("MatMul", [sums, f"{product.name}.offsets"])])[0]
        return graph.add("Gemm", [sums, f"{product.name}.offsets", y])[0]

    def dense(self, parts: Sequence[Linear | Embedding]) -> tuple[str, str] | None:
        """For a node that multiplies itself: the names of the matrix (K, N) and of the bias, if there is one.

        None: the matrices are not float32.
        """
        form = joined([self._forms[f"{part.name}.weight"] for part in parts])
        if form is None or not form.is_dense:
            return None
        product = self._declared(parts, form)
        return f"{product.name}.dense", f"{product.name}.bias" if product.has_bias else ""

    def _declared(self, parts: Sequence[Linear | Embedding], form: Form) -> Product:
        product = Product("+".join(part.name for part in parts), tuple(parts), form)
        self.products[product.name] = product
        self._graph.weights.update({name: nbytes for name, _, nbytes in product.arrays()})
        return product

    def _block_sums(self, x: str, width: int, block: int) -> str:
        """The sums of each block of `x`, once an input. Shapes: x (…, width); (…, width / block)."""
        if (x, block) not in self._sums:
            graph = self._graph
            blocks = graph.constant(np.array([*graph.lead, width // block, block], np.int64))
            axis = graph.constant(np.array([-1], np.int64))
            (parted,) = graph.add("Reshape", [x, blocks])
            self._sums[x, block] = graph.add("ReduceSum", [parted, axis], keepdims=0)[0]
        return self._sums[x, block]


def filled(product: Product, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """The arrays of a product from its tensors by name. Takes the matrices out of nothing: the caller lets go.

    Raises:
        CheckpointError: a matrix has no such form; a mistake in `forms`, not of a file.
    """
    arrays: dict[str, Array] = {}
    matrices = [(part.name, _matrix(part, tensors)) for part in product.parts]
    if product.form.is_dense:
        dense = np.concatenate([as_float32(value) for _, value in matrices])
        arrays[f"{product.name}.dense"] = np.ascontiguousarray(dense.T)
    else:
        packed = [_packed(name, value, product.form) for name, value in matrices]
        arrays[f"{product.name}.codes"] = _stacked([each.codes for each in packed])
        arrays[f"{product.name}.scales"] = _stacked([each.scales for each in packed])
        if product.form.offset_block:
            offsets = _stacked([each.offsets for each in packed])
            arrays[f"{product.name}.offsets"] = np.ascontiguousarray(offsets.T)
    if product.has_bias:
        arrays[f"{product.name}.bias"] = np.concatenate([_bias(part, tensors) for part in product.parts])
    return arrays


def as_float32(value: Tensor) -> Floats:
    """The values of a tensor of any kind."""
    return value.astype(np.float32, copy=False) if isinstance(value, np.ndarray) else dequantize(value)


def _matrix(part: Linear | Embedding, tensors: Mapping[str, Tensor]) -> Tensor:
    value = tensors[f"{part.name}.weight"]
    return as_matrix(part, value) if isinstance(part, Linear) else value


def _bias(part: Linear | Embedding, tensors: Mapping[str, Tensor]) -> Floats:
    if isinstance(part, Linear) and part.bias:
        return as_float32(tensors[f"{part.name}.bias"])
    return np.zeros(part.rows if isinstance(part, Embedding) else part.outputs, np.float32)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A matrix in MatMulNBits' layout: codes (N, blocks, bytes), scales (N, blocks), offsets (N, offset blocks)."""

    codes: Array
    scales: Floats
    offsets: Floats


def _stacked(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _packed(name: str, value: Tensor, form: Form) -> _Packed:
    """Raises CheckpointError where a matrix has no integers of that form."""
    (n, k), own = value.shape, None if isinstance(value, np.ndarray) else integers(value, form.bits, form.block)
    whole = own or quantized(value.shape, lambda rows: as_float32(_rows(value, rows)), form.bits, form.block)
    if whole.bits != form.bits or whole.group % form.block:
        raise CheckpointError(f"cannot be held in {form.bits} bits", file="", tensor=name)
    offsets = np.zeros((n, k // form.offset_block if form.offset_block else 0), np.float32)
    if whole.offsets is not None:
        offsets = np.repeat(whole.offsets, whole.group // form.offset_block, axis=1)
    scales = np.repeat(whole.scales, whole.group // form.block, axis=1)
    return _Packed(whole.codes.reshape(n, k // form.block, -1), scales, offsets)


def _rows(value: Tensor, rows: slice) -> Tensor:
    """Some rows of a matrix."""
    if isinstance(value, np.ndarray):
        return value[rows]
    count = rows.stop - rows.start
    if isinstance(value, Blocks):
        return replace(value, rows=value.rows[rows], shape=(count, value.shape[1]))
    biases = None if value.biases is None else value.biases[rows]
    return replace(value, weight=value.weight[rows], scales=value.scales[rows], biases=biases)
