"""From a planned blob to its bytes, quantising on the way. Thread: the MLX thread where anything is quantised."""

import mlx.core as mx
import numpy as np

from models.errors import CheckpointError
from models.quantization import spec_of_quant_type
from models.sources.safetensors_file import DTYPES
from models.store.content import Content, Piece, safetensors_content, span_of
from models.store.plan import PlannedBlob, PlannedTensor
from models.to_mlx import from_mlx, to_mlx


def tensor_blob(blob: PlannedBlob) -> Content:
    """The blob's bytes. Tensors that stay as they are are read when the content is.

    Raises:
        CheckpointError: a source cannot be read.
    """
    pieces: list[Piece] = []
    for tensor in blob.tensors:
        if tensor.quant_type is None:
            pieces += [span_of(member) for member in tensor.sources]
        else:
            pieces += _quantized(tensor, tensor.quant_type)
    return safetensors_content(blob.entries(), pieces, blob.metadata)


def _quantized(tensor: PlannedTensor, quant_type: str) -> list[bytes]:
    spec = spec_of_quant_type(quant_type, None)
    parts = mx.quantize(_read(tensor), group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    try:
        mx.eval(parts)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"cannot be quantised: {error}", file=tensor.sources[0].file.label, tensor=tensor.name
        ) from error
    data = [from_mlx(part).tobytes() for part in parts]
    del parts
    mx.clear_cache()
    return data


def _read(tensor: PlannedTensor) -> mx.array:
    raw = b"".join(chunk for member in tensor.sources for chunk in span_of(member).chunks())
    return to_mlx(np.frombuffer(raw, DTYPES[tensor.dtype]).reshape(tensor.shape))
