"""The other ranks, by whichever way they are started."""

from collections.abc import Mapping

from runner.rank_flags import RanksConfig
from runner.ranks.first import Ranks
from runner.ranks.hostfile import read_hostfile
from runner.ranks.launched import first_of_launched


def open_ranks(config: RanksConfig, environ: Mapping[str, str]) -> Ranks:
    """Start them, or find those that mlx.launch has started. Thread: the main one.

    Raises:
        StartupError: the hostfile makes no sense, or a rank cannot be started.
    """
    if config.hostfile is None:
        return first_of_launched(environ)
    hostfile = read_hostfile(config.hostfile)
    ranks = Ranks(hostfile.hosts, hostfile, None)
    ranks.start()
    return ranks
