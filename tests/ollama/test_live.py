"""The runner as the child of real Ollama servers, driven by Ollama's own Python client."""

import asyncio
import shutil
import signal
import subprocess
import sys
from contextlib import aclosing, closing
from itertools import islice
from pathlib import Path

import psutil
import pytest

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.programs import BIN, VERSIONS, skip_without  # noqa: E402
from tests.ollama.server import RUNNER, Server  # noqa: E402
from tests.ollama.store import Store  # noqa: E402

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(180)]
GREEDY = {"temperature": 0, "num_predict": 12}
ENDLESS = {"temperature": 0, "num_predict": -1, "num_ctx": 1_000_000}
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    skip_without(f"ollama-{VERSIONS[request.param]}")
    return VERSIONS[request.param]


def endless(server):
    """A stream that has begun and will not end soon, to be closed: `with closing(endless(server)) as stream`."""
    stream = server.client.generate("roomy", "the fox", options=ENDLESS, stream=True)
    list(islice(stream, 3))
    return stream


@pytest.fixture
def start(version, store_for, tmp_path):
    """Starts a server of this test's own: `with start(OLLAMA_NUM_PARALLEL=8) as server`."""
    return lambda store=None, **more: Server(version, store or store_for(version), tmp_path, **more)


@pytest.fixture(scope="module")
def server(version, store_for, tmp_path_factory):
    with Server(version, store_for(version), tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client


def test_a_question_is_answered(client):
    answer = client.generate("smol", QUESTION, options=GREEDY)
    assert "Paris" in answer.response
    assert answer.done_reason in ("stop", "length")
    assert answer.prompt_eval_count > 10
    assert answer.prompt_eval_duration > 0
    assert answer.eval_duration > 0
    assert len(answer.context) > answer.prompt_eval_count


def test_the_pieces_of_a_stream_are_the_answer(client):
    whole = client.generate("smol", QUESTION, options=GREEDY)
    pieces = list(client.generate("smol", QUESTION, options=GREEDY, stream=True))
    assert len(pieces) > 5
    assert "".join(piece.response for piece in pieces) == whole.response
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].eval_count == whole.eval_count


def test_a_conversation_goes_through_the_template(client):
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Of which country is this the capital?"},
    ]
    answer = client.chat("smol", messages, options=GREEDY)
    assert "France" in answer.message.content
    assert answer.message.role == "assistant"
    shorter = client.chat("smol", messages[1:], options=GREEDY)
    assert shorter.prompt_eval_count < answer.prompt_eval_count
    streamed = "".join(part.message.content for part in client.chat("smol", messages, options=GREEDY, stream=True))
    assert streamed == answer.message.content


def test_a_models_own_system_prompt_and_parameters_count(client):
    alone = client.generate("fish", "the fox")
    assert alone.eval_count == 5
    assert client.generate("fish", "the fox").response == alone.response
    assert client.generate("fish", "the fox", system="be").prompt_eval_count < alone.prompt_eval_count
    assert client.generate("fish", "the fox", options={"num_predict": 3}).eval_count == 3


def test_a_template_in_the_request_replaces_the_models(client):
    answer = client.generate("tiny", "fox", template="{{ .Prompt }}", options=GREEDY)
    assert answer.prompt_eval_count == client.generate("tiny", "fox", raw=True, options=GREEDY).prompt_eval_count


def test_a_raw_prompt_is_left_alone(client):
    answer = client.generate("tiny", "fox", raw=True, options=GREEDY)
    assert answer.prompt_eval_count < 4
    assert not answer.context


def test_a_seed_reproduces_and_others_differ(client):
    def draw(seed):
        return client.generate("roomy", "the fox", options={"seed": seed, "num_predict": 12, "temperature": 1}).response

    assert draw(7) == draw(7)
    assert draw(0) == draw(0)
    assert len({draw(seed) for seed in range(5)}) > 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrow_sampling_is_greedy(client, narrow):
    greedy = client.generate("roomy", "the fox", options={"num_predict": 12, "temperature": 0})
    drawn = client.generate("roomy", "the fox", options={"num_predict": 12, "temperature": 2, "seed": 1, **narrow})
    assert drawn.response == greedy.response


@pytest.mark.parametrize("penalty", [{"repeat_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_penalties_change_the_answer(client, penalty):
    options = {"num_predict": 60, "temperature": 0, "repeat_penalty": 1}
    plain = client.generate("roomy", "the fox", options=options)
    assert client.generate("roomy", "the fox", options={**options, **penalty}).response != plain.response


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = client.generate("smol", QUESTION, options=GREEDY).response
    assert " capital" in whole
    answer = client.generate("smol", QUESTION, options={**GREEDY, "stop": ["nothing like it", " capital"]})
    assert answer.response == whole[: whole.index(" capital")]
    assert answer.done_reason == "stop"


def test_num_predict_limits_the_answer(client):
    answer = client.generate("roomy", "the fox", options={"num_predict": 4, "temperature": 0})
    assert (answer.eval_count, answer.done_reason) == (4, "length")


def test_an_answer_without_limit_ends_with_the_context(client):
    answer = client.generate("tiny", "the fox", raw=True, options={"num_predict": -1, "temperature": 0})
    assert answer.done_reason == "length"
    assert answer.prompt_eval_count + answer.eval_count in (128, 129)


def test_log_probabilities_come_with_their_alternatives(client):
    answer = client.generate("smol", QUESTION, options={**GREEDY, "num_predict": 3}, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == 3
    for entry in answer.logprobs:
        assert entry.top_logprobs[0].token == entry.token
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    assert "".join(entry.token for entry in answer.logprobs) == answer.response


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(client):
    with pytest.raises(ollama.ResponseError, match=r"\d+ tokens.*128 tokens") as refused:
        client.generate("tiny", "the fox " * 200, raw=True)
    assert refused.value.status_code == 400


def test_an_empty_prompt_is_refused(client):
    with pytest.raises(ollama.ResponseError, match="empty") as refused:
        client.generate("tiny", "the fox", template='{{ "" }}', options=GREEDY)
    assert refused.value.status_code == 400


def test_a_picture_for_a_text_model_is_refused_or_dropped(client, version):
    if version == VERSIONS["images"]:
        pytest.skip("this version's parent drops the picture before the runner sees it")
    picture = b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ollama.ResponseError, match="takes text only"):
        client.generate("tiny", "fox", images=[picture], options=GREEDY)


def test_the_memory_and_the_context_of_a_running_model_are_true(client):
    client.generate("tiny", "fox", raw=True, options=GREEDY, keep_alive=60)
    (entry,) = [model for model in client.ps().models if model.model == "tiny:latest"]
    assert entry.context_length == 128
    assert 100_000 < entry.size < 10_000_000
    client.generate("smol", "fox", raw=True, options=GREEDY, keep_alive=60)
    (entry,) = [model for model in client.ps().models if model.model == "smol:latest"]
    assert 250e6 < entry.size < 2e9
    assert entry.size_vram == entry.size


def test_models_are_listed_and_shown(client):
    assert {model.model for model in client.list().models} >= {"tiny:latest", "fish:latest", "smol:latest"}
    shown = client.show("fish")
    assert shown.capabilities == ["completion"]
    assert "temperature" in shown.parameters


def test_keep_alive_loads_and_unloads(start):
    with start() as server:
        assert server.client.generate("tiny", keep_alive=60).done_reason == "load"
        child = server.child()
        assert [model.model for model in server.client.ps().models] == ["tiny:latest"]
        server.client.generate("tiny", "fox", options=GREEDY, keep_alive=60)
        assert server.child() == child
        assert server.client.generate("tiny", keep_alive=0).done_reason == "unload"
        assert psutil.wait_procs([child], 10)[1] == []
        assert server.client.ps().models == []


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


def test_ollamas_own_types_read_the_answers_as_recorded(version):
    skip_without(f"decode-{version}")
    answers = Path(__file__).parents[1] / "conformance" / "answers"
    recorded = {VERSIONS["images"]: "mlx.v0.33.jsonl", VERSIONS["newest"]: "mlx.v0.34.jsonl"}[version]
    with (answers / "mlx.jsonl").open("rb") as lines:
        decoded = subprocess.run([BIN / f"decode-{version}"], stdin=lines, capture_output=True, check=True)
    assert decoded.stdout == (answers / recorded).read_bytes()


def test_the_openai_endpoint_answers(server):
    body = {"model": "smol", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"http://{server.address}/v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 12


def test_the_newest_parent_tells_how_much_of_a_prompt_was_cached(server):
    if server.version != VERSIONS["newest"]:
        pytest.skip("older parents do not ask")
    body = {"model": "roomy", "prompt": "there is no one here " * 90, "stream": False, "options": GREEDY}
    answers = [httpx.post(f"http://{server.address}/api/generate", json=body, timeout=60).json() for _ in range(2)]
    cached = [answer["prompt_eval_cached_count"] for answer in answers]
    assert 0 <= cached[0] < cached[1] < answers[1]["prompt_eval_count"]
    assert answers[0]["response"] == answers[1]["response"]


def test_a_thinking_models_text_reaches_the_parents_parser(client):
    answer = client.chat("thinker", [{"role": "user", "content": "the fox"}], think=True, options=GREEDY)
    assert answer.message.thinking
    assert not answer.message.content
    answer = client.chat("thinker", [{"role": "user", "content": "the fox"}], think=False, options=GREEDY)
    assert answer.message.content
    assert not answer.message.thinking


def test_a_child_killed_in_mid_stream_is_an_error_and_the_next_request_has_a_new_one(start):
    with start() as server, closing(endless(server)) as stream:
        first = server.child()
        first.kill()
        with pytest.raises(ollama.ResponseError, match=r"EOF|reset"):
            list(stream)
        assert server.client.generate("roomy", "the fox", options=GREEDY).eval_count == 12
        assert server.child() != first


async def test_a_child_killed_while_it_loads_is_an_error_and_the_next_request_has_a_new_one(start):
    with start() as server:
        async with ollama.AsyncClient(host=server.address, timeout=60) as client:
            request = asyncio.create_task(client.generate("fish", "the fox"))
            await asyncio.to_thread(server.wait_for, "memory plan")
            server.child().kill()
            with pytest.raises(ollama.ResponseError, match=r"exited unexpectedly: signal: killed"):
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


def test_too_little_memory_is_refused_in_the_runners_words(start):
    refused = pytest.raises(ollama.ResponseError, match="Error: insufficient memory")
    with start(OLLAMA_MLX_RUNNER_CONTEXT=10_000_000, OLLAMA_MLX_RUNNER_PARALLEL=1024) as server, refused:
        server.client.generate("roomy", "fox", options=GREEDY)


def test_a_model_that_does_not_fit_leaves_the_others_alone(start, store):
    with start(OLLAMA_MLX_RUNNER_CONTEXT=10_000_000, OLLAMA_MLX_RUNNER_PARALLEL=1024) as server:
        server.client.generate("tiny", "fox", options=GREEDY)
        with pytest.raises(ollama.ResponseError, match="Error: insufficient memory"):
            server.client.generate("roomy", "fox", options=GREEDY)
        assert until_one_is_left(server) == ["tiny:latest"]


def until_one_is_left(server):
    """The models that the server lists, once it has let go of one that was refused (it answers just before)."""
    asked = ([model.model for model in server.client.ps().models] for _ in range(10_000))
    return next(listed for listed in asked if len(listed) < 2)


def run_ollama(server, *words):
    """Ollama's command line as a person uses it."""
    return subprocess.run(
        [BIN / f"ollama-{server.version}", *words],
        env={**server.environ, "OLLAMA_HOST": server.address},
        cwd=server.environ["HOME"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


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


def test_a_port_that_was_taken_meanwhile_is_named(start, tmp_path):
    occupier = tmp_path / "occupier"
    occupier.write_text(OCCUPIER.format(python=sys.executable, runner=str(RUNNER)))
    occupier.chmod(0o755)
    refused = pytest.raises(ollama.ResponseError, match=r"Error: port \d+ on 127.0.0.1 is taken")
    with start(runner=occupier) as server, refused:
        server.client.generate("tiny", "fox", options=GREEDY)


def test_an_image_model_is_refused_in_clear_words(start, version):
    reason = "Error: " if version == VERSIONS["images"] else "image generation models are not currently supported"
    with start() as server, pytest.raises(ollama.ResponseError, match=reason):
        server.client.generate("picture", "a fox", width=64, height=64)


def test_a_runner_that_is_not_installed_is_named(start):
    refused = pytest.raises(ollama.ResponseError, match=r"nowhere/ollama-mlx-runner|MLX runtime is not available")
    with start(runner=Path("nowhere/ollama-mlx-runner")) as server, refused:
        server.client.generate("tiny", "fox", options=GREEDY)


def test_no_child_outlives_a_parent_that_was_killed(start):
    with start() as server, closing(endless(server)):
        children = server.children()
        server.process.kill()
        assert psutil.wait_procs(children, 15)[1] == []


@pytest.mark.parametrize("moment", ["starting mlx runner subprocess", "memory plan"])
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
