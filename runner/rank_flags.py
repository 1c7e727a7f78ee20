"""What the process is told about other machines: by a hostfile, or by mlx.launch's environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from runner.flags import Settings, UsageError, debug_level, variable
from runner.folders import store_folder

Sharding: TypeAlias = Literal["tensor", "pipeline"]
"""How ranks share a model: each a part of every layer, or each some of the layers."""
SHARDINGS: tuple[str, ...] = get_args(Sharding)
_LAUNCHED = ("MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class RanksConfig:
    """Which machines share a model, and how."""

    hostfile: Path | None = None
    """Start the other ranks as it says. None: there are none, or somebody else has started them."""
    sharding: Sharding = "tensor"
    launched: int | None = None
    """Which rank this process is, where mlx.launch has started all of them."""

    @property
    def is_shared(self) -> bool:
        """There is more than this process."""
        return self.hostfile is not None or self.launched is not None


ALONE = RanksConfig()


@dataclass(frozen=True, slots=True)
class RankConfig:
    """The `rank` command, by which a runner starts the others: what they do stands in their stdin."""

    store: Path
    """This user's own."""
    debug: int = 0


def rank_config(environ: Mapping[str, str]) -> RankConfig:
    """That of the `rank` command, which has no flags."""
    return RankConfig(store_folder(variable(environ, "OLLAMA_MODELS"), environ), debug_level(environ))


def rank_flags(settings: Settings, environ: Mapping[str, str], hostfile: Path | None) -> RanksConfig:
    """Read them.

    Raises:
        UsageError: a value is none, or the two ways contradict each other.
    """
    sharding = cast("Sharding", settings.choice("shard", SHARDINGS) or "tensor")
    rank = variable(environ, "MLX_RANK")
    if not rank or not any(variable(environ, name) for name in _LAUNCHED):
        return RanksConfig(hostfile, sharding)
    if hostfile is not None:
        raise UsageError("mlx.launch has started this process, so leave --hostfile out: give the file to mlx.launch")
    if not rank.isdecimal():
        raise UsageError(f'MLX_RANK must be a whole number, not "{rank}"')
    return RanksConfig(None, sharding, int(rank))
