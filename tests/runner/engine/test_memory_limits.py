"""The memory left under control groups, read from files laid out as Linux lays them out."""

import pytest

from runner.engine.memory_limits import cgroup_headroom


@pytest.fixture
def tree(tmp_path):
    """Writes files below a root and a membership file; returns the headroom."""

    def headroom(membership: str, files: dict[str, str]) -> int | None:
        for name, text in files.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "membership").write_text(membership)
        return cgroup_headroom(tmp_path / "root", tmp_path / "membership")

    return headroom


def test_version_two_counts_file_pages_as_free(tree):
    files = {
        "app/memory.max": "1000\n",
        "app/memory.current": "900\n",
        "app/memory.stat": "anon 600\nfile 300\ninactive_file 250\n",
    }
    assert tree("0::/app\n", files) == 350


def test_the_tightest_of_the_parents_counts(tree):
    files = {
        "a/memory.max": "500\n",
        "a/memory.current": "450\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "100\n",
        "a/b/c/memory.max": "300\n",
        "a/b/c/memory.current": "100\n",
    }
    assert tree("0::/a/b/c\n", files) == 50


def test_a_path_of_the_hosts_tree_falls_back_to_what_is_mounted(tree):
    files = {"memory.max": "800\n", "memory.current": "300\n"}
    assert tree("0::/docker/0123\n", files) == 500


def test_version_one_has_other_names(tree):
    files = {
        "memory/job/memory.limit_in_bytes": "1000\n",
        "memory/job/memory.usage_in_bytes": "700\n",
        "memory/job/memory.stat": "cache 300\ntotal_inactive_file 200\n",
    }
    assert tree("5:cpu,cpuacct:/\n4:memory:/job\n0::/\n", files) == 500


def test_use_beyond_the_limit_leaves_nothing_rather_than_less(tree):
    assert tree("0::/\n", {"memory.max": "100\n", "memory.current": "150\n"}) == 0


def test_without_a_limit_there_is_no_figure(tree, tmp_path):
    assert tree("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"}) is None
    assert cgroup_headroom(tmp_path / "nowhere", tmp_path / "nothing") is None
