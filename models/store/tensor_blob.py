"""From a planned blob to its bytes, quantising on the way. Thread: the MLX thread where anything is quantised."""

import mlx.core as mx
import numpy as np

from models.errors import CheckpointError
from models.quantization import spec_of_quant_type
from models.store.content import Content, Piece, safetensors_content, span_of
from models.store.plan import PlannedBlob, PlannedTensor


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
    data = [_bytes(part) for part in parts]
    del parts
    mx.clear_cache()
    return data


def _read(tensor: PlannedTensor) -> mx.array:
    raw = b"".join(chunk for member in tensor.sources for chunk in span_of(member).chunks())
    match tensor.dtype:
        case "F32":
            flat = mx.array(np.frombuffer(raw, "<f4"))
        case "F16":
            flat = mx.array(np.frombuffer(raw, "<f2"))
        case _:
            flat = mx.array(np.frombuffer(raw, "<u2")).view(mx.bfloat16)
    return flat.reshape(tensor.shape)


def _bytes(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()
