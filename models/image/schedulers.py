"""Noise levels and the Euler step of flow matching. Plain numbers: knows no model and touches no MLX.

A latent at noise level sigma is sigma * noise + (1 - sigma) * picture; the models predict noise - picture, so a step
from one sigma to the next adds (next - sigma) * prediction.

Source: diffusers' `FlowMatchEulerDiscreteScheduler` and `ZImageImg2ImgPipeline` (0.42).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.config_reader import ConfigReader
from models.errors import CheckpointError

Sigmas = tuple[float, ...]
"""Noise levels, each of them a float32's value, from noisy to clean; the last is 0."""

_UNSUPPORTED_FLAGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True, slots=True)
class FlowMatchEuler:
    """A scheduler_config.json."""

    train_timesteps: int = 1000
    shift: float = 1.0
    dynamic: bool = False
    """Shift by the picture's size (`mu`) instead of by `shift`."""
    time_shift: Literal["exponential", "linear"] = "exponential"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    shift_terminal: float = 0.0
    """Stretch the levels so that the last one above 0 is this; 0 does not."""

    def mu(self, image_tokens: int) -> float:
        """The dynamic shift of a picture of so many tokens, on a line through two given sizes."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (image_tokens - self.base_tokens)

    def sigmas(self, steps: int, mu: float | None = None) -> Sigmas:
        """The levels that `steps` steps lead through: `steps` of them and 0. `mu` is needed where `dynamic`."""
        return flow_match_sigmas(
            steps,
            shift=self.shift,
            mu=mu if self.dynamic else None,
            time_shift=self.time_shift,
            shift_terminal=self.shift_terminal,
        )


def read_scheduler(config: ConfigReader) -> FlowMatchEuler:
    """Read a scheduler_config.json.

    Raises:
        CheckpointError: a value is of the wrong kind, or asks for a schedule that is not supported.
    """
    if (name := config.text("_class_name", "FlowMatchEulerDiscreteScheduler")) != "FlowMatchEulerDiscreteScheduler":
        raise CheckpointError(f"the scheduler {name} is not supported", file="scheduler_config.json")
    for flag in _UNSUPPORTED_FLAGS:
        if config.flag(flag, default=False):
            raise CheckpointError(f"{flag} is not supported", file="scheduler_config.json")
    kind = config.text("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise CheckpointError(f"time_shift_type {kind!r} is not supported", file="scheduler_config.json")
    found = FlowMatchEuler(
        train_timesteps=config.size("num_train_timesteps", 1000),
        shift=config.number("shift", 1.0),
        dynamic=config.flag("use_dynamic_shifting", default=False),
        time_shift="exponential" if kind == "exponential" else "linear",
        base_shift=config.number("base_shift", 0.5),
        max_shift=config.number("max_shift", 1.15),
        base_tokens=config.size("base_image_seq_len", 256),
        max_tokens=config.size("max_image_seq_len", 4096),
        shift_terminal=config.number("shift_terminal", 0.0),
    )
    if found.shift <= 0 or found.base_tokens == found.max_tokens or not 0 <= found.shift_terminal < 1:
        raise CheckpointError("its shifts are impossible", file="scheduler_config.json")
    return found


def flow_match_sigmas(
    steps: int,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    time_shift: Literal["exponential", "linear"] = "exponential",
    shift_terminal: float = 0.0,
) -> Sigmas:
    """`steps` levels evenly from 1 to 1/steps, shifted towards noise, and 0.

    Args:
        steps: at least 1.
        shift: the static shift; not looked at where `mu` is given.
        mu: the dynamic shift.
        time_shift: how `mu` shifts.
        shift_terminal: see `FlowMatchEuler`.
    """
    levels: npt.NDArray[np.floating] = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if mu is None:
        levels = shift * levels / (1 + (shift - 1) * levels)
    else:
        weight = math.exp(mu) if time_shift == "exponential" else mu
        levels = weight / (weight + (1 / levels - 1))
    if shift_terminal and steps > 1:
        levels = 1 - (1 - levels) * (1 - shift_terminal) / (1 - levels[-1])
    return (*(float(level) for level in levels), 0.0)


def first_step(steps: int, strength: float) -> int:
    """The steps that image-to-image skips of `steps`, when it goes `strength` (0 to 1) of the way to noise.

    Not all of them while `strength` is above 0.
    """
    return min(int(max(steps - min(steps * strength, steps), 0)), steps - 1)
