"""Layers of two kinds: attention over a sliding window, and over everything.

Source: transformers' `layer_types`, and the `rope_parameters` that have settings for each kind.
"""

from collections.abc import Mapping

from models.arch.blocks import FILE, sliding_layers
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import RopeConfig
from models.ops.rope import read_rope

FULL, SLIDING = "full_attention", "sliding_attention"


def sliding_but_every(config: Mapping[str, JSON], interval: int) -> tuple[bool, ...]:
    """Which layers slide: by `layer_types`, else all but the last of every so many.

    Raises:
        CheckpointError: `layer_types` does not name one known kind for each layer.
    """
    layers = ConfigReader(config).size("num_hidden_layers")
    return sliding_layers(config, [(layer + 1) % interval != 0 for layer in range(layers)])


def window_of_sliding(config: Mapping[str, JSON], sliding: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The window of each layer. Raises CheckpointError where layers slide and `sliding_window` is not above 0."""
    window = ConfigReader(config).size("sliding_window") if any(sliding) else None
    return tuple(window if slides else None for slides in sliding)


def ropes_by_kind(
    config: Mapping[str, JSON], dims: int, *, full: float, sliding: float, sliding_dims: int | None = None
) -> dict[bool, RopeConfig]:
    """The rope of the layers that slide (True) and of the others, with the bases where the config names none.

    Heads of layers that slide are `sliding_dims` wide where it is given. The older form's scaling is that of the full
    layers alone.

    Raises:
        CheckpointError: the rope is of an unknown kind, or `rope_parameters` are not by kind of layer.
    """
    by_kind = ConfigReader(config).mapping("rope_parameters")
    if by_kind and not set(by_kind) <= {FULL, SLIDING}:
        raise CheckpointError(f"rope_parameters must have settings for {FULL} and {SLIDING}", file=FILE)
    unscaled = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    return {
        False: read_rope(config, dims=dims, default_theta=full, layer_type=FULL),
        True: read_rope(unscaled, dims=sliding_dims or dims, default_theta=sliding, layer_type=SLIDING),
    }
