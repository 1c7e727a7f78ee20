"""The runner as the child of real Ollama servers: how it comes, stays, fails and goes."""

import asyncio
import shutil
import signal
import sys
from contextlib import aclosing, closing
from itertools import islice
from pathlib import Path

import psutil
import pytest

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.programs import VERSIONS  # noqa: E402
from tests.ollama.server import RUNNER, run_ollama  # noqa: E402
from tests.ollama.store import Store  # noqa: E402

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(180)]
GREEDY = {"temperature": 0, "num_predict": 12}
ENDLESS = {"temperature": 0, "num_predict": -1, "num_ctx": 1_000_000}


def skip_classic(version, why):
    if version == VERSIONS["classic"]:
        pytest.skip(f"not with this parent: {why}")


def endless(server):
    """A stream that has begun and will not end soon, to be closed: `with closing(endless(server)) as stream`."""
    stream = server.client.generate("roomy", "the fox", options=ENDLESS, stream=True)
    list(islice(stream, 3))
    return stream


def test_keep_alive_loads_and_unloads(start):
    with start() as server:
        assert server.client.generate("tiny", keep_alive=60).done_reason == "load"
        child = server.child()
        assert [model.model for model in server.client.ps().models] == ["tiny:latest"]
        server.client.generate("tiny", "fox", options=GREEDY, keep_alive=60)
        assert server.child() == child
        assert server.client.generate("tiny", keep_alive=0).done_reason == "unload"
        assert psutil.wait_procs([child], 10)[1] == []
        assert until_no_more_are_listed(server, than=0) == []


def test_two_models_serve_at_once_and_a_third_takes_the_place_of_one(start):
    with start(OLLAMA_MAX_LOADED_MODELS=2) as server:
        for name in ("tiny", "fish", "tiny"):
            server.client.generate(name, "fox", options=GREEDY)
        assert {model.model for model in server.client.ps().models} == {"tiny:latest", "fish:latest"}
        assert len(server.children()) == 2
        server.client.generate("roomy", "fox", options=GREEDY)
        loaded = {model.model for model in server.client.ps().models}
        assert len(loaded) == 2
        assert "roomy:latest" in loaded


async def test_eight_conversations_reach_the_batch_together_and_answer_as_alone(start):
    prompts = [f"Say the number {number}." for number in range(8)]
    with start(OLLAMA_NUM_PARALLEL=8, OLLAMA_MLX_RUNNER_PARALLEL=8) as server:
        alone = [server.client.generate("smol", prompt, options=GREEDY).response for prompt in prompts]
        async with ollama.AsyncClient(host=server.address, timeout=100) as client:
            together = await asyncio.gather(*(client.generate("smol", prompt, options=GREEDY) for prompt in prompts))
            assert [answer.response for answer in together] == alone
            begun = set()
            await asyncio.gather(*(read_until_all_have_begun(client, begun, number) for number in range(8)))


async def read_until_all_have_begun(client, begun, number):
    """No answer ends before all have begun, so none may wait for another."""
    stream = await client.generate("roomy", f"fox {number}", options=ENDLESS, stream=True)
    async with aclosing(stream):
        async for _ in stream:
            begun.add(number)
            if len(begun) == 8:
                return


def test_a_client_that_goes_away_ends_its_request(start):
    with start() as server:
        seen = server.seen
        endless(server).close()
        server.wait_for("completion cancelled", seen)
        assert server.client.generate("roomy", "the fox", options=GREEDY).eval_count == 12


def test_a_child_killed_in_mid_stream_is_an_error_and_the_next_request_has_a_new_one(start):
    with start() as server, closing(endless(server)) as stream:
        first = server.child()
        first.kill()
        with pytest.raises(ollama.ResponseError, match=r"EOF|reset"):
            list(stream)
        assert server.client.generate("roomy", "the fox", options=GREEDY).eval_count == 12
        assert server.child() != first


KILLED = r"signal: killed|terminated with exit code -1|model failed to load"
"""In a parent's words; the last where a load request was under way, which only the oldest sends."""


async def test_a_child_killed_while_it_loads_is_an_error_and_the_next_request_has_a_new_one(start):
    with start() as server:
        async with ollama.AsyncClient(host=server.address, timeout=60) as client:
            request = asyncio.create_task(client.generate("fish", "the fox"))
            await asyncio.to_thread(server.wait_for, "memory plan")
            server.child().kill()
            with pytest.raises(ollama.ResponseError, match=KILLED):
                await request
            assert (await client.generate("fish", "the fox")).eval_count == 5


@pytest.fixture
def broken_store(store, tmp_path):
    """A copy of a model, to be damaged."""
    folder = tmp_path / "models"
    shutil.copytree(store.folder / "manifests", folder / "manifests")
    (folder / "blobs").mkdir()
    for blob in (store.folder / "blobs").iterdir():
        (folder / "blobs" / blob.name).symlink_to(blob)
    return Store(folder)


@pytest.mark.parametrize(
    ("layer", "content", "reason"),
    [
        ("model.layers.0.mlp.up_proj.weight", b"short", "the blob has 5 bytes"),
        ("model.layers.0.mlp.up_proj.weight", None, "the blob is missing"),
        ("config.json", None, "the blob is missing"),
    ],
)
def test_a_model_broken_on_disk_is_refused_in_the_runners_words(start, broken_store, layer, content, reason):
    blob = broken_store.blob("tiny", layer)
    blob.unlink()
    if content is not None:
        blob.write_bytes(content)
    with start(broken_store, OLLAMA_NOPRUNE=1) as server:
        with pytest.raises(ollama.ResponseError, match=f"Error: .*{reason}"):
            server.client.generate("tiny", "fox", options=GREEDY)
        assert server.client.generate("fish", "fox").eval_count == 5


def test_too_little_memory_is_refused_in_the_runners_words(start, version):
    skip_classic(version, "it sets the context itself")
    refused = pytest.raises(ollama.ResponseError, match="Error: insufficient memory")
    with start(OLLAMA_MLX_RUNNER_CONTEXT=10_000_000, OLLAMA_MLX_RUNNER_PARALLEL=1024) as server, refused:
        server.client.generate("roomy", "fox", options=GREEDY)


def test_a_model_that_does_not_fit_leaves_the_others_alone(start, version):
    skip_classic(version, "it sets the context itself")
    with start(OLLAMA_MLX_RUNNER_CONTEXT=10_000_000, OLLAMA_MLX_RUNNER_PARALLEL=1024) as server:
        server.client.generate("tiny", "fox", options=GREEDY)
        with pytest.raises(ollama.ResponseError, match="Error: insufficient memory"):
            server.client.generate("roomy", "fox", options=GREEDY)
        assert until_no_more_are_listed(server, than=1) == ["tiny:latest"]


def until_no_more_are_listed(server, than):
    """The models that the server lists, once it has let go of the others (it answers just before)."""
    asked = ([model.model for model in server.client.ps().models] for _ in range(10_000))
    return next(listed for listed in asked if len(listed) <= than)


def test_the_command_line_runs_shows_and_stops_a_model(start):
    with start() as server:
        answer = run_ollama(server, "run", "fish", "the fox", "--verbose")
        assert answer.returncode == 0
        assert answer.stdout.strip()
        assert "eval rate" in answer.stderr
        assert "fish:latest" in run_ollama(server, "ps").stdout
        assert run_ollama(server, "stop", "fish").returncode == 0
        assert "completion" in run_ollama(server, "show", "fish").stdout


def test_the_command_line_shows_the_runners_words(start, broken_store):
    broken_store.blob("tiny", "model.layers.0.mlp.up_proj.weight").unlink()
    with start(broken_store, OLLAMA_NOPRUNE=1) as server:
        answer = run_ollama(server, "run", "tiny", "the fox")
        assert answer.returncode == 1
        assert "the blob is missing" in answer.stderr
        assert "up_proj" in answer.stderr


OCCUPIER = """#!{python}
import socket, subprocess, sys
with socket.socket() as taken:
    taken.bind(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
    taken.listen()
    sys.exit(subprocess.call([{runner!r}, *sys.argv[1:]]))
"""


def test_a_port_that_was_taken_meanwhile_is_named(start, version, tmp_path):
    skip_classic(version, "it waits for a child to listen and does not look whether there still is one")
    occupier = tmp_path / "occupier"
    occupier.write_text(OCCUPIER.format(python=sys.executable, runner=str(RUNNER)))
    occupier.chmod(0o755)
    refused = pytest.raises(ollama.ResponseError, match=r"Error: port \d+ on 127.0.0.1 is taken")
    with start(runner=occupier) as server, refused:
        server.client.generate("tiny", "fox", options=GREEDY)


def test_an_image_model_is_refused_in_clear_words(start, version):
    reason = "image generation models are not currently supported" if version == VERSIONS["newest"] else "Error: "
    with start() as server, pytest.raises(ollama.ResponseError, match=reason):
        server.client.generate("picture", "a fox", width=64, height=64)


def test_a_server_without_its_runner_says_so_at_once(start):
    ended = run_ollama(start(runner=Path("nowhere/ollama-mlx-runner")), "serve")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ")
    assert "nowhere/ollama-mlx-runner" in ended.stderr
    assert "install ollama-mlx-runner" in ended.stderr


def test_no_child_outlives_a_parent_that_was_killed(start):
    with start() as server, closing(endless(server)):
        children = server.children()
        server.process.kill()
        assert psutil.wait_procs(children, 15)[1] == []


@pytest.mark.parametrize("moment", ["starting (mlx runner subprocess|runner.* --model)", "memory plan"])
async def test_no_child_outlives_a_parent_that_was_killed_while_it_loads(start, moment):
    with start() as server:
        async with ollama.AsyncClient(host=server.address, timeout=60) as client:
            request = asyncio.create_task(client.generate("smol", "the fox", options=GREEDY))
            await asyncio.to_thread(server.wait_for, moment)
            children = await asyncio.to_thread(until_there, server)
            server.process.kill()
            assert psutil.wait_procs(children, 30)[1] == []
            with pytest.raises((ollama.ResponseError, ConnectionError, httpx.HTTPError)):
                await request


def until_there(server):
    """The children, of which the log speaks just before there is one."""
    return next(filter(None, (server.children() for _ in range(1000))))


def test_an_interrupt_while_generating_ends_parent_and_child(start):
    with start() as server, closing(endless(server)):
        children = server.children()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(15) in (0, 1)
        assert psutil.wait_procs(children, 15)[1] == []


async def test_an_interrupt_while_loading_ends_parent_and_child(start):
    with start() as server:
        async with ollama.AsyncClient(host=server.address, timeout=60) as client:
            request = asyncio.create_task(client.generate("smol", "the fox", options=GREEDY))
            await asyncio.to_thread(server.wait_for, "memory plan")
            children = server.children()
            assert len(children) == 1
            server.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(server.process.wait, 15) in (0, 1)
            assert psutil.wait_procs(children, 15)[1] == []
            with pytest.raises((ollama.ResponseError, ConnectionError, httpx.HTTPError)):
                await request
