"""Sums of ranks over MLX's own ring, a process each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from models.executors.mlx import communication
from models.executors.mlx.communication import HOP_BYTES, MLXCommunication
from runner.ranks.joining import free_ports

RANKS = 3


def add_up() -> None:
    """One rank: sums of a few and of many values, which MLX does in either way; what came of them, and how often."""
    mx.set_default_device(mx.Device(mx.cpu))
    group = mx.distributed.init(backend="ring", strict=True)
    talk, calls = MLXCommunication(group, mx.float32), {"all_sum": 0, "all_gather": 0}
    for name in calls:
        setattr(communication.mx.distributed, name, counted(calls, name, getattr(mx.distributed, name)))
    said = []
    for count in (5, HOP_BYTES):
        mine = mx.random.normal((3, count), key=mx.random.key(group.rank()))
        every = mx.stack([mx.random.normal((3, count), key=mx.random.key(rank)) for rank in range(RANKS)])
        made = talk.sum(None, mine)  # type: ignore[arg-type]
        said.append([float(mx.abs(made - every.sum(axis=0)).max()), made.sum().item(), made.shape == mine.shape])
    told = talk.tell(mx.array([70_000, 3]) if group.rank() == 0 else mx.zeros(2, mx.int32))
    print(json.dumps([said, calls, told.tolist()]))


def counted(calls: dict[str, int], name: str, real):  # type: ignore[no-untyped-def]
    def call(*args, **named):  # type: ignore[no-untyped-def]
        calls[name] += 1
        return real(*args, **named)

    return call


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """What each rank says."""
    hosts = tmp_path_factory.mktemp("ring") / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(["127.0.0.1"] * RANKS)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.executors.mlx.test_communication"],
            cwd=Path(__file__).parents[4],
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]
    return [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]


def test_a_few_values_are_gathered_and_many_are_summed_on_their_way(said: list[list[dict[str, int]]]) -> None:
    assert [calls for _, calls, _ in said] == [{"all_sum": 1, "all_gather": 2}] * RANKS


def test_either_sum_is_that_of_all_ranks_and_the_same_on_each(said: list[list[list[list[float]]]]) -> None:
    first = said[0][0]
    assert all(sums == first for sums, *_ in said)
    assert all(error < 1e-6 and right_shape for error, _, right_shape in first)


def test_every_rank_hears_the_tokens_of_the_first(said: list[list[object]]) -> None:
    assert [told for *_, told in said] == [[70_000, 3]] * RANKS


if __name__ == "__main__":
    add_up()
