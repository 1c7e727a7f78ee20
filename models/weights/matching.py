"""Which tensor of a checkpoint is which weight: a strict comparison of names and shapes, from headers alone."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

from models.arch import Model, build_model
from models.config_reader import JSON
from models.errors import CheckpointError
from models.ops.weights import Linear, ShortConv, Vector, Weight, weights_in
from models.sources.base import Checkpoint, TensorInfo
from models.vision.base import Tower
from models.weights.patches import channels_last
from models.weights.stacks import separate_infos

_SHOWN_NAMES = 5
_TEXT = "language_model."
_CONSTANTS = ("rotary_emb.inv_freq", ".attn.masked_bias", ".num_batches_tracked")


def model_of(checkpoint: Checkpoint, config: Mapping[str, JSON] | None = None) -> Model:
    """The model of a checkpoint, by its configuration or that given, and by what its tensors tell besides. Thread: any.

    Raises:
        UnsupportedArchitecture: none of this package's; the message lists those there are.
        CheckpointError: a value is missing, impossible or unsupported, or a header is damaged.
    """
    own = checkpoint.config if config is None else config
    return build_model(own, lambda: {info.name: info.shape for info in checkpoint.infos()})


def left_out(model: Model, checkpoint: Checkpoint) -> dict[str, int]:
    """How many tensors there are of each part that the model leaves out; see `Model.other_parts`. Thread: any."""
    names = (_text_name(info.name).removeprefix(model.prefix) for info in checkpoint.infos())
    found = (next((part for part in model.other_parts if name.startswith(part)), None) for name in names)
    return dict(Counter(part for part in found if part is not None))


def tensors_of(model: Model, checkpoint: Checkpoint, unused: tuple[str, ...] = ()) -> dict[str, TensorInfo]:
    """The tensor of every name that a model declares, experts one by one; see `matched`. Thread: any.

    Raises:
        CheckpointError: a tensor is missing, left over, there twice, misshaped, or no such stack.
    """
    infos = separate_infos(checkpoint.infos(), model.stacks)
    unused = (*unused, *model.other_parts)
    return matched(weights_in(model.weights), infos, checkpoint.reference, unused, model.prefix)


def tower_tensors_of(tower: Tower, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensor of every name that a vision tower declares; what is not under its prefixes is not looked at.

    Thread: any.

    Raises:
        CheckpointError: a tensor is missing, left over under the prefixes, there twice or misshaped.
    """
    own = (info for info in checkpoint.infos() if info.name.removeprefix("model.").startswith(tower.prefixes))
    infos = separate_infos(own, tower.stacks)
    return matched(weights_in(tower.weights), infos, checkpoint.reference, tower.other_parts)


def matched(
    weights: Iterable[Weight],
    infos: Iterable[TensorInfo],
    reference: str,
    unused: tuple[str, ...] = (),
    prefix: str = "model.",
) -> dict[str, TensorInfo]:
    """The tensor of every declared name. Thread: any.

    Names may have or lack a leading prefix, and a `language_model.`.

    Args:
        weights: what the model declares.
        infos: the checkpoint's tensors.
        reference: what messages call the checkpoint.
        unused: beginnings of names, without the prefix, that may lack a declaration.
        prefix: what names may have or lack in front.

    Raises:
        CheckpointError: a tensor is missing, left over, there twice or of another shape.
    """
    weights = list(weights)
    wanted = dict(tensor for weight in weights for tensor in weight.tensors())
    owners = {name: weight for weight in weights for name, _ in weight.tensors()}
    found: dict[str, TensorInfo] = {}
    for info in infos:
        own = _text_name(info.name)
        names = (own, f"{prefix}{own}", own.removeprefix(prefix))
        name = next((each for each in names if each in wanted), None)
        if name is None:
            if not _may_be_left_over(own.removeprefix(prefix), wanted, unused):
                raise CheckpointError("the architecture has no such tensor", file=info.file, tensor=info.name)
            continue
        if name in found:
            raise CheckpointError("is there twice", file=info.file, tensor=info.name)
        if not _fits(info.shape, wanted[name], owners[name]):
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


def _text_name(name: str) -> str:
    """A tensor's name in the text model alone: multimodal checkpoints say `language_model.` first, behind `model.`."""
    return name.removeprefix("model.").removeprefix(_TEXT) if _TEXT in name else name


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], weight: Weight) -> bool:
    """Whether a tensor has a weight's shape, but for axes about which converters disagree where they mean nothing."""
    match weight:
        case Linear(axes=axes) if axes and len(wanted) > 2:
            return shape in (wanted, channels_last(wanted))
        case Vector():
            # As a row, as a column, as a row a group.
            return prod(shape) == prod(wanted)
        case ShortConv() if not weight.exact:
            return tuple(size for size in shape if size != 1) == tuple(size for size in wanted if size != 1)
        case _:
            return shape == wanted


def _may_be_left_over(name: str, wanted: dict[str, tuple[int, ...]], unused: tuple[str, ...]) -> bool:
    """A constant that is computed, the copy of a tied matrix, or something that nobody asks for."""
    if name.endswith(_CONSTANTS) or name.startswith(unused):
        return True
    return name == "lm_head.weight" and not any(each.startswith("lm_head.") for each in wanted)
