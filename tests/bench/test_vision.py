"""The figures of pictures in a prompt: what a log tells, and the ratios within a round."""

import pytest

from tests.bench.vision import LLAMA, OURS, TORCH, Seen, encoding_seconds, goals

LOG = """\
0.12.161.036 I slot   operator(): cached n_tokens = 2
0.12.161.119 I slot encode_mtmd_: id  0 | task 0 | encoding mtmd batch from idx = 2, n_chunks = 1
no time at all
0.44.619.988 I decoding image batch 1/1, n_tokens_batch = 256
0.45.048.722 I image decoded (batch 1/1) in 429 ms
1.02.000.500 I slot encode_mtmd_: id  0 | task 0 | encoding mtmd batch from idx = 2, n_chunks = 1
1.32.500.000 I decoding image batch 1/1, n_tokens_batch = 256
"""


def test_a_towers_time_is_from_the_line_that_begins_it_to_the_next():
    assert encoding_seconds(LOG) == pytest.approx(30.4995)
    assert encoding_seconds("\n".join(LOG.splitlines()[:5])) == pytest.approx(32.458869)
    assert encoding_seconds("nothing of the kind") is None


def test_ratios_are_others_seconds_over_ours_within_a_round():
    ours = {1: Seen(10.0, 2.0, 0, 8.0), 2: Seen(20.0, 2.0, 0, 8.0)}
    runs = {OURS: ours, TORCH: {1: Seen(15.0, 15.0, 0, 12.0)}, LLAMA: {2: Seen(30.0, 30.0, 0)}}
    assert [goal.values for goal in goals(runs)] == [[1.5], [1.5], [1.5], [], [5.0, 10.0]]
