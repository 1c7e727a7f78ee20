"""Rotary position embedding: the frequencies of every scaling kind.

Sources: RoFormer (arXiv 2104.09864); linear scaling (arXiv 2306.15595); YaRN (arXiv 2309.00071); LongRoPE (arXiv
2402.13753); the others as transformers' `modeling_rope_utils` computes them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError

Floats: TypeAlias = npt.NDArray[np.float32]
_AXES = ("time", "height", "width")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN: a ramp between divided and kept frequencies, and a temperature on the attention."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class FactorScaling:
    """Each frequency divided by a factor of its own, as GGUF's `rope_freqs` tensor stores them."""

    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LongScaling:
    """Each frequency divided by a factor of its own, one list for rows up to the original context and one beyond."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    attention_factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """A base that grows with what a row may reach beyond the original context, or by `alpha` once for all."""

    factor: float
    original_context: int
    alpha: float | None


@dataclass(frozen=True, slots=True)
class ProportionalScaling:
    """Frequencies of a whole head, of which only the first `turning` turn."""

    turning: int
    factor: float


RopeScaling: TypeAlias = (
    LinearScaling | Llama3Scaling | YarnScaling | FactorScaling | LongScaling | DynamicScaling | ProportionalScaling
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base, width and scaling of a rotary embedding. `dims` is even: the rotated part of a head."""

    dims: int
    theta: float
    scaling: RopeScaling | None = None
    interleaved: bool = False
    """Pairs are neighbours; else the halves of the rotated part."""
    axes: tuple[int, ...] = ()
    """By which of a position's three axes (time, height, width) each pair turns; empty: there is one axis.

    Text has the same position along all of them. Source: M-RoPE, Qwen2-VL (arXiv 2409.12191).
    """

    @property
    def extended_context(self) -> int:
        """The tokens that YaRN was told to reach; 0 where the scaling says nothing about it."""
        return int(self.scaling.factor * self.scaling.original_context) if isinstance(self.scaling, YarnScaling) else 0

    @property
    def magnitude(self) -> float:
        """The factor on cosines and sines; 1 but for YaRN and LongRoPE."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongScaling) else 1.0

    def frequencies(self, reach: int = 0) -> Floats:
        """Angle per position of each pair, in radians, where rows may have `reach` tokens. Thread: any.

        Shapes: returns (dims / 2,).
        """
        base = self.theta ** (-np.arange(0, self.dims, 2, dtype=np.float64) / self.dims)
        match self.scaling:
            case None:
                scaled = base
            case LinearScaling(factor):
                scaled = base / factor
            case FactorScaling(factors):
                scaled = base / np.asarray(factors, dtype=np.float64)
            case LongScaling(short, long, original):
                scaled = base / np.asarray(long if reach > original else short, dtype=np.float64)
            case DynamicScaling():
                scaled = _dynamic(self.scaling, self, reach)
            case ProportionalScaling(turning, factor):
                scaled = np.where(np.arange(len(base)) < turning, base / factor, 0.0)
            case Llama3Scaling():
                scaled = _llama3(base, self.scaling)
            case YarnScaling():
                scaled = _yarn(base, self.scaling, self)
        return scaled.astype(np.float32)


def read_rope(
    config: Mapping[str, JSON], *, dims: int, default_theta: float = 10000.0, layer_type: str | None = None
) -> RopeConfig:
    """Read a config.json's rotary settings, in transformers 5's form (`rope_parameters`) or the older one.

    Args:
        config: config.json.
        dims: the width of a head; the config may say that a part of it turns.
        default_theta: where the config names no base.
        layer_type: the kind of layer, where the config has settings for each.

    Raises:
        CheckpointError: a value is missing or impossible, or the scaling is of an unknown kind.
    """
    top = ConfigReader(config)
    settings = top.section("rope_parameters") or top.section("rope_scaling")
    if settings is not None and layer_type is not None:
        settings = settings.section(layer_type) or settings
    own = settings or ConfigReader({})
    theta = own.number("rope_theta", top.number("rope_theta", default_theta))
    share = own.number("partial_rotary_factor", top.number("partial_rotary_factor", 1.0))
    if not theta > 1:
        raise CheckpointError(f"rope_theta must be above 1, not {theta}", file="config.json")
    kind = own.text("rope_type", own.text("type", "default"))
    if kind == "proportional":
        turning = int(share * dims // 2)
        return RopeConfig(dims, theta, ProportionalScaling(turning, own.number("factor", 1.0)))
    dims = int(dims * share)
    if dims <= 0 or dims % 2:
        raise CheckpointError(f"partial_rotary_factor leaves {dims} dimensions to rotate", file="config.json")
    if settings is None:
        return RopeConfig(dims, theta)
    # Phi's configurations have it beside the scaling.
    original = top.size("original_max_position_embeddings", top.size("max_position_embeddings", 2048))
    original = settings.size("original_max_position_embeddings", original)
    context = top.size("max_position_embeddings", original)
    scaling = _read_scaling(kind, settings, dims, original, context)
    return RopeConfig(dims, theta, scaling, axes=_read_axes(settings, dims // 2))


def with_axes(config: Mapping[str, JSON], sections: Sequence[int], *, interleaved: bool) -> dict[str, JSON]:
    """A config.json whose rotary settings say by which axis each pair turns: themselves, or else in these sections.

    Raises:
        CheckpointError: the settings are no object.
    """
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    usual: dict[str, JSON] = {"mrope_section": list(sections), "mrope_interleaved": interleaved}
    said = {name: value for name, value in ConfigReader(config).mapping(key).items() if value is not None}
    return {**config, key: {**usual, **said}}


def _read_axes(settings: ConfigReader, pairs: int) -> tuple[int, ...]:
    """The axis of each pair: section behind section, or in turns for as long as height and width have pairs left.

    Source: transformers' `modeling_qwen2_5_vl` and `modeling_qwen3_vl`, `recomposition_frequencies`.
    """
    sections = settings.integers("mrope_section")
    if not sections:
        return ()
    if settings.flag("mrope_interleaved", default=False):
        if len(sections) != len(_AXES):
            raise CheckpointError(f"mrope_section must name {len(_AXES)} sizes, not {sections}", file="config.json")
        turns = [pair % len(_AXES) for pair in range(pairs)]
        return tuple(axis if pair < len(_AXES) * sections[axis] else 0 for pair, axis in enumerate(turns))
    if sum(sections) != pairs or min(sections) < 0:
        raise CheckpointError(f"mrope_section {sections} does not divide {pairs} pairs", file="config.json")
    return tuple(index % len(_AXES) for index, size in enumerate(sections) for _ in range(size))


def _read_scaling(  # noqa: PLR0911 - a kind a return
    kind: str, settings: ConfigReader, dims: int, original_context: int, context: int
) -> RopeScaling | None:
    match kind:
        case "default" | "none" | "mrope":
            return None
        case "linear":
            return LinearScaling(settings.positive("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=settings.positive("factor"),
                low_freq_factor=settings.number("low_freq_factor", 1.0),
                high_freq_factor=settings.number("high_freq_factor", 4.0),
                original_context=original_context,
            )
        case "yarn":
            factor = settings.positive("factor")
            return YarnScaling(
                factor=factor,
                original_context=original_context,
                beta_fast=settings.number("beta_fast", 32.0),
                beta_slow=settings.number("beta_slow", 1.0),
                attention_factor=_yarn_attention_factor(settings, factor),
                truncate=settings.flag("truncate", default=True),
            )
        case "factors":
            return FactorScaling(_factors(settings, "factors", dims))
        case "longrope" | "su":
            return LongScaling(
                _factors(settings, "short_factor", dims),
                _factors(settings, "long_factor", dims),
                original_context,
                _long_attention_factor(settings, context / original_context, original_context),
            )
        case "dynamic":
            alpha = settings.number("alpha", 0.0)
            return DynamicScaling(settings.positive("factor"), context, alpha or None)
        case _:
            raise CheckpointError(f"rope scaling of kind {kind!r} is not supported", file="config.json")


def _factors(settings: ConfigReader, key: str, dims: int) -> tuple[float, ...]:
    factors = settings.numbers(key)
    if len(factors) != dims // 2:
        raise CheckpointError(f"{len(factors)} rope factors for a head of {dims} dimensions", file="config.json")
    return tuple(factors)


def _long_attention_factor(settings: ConfigReader, stretch: float, original_context: int) -> float:
    """LongRoPE's temperature, by how much longer the context became. Source: arXiv 2402.13753."""
    stretch = settings.number("factor", stretch)
    derived = (
        math.sqrt(1 + math.log(stretch) / math.log(original_context)) if min(stretch, original_context) > 1 else 1.0
    )
    return settings.number("attention_factor", derived)


def _yarn_attention_factor(settings: ConfigReader, factor: float) -> float:
    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = settings.number("mscale", 0.0), settings.number("mscale_all_dim", 0.0)
    derived = of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
    return settings.number("attention_factor", derived)


def _dynamic(scaling: DynamicScaling, rope: RopeConfig, reach: int) -> npt.NDArray[np.float64]:
    growth = scaling.factor * max(reach, scaling.original_context) / scaling.original_context - (scaling.factor - 1)
    growth = growth if scaling.alpha is None else scaling.alpha
    theta = rope.theta * growth ** (rope.dims / (rope.dims - 2))
    scaled: npt.NDArray[np.float64] = theta ** (-np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    return scaled


def _llama3(base: npt.NDArray[np.float64], scaling: Llama3Scaling) -> npt.NDArray[np.float64]:
    turns = scaling.original_context * base / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    scaled: npt.NDArray[np.float64] = kept * base + (1.0 - kept) * base / scaling.factor
    return scaled


def _yarn(base: npt.NDArray[np.float64], scaling: YarnScaling, rope: RopeConfig) -> npt.NDArray[np.float64]:
    def pair_that_turns(rotations: float) -> float:
        """The pair, counted in fractions, that makes so many turns over the original context."""
        return rope.dims * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    divided = np.clip((np.arange(rope.dims // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scaled: npt.NDArray[np.float64] = divided * base / scaling.factor + (1.0 - divided) * base
    return scaled
