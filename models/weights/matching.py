"""Which tensor of a checkpoint is which weight: a strict comparison of names and shapes, from headers alone."""

from collections.abc import Iterable

from models.errors import CheckpointError
from models.ops.weights import Weight
from models.sources.base import TensorInfo

_SHOWN_NAMES = 5
_CONSTANTS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".num_batches_tracked")


def matched(
    weights: Iterable[Weight],
    infos: Iterable[TensorInfo],
    reference: str,
    unused: tuple[str, ...] = (),
    prefix: str = "model.",
) -> dict[str, TensorInfo]:
    """The tensor of every declared name. Names may have or lack a leading prefix. Thread: any.

    Args:
        weights: what the model declares.
        infos: the checkpoint's tensors.
        reference: what messages call the checkpoint.
        unused: beginnings of names, without the prefix, that may lack a declaration.
        prefix: what names may have or lack in front.

    Raises:
        CheckpointError: a tensor is missing, left over, there twice or of another shape.
    """
    wanted = dict(tensor for weight in weights for tensor in weight.tensors())
    found: dict[str, TensorInfo] = {}
    for info in infos:
        names = (info.name, f"{prefix}{info.name}", info.name.removeprefix(prefix))
        name = next((each for each in names if each in wanted), None)
        if name is None:
            if not _may_be_left_over(info.name.removeprefix(prefix), wanted, unused):
                raise CheckpointError("the architecture has no such tensor", file=info.file, tensor=info.name)
            continue
        if name in found:
            raise CheckpointError("is there twice", file=info.file, tensor=info.name)
        if info.shape != wanted[name]:
            raise CheckpointError(
                f"its shape is {list(info.shape)}, and config.json asks for {list(wanted[name])}",
                file=info.file,
                tensor=info.name,
            )
        found[name] = info
    if missing := [name for name in wanted if name not in found]:
        more = f" (and {len(missing) - 1} more: {', '.join(missing[1:_SHOWN_NAMES])}, ...)" if len(missing) > 1 else ""
        raise CheckpointError(f"is missing{more}", file=reference, tensor=missing[0])
    return found


def _may_be_left_over(name: str, wanted: dict[str, tuple[int, ...]], unused: tuple[str, ...]) -> bool:
    """A constant that is computed, the copy of a tied matrix, or something that nobody asks for."""
    if name.endswith(_CONSTANTS) or name.startswith(unused):
        return True
    return name == "lm_head.weight" and not any(each.startswith("lm_head.") for each in wanted)
