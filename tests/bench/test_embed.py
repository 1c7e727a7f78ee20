"""The arithmetic of the measurement of embeddings, and its client."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.bench import embed, embed_quality
from tests.bench.embed import BATCHES, LENGTHS, LLAMA, MIXED, ONNX, OURS, TORCH, Run


def run(seconds: float, mixed: float = 1.0, peak: int = 100, vector: list[float] | None = None) -> Run:
    times = {f"{batch}x{length}": [seconds] for batch in BATCHES for length in LENGTHS}
    times |= {"mixed": [mixed]} | {f"sorted-{n}": [0.25] for n in range(8)}
    return Run(times, vector or [1.0, 0.0], peak)


def test_the_shapes_are_all_batches_of_all_lengths_and_the_mixed_ones_sorted():
    shapes = embed.shapes()
    assert shapes["8x128"] == [128] * 8
    ordered = [length for n in range(8) for length in shapes[f"sorted-{n}"]]
    assert ordered == sorted(shapes["mixed"])
    assert len(ordered) == MIXED
    assert len(set(ordered)) > 20


def test_ratios_are_taken_over_the_fastest_other_of_the_same_round():
    runs = {
        OURS: {1: run(1.0, peak=30), 2: run(9.0)},
        TORCH: {1: run(4.0, peak=120)},
        ONNX: {1: run(2.0), 2: run(1.0)},
        LLAMA: {1: run(3.0)},
    }
    found = {goal.title: goal.values for goal in embed.goals(runs)}
    assert found["over the best other, 8 x 16 tokens"] == [2.0]
    assert found["over torch, 8 x 16 tokens"] == [4.0]
    assert found["mixed lengths over sorted ones, seconds"] == [0.5, 0.5]
    assert found["memory over torch's"] == [0.25]


def test_without_others_nothing_is_over_the_best():
    words = {goal.title: goal.word for goal in embed.goals({OURS: {1: run(1.0)}})}
    assert words["over the best other, 1 x 16 tokens"] == "not measured"


def test_a_contestant_that_never_ran_is_missing_in_the_table():
    rows = embed.cells({OURS: {1: run(0.5)}, LLAMA: {}})
    assert rows[0][1:3] == ["2.0", "16.0"]
    assert set(rows[1][1:]) == {"missing"}


def test_vectors_agree_by_their_cosine():
    runs = {OURS: {1: run(1.0)}, TORCH: {1: run(1.0, vector=[0.0, 5.0])}, ONNX: {1: run(1.0, vector=[3.0, 0.0])}}
    assert embed.agreement(runs) == {TORCH: 0.0, ONNX: 1.0}
    assert embed.agreement({LLAMA: {1: run(1.0)}}) == {}


def test_a_rank_correlation_sees_the_order_alone():
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert embed_quality.rank_correlation(values, values**3) == pytest.approx(1)
    assert embed_quality.rank_correlation(values, -values) == pytest.approx(-1)


def test_pairs_are_all_and_each_once():
    made = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert embed_quality.pair_cosines(made).tolist() == [0.0, 0.6, 0.8]


@contextmanager
def echoing():
    """A server that says what it was asked, closes each connection behind its second answer, and refuses /no."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answers = 0

        def do_POST(self):
            asked = self.rfile.read(int(self.headers["content-length"]))
            self.answers += 1
            self.send_response(404 if self.path == "/no" else 200)
            self.send_header("Content-Length", str(len(asked)))
            if self.answers == 2:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(asked)

        def log_message(self, *words):
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_client_asks_on_when_a_server_closes_its_connection():
    with echoing() as url, embed.poster(url, "/yes", "content") as post:
        for number in range(5):
            assert post([f"text {number}"]) == {"content": [f"text {number}"]}


def test_the_client_tells_of_a_refusal():
    with echoing() as url, embed.poster(url, "/no", "content") as post, pytest.raises(LookupError, match="404"):
        post(["text"])
