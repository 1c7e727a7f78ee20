"""A rank that is not the first: told what to load and to run, until the first one is gone.

Two connections lead to the first rank. On one come orders; on the other it asks whether this one is alive, and hears
what became of a load. When either ends, when nobody asks for ASKED_S, or when stdin closes, this process leaves at
once, whatever it is doing.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.checkpoint import open_checkpoint
from models.device import device
from models.errors import ModelError
from models.executors.orders import from_json
from models.executors.shared import Follower
from models.fingerprint import digests
from models.weights.matching import model_of, tensors_of
from models.weights.shares import plans_of
from runner.ranks.joining import free_ports, join
from runner.ranks.wire import Line, connect

if TYPE_CHECKING:
    import mlx.core as mx

    from models.executors.mlx.ranks import RankExecutor

CONNECT_S = 10.0
ASKED_S = 15.0
"""The first rank asks every second."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a rank is told when it is started."""

    rank: int
    ranks: int
    ips: tuple[str, ...]
    """Where it may listen."""
    address: tuple[str, int]
    """Where the first rank listens for it."""
    secret: str
    environment: Mapping[str, str]


def versions() -> dict[str, str]:
    """Of what all ranks must have alike."""
    return {name: importlib.metadata.version(name) for name in ("ollama-mlx-runner", "mlx")}


def run(store: Path) -> None:
    """Be the rank that stdin says. `store`: this user's own. Thread: the main one, which is the executor's."""
    text = sys.stdin.readline()
    if not text.strip():
        return
    value = json.loads(text)
    host, port = value["address"]
    invitation = Invitation(
        value["rank"], value["ranks"], tuple(value["ips"]), (host, port), value["secret"], value["environment"]
    )
    threading.Thread(target=_leave_when_stdin_closes, daemon=True).start()
    os.environ.update(invitation.environment)
    follow(invitation, store)


def _leave_when_stdin_closes() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(0)


def follow(invitation: Invitation, store: Path, group: "mx.distributed.Group | None" = None) -> None:
    """Connect to the first rank, and do as it says until it is gone. `group`: the ranks are one already.

    Raises:
        OSError: the first rank cannot be reached.
    """
    told, asked = (
        connect(invitation.address, invitation.secret, invitation.rank, purpose, CONNECT_S)
        for purpose in ("orders", "watch")
    )
    here = device()
    asked.say(
        {
            "versions": versions(),
            "ports": free_ports(invitation.ips) if group is None else [],
            "device": here.kind,
            "free": here.available_bytes,
        }
    )
    rank = _Rank(asked, store, group)
    threading.Thread(target=rank.answer, daemon=True).start()
    try:
        rank.serve(told)
    finally:
        asked.close()
        told.close()


class _Rank:
    """The work of a rank that is not the first."""

    def __init__(self, asked: Line, store: Path, group: "mx.distributed.Group | None") -> None:
        self._asked = asked
        self._store = store
        self._group = group
        self._done = 0

    def answer(self) -> None:
        """Say that this rank is alive whenever it is asked; leave when nobody asks. Thread: one of its own."""
        with contextlib.suppress(OSError, ValueError):
            while self._asked.hear(ASKED_S) is not None:
                self._asked.say({"done": self._done, "free": device().available_bytes})
        os._exit(0)

    def serve(self, told: Line) -> None:
        """Do what is said, until nothing more will be."""
        while (message := told.hear()) is not None:
            match message:
                case {"join": dict(environment), "backend": str(backend), "others": str(others)}:
                    self._join(environment, backend, others)
                case {"load": dict(load)}:
                    self._load_and_obey(load, told)
                case _:
                    # What comes behind an order that failed.
                    continue

    def _join(self, environment: Mapping[str, str], backend: str, others: str) -> None:
        try:
            self._group = join(environment, backend, others)
        except RuntimeError as error:
            self._asked.say({"failed": f"MLX could not connect: {error}"})
            raise

    def _load_and_obey(self, load: Mapping[str, Any], told: Line) -> None:
        try:
            executor = self._load(load)
        except (ModelError, OSError, MemoryError) as error:
            self._asked.say({"failed": str(error) or type(error).__name__})
            return
        self._asked.say({"loaded": True})
        follower = Follower(executor)
        try:
            while (message := told.hear()) is not None and follower.obey(from_json(message)):
                self._done += 1
            self._done += 1
        except (ModelError, RuntimeError) as error:
            self._asked.say({"failed": f"{type(error).__name__}: {error}"})
            raise

    def _load(self, load: Mapping[str, Any]) -> "RankExecutor":
        """Load this rank's part. Raises ModelError."""
        from models.executors.mlx.ranks import Options, load_rank  # noqa: PLC0415 - MLX is imported when it is joined

        assert self._group is not None
        # The first rank's store if this machine has it too.
        store = Path(load["store"])
        checkpoint = open_checkpoint(load["model"], store if store.is_dir() else self._store)
        own, first = digests(checkpoint), load["digests"]
        if differing := [name for name, digest in first.items() if own.get(name) != digest]:
            raise ModelError(
                f"{load['model']} has other {' and '.join(differing)} there than on the first rank; copy the same files"
            )
        # What is left out is the first rank's alone, as a vision tower is.
        model = replace(model_of(checkpoint), other_parts=tuple(load["other_parts"]))
        found = tensors_of(model, checkpoint)
        plans = plans_of(model, found, load["model"], self._group.size(), load["sharding"])
        options = Options(load["policy"], load["cache_type"], load["longest_step"], load["reach"], load["depth"])
        return load_rank(checkpoint, model, plans, self._group, options)
