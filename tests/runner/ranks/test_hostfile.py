"""Hostfiles as mlx.launch reads them."""

import json
import sys

import pytest

from runner.errors import StartupError
from runner.ranks.hostfile import read_hostfile
from runner.ranks.joining import environments

TWO = [{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"], "python": "/opt/python"}]


def written(folder, value):
    file = folder / "hosts.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def test_a_list_of_hosts_is_a_ring(tmp_path):
    hostfile = read_hostfile(written(tmp_path, TWO))
    assert [host.name for host in hostfile.hosts] == ["a", "b"]
    assert [host.python for host in hostfile.hosts] == [sys.executable, "/opt/python"]
    assert hostfile.backend == "ring"


def test_an_object_names_backend_and_variables(tmp_path):
    devices = [{**host, "rdma": [None, "rdma_en2"][:: 1 if rank == 0 else -1]} for rank, host in enumerate(TWO)]
    hostfile = read_hostfile(
        written(tmp_path, {"backend": "jaccl", "envs": ["MLX_METAL_FAST_SYNCH=1"], "hosts": devices})
    )
    assert hostfile.backend == "jaccl"
    assert hostfile.environment == {"MLX_METAL_FAST_SYNCH": "1"}
    first, second = environments(hostfile, [[5], [6]])
    assert first["MLX_JACCL_COORDINATOR"] == second["MLX_JACCL_COORDINATOR"] == "10.0.0.1:5"
    assert json.loads(first["MLX_IBV_DEVICES"]) == [[None, "rdma_en2"], ["rdma_en2", None]]


def test_each_rank_of_a_ring_knows_all_addresses(tmp_path):
    hostfile = read_hostfile(written(tmp_path, TWO))
    first, second = environments(hostfile, [[5], [6]])
    assert [first["MLX_RANK"], second["MLX_RANK"]] == ["0", "1"]
    assert json.loads(second["MLX_HOSTFILE"]) == [["10.0.0.1:5"], ["10.0.0.2:6"]]


def test_ranks_of_nccl_have_a_device_each(tmp_path):
    hosts = [{"ssh": "a", "ips": ["10.0.0.1"]}] * 2
    hostfile = read_hostfile(written(tmp_path, {"backend": "nccl", "hosts": hosts}))
    first, second = environments(hostfile, [[5], [6]])
    assert [first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]] == ["0", "1"]
    assert (second["NCCL_HOST_IP"], second["NCCL_PORT"], second["MLX_WORLD_SIZE"]) == ("10.0.0.1", "5", "2")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "is not JSON"),
        ({"backend": "ring"}, "does not say its hosts"),
        ([{"ips": ["10.0.0.1"]}], "does not say its hosts"),
        (TWO[:1], "names 1 hosts; two or more"),
        ([TWO[0], {"ssh": "b"}], r"has no ips for b \(rank 1\)"),
        ({"backend": "carrier pigeons", "hosts": TWO}, "known are ring, jaccl"),
        ({"backend": "jaccl", "hosts": TWO}, "must list 2 rdma devices"),
        ({"envs": ["A;B=1"], "hosts": TWO}, "does not say its hosts"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(tmp_path, value, reason):
    with pytest.raises(StartupError, match=reason):
        read_hostfile(written(tmp_path, value))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StartupError, match=r"nowhere\.json cannot be read"):
        read_hostfile(tmp_path / "nowhere.json")
