"""Pictures through the Ollamas that have image models, by every way their users have."""

import asyncio
import base64
import io
import subprocess
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.server import RUNNER, Server, run_ollama  # noqa: E402
from tests.ollama.store import Store  # noqa: E402

pytestmark = [
    pytest.mark.ollama,
    pytest.mark.timeout(180),
    pytest.mark.parametrize("version", ["classic", "images"], indirect=True, scope="module"),
]
FAMILIES = ("flux2_klein", "z_image")
SMALL = {"width": 64, "height": 48, "steps": 2}
LONG = {"width": 256, "height": 256, "steps": 1000}
any_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pipelines(parity, tmp_path_factory):
    """A store with the tiny pipelines, as `create` writes them."""
    store = Store(tmp_path_factory.mktemp("pipelines") / "models")
    for name in FAMILIES:
        source = parity.parent / "parity_image" / name
        command = [RUNNER, "create", name, "--from", source, "--store", store.folder]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return store


@pytest.fixture(scope="module")
def server(version, pipelines, tmp_path_factory):
    with Server(version, pipelines, tmp_path_factory.mktemp("home")) as running:
        yield running


def post(server, path, **body):
    return httpx.post(f"http://{server.address}{path}", json=body, timeout=120)


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def data_url(colour, size=(80, 64)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@any_family
def test_a_stream_tells_each_step_and_ends_with_the_picture(server, family):
    *steps, last = server.client.generate(family, "a hen", stream=True, options={"seed": 7}, **SMALL)
    assert [(each.completed, each.total, each.done) for each in steps] == [(1, 2, False), (2, 2, False)]
    assert last.done is True
    image = picture(last.image)
    assert (image.format, image.size, image.text["seed"], image.text["prompt"]) == ("PNG", (64, 48), "7", "a hen")


@any_family
def test_the_same_seed_is_the_same_picture_without_a_stream_too(server, family):
    first, again, other = (
        server.client.generate(family, "a hen", options={"seed": seed}, **SMALL).image for seed in (7, 7, 8)
    )
    assert first == again != other


@any_family
def test_the_openai_endpoint_generates(server, family):
    answer = post(server, "/v1/images/generations", model=family, prompt="a hen", size="64x48", seed=7)
    assert answer.status_code == 200, answer.text
    (data,) = answer.json()["data"]
    assert picture(data["b64_json"]).size == (64, 48)


@any_family
def test_the_openai_endpoint_edits(server, family):
    def edited(colour):
        body = {"model": family, "prompt": "add a hat", "image": data_url(colour), "seed": 7, "size": "64x64"}
        answer = post(server, "/v1/images/edits", **body)
        assert answer.status_code == 200, answer.text
        return np.asarray(picture(answer.json()["data"][0]["b64_json"]))

    red, blue, again = edited("red"), edited("blue"), edited("red")
    assert red.shape == (64, 64, 3)
    assert np.array_equal(red, again)
    assert not np.array_equal(red, blue)


def test_the_command_line_saves_a_picture(server, tmp_path):
    server.environ["HOME"], home = str(tmp_path), server.environ["HOME"]
    try:
        answer = run_ollama(server, "run", "flux2_klein", "a hen", "--width=64", "--height=48", "--steps=2", "--seed=7")
    finally:
        server.environ["HOME"] = home
    assert answer.returncode == 0, answer.stderr
    assert "Image saved to: " in answer.stdout


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"width": 4096, "height": 4096}, "width and height are too large: 4096x4096"),
        ({"steps": 5000}, "steps must be between 1 and 1000, not 5000"),
        ({"images": [base64.b64encode(b"no picture").decode()]}, r"images\[0\] is not a picture"),
    ],
)
def test_a_refusal_reaches_the_user_in_the_runners_words(server, body, reason):
    with pytest.raises(ollama.ResponseError, match=reason):
        server.client.generate("flux2_klein", "a hen", **body)
    assert server.client.generate("flux2_klein", "a hen", **SMALL).done


async def test_requests_that_come_together_are_all_answered(server):
    async with ollama.AsyncClient(host=server.address) as client:

        async def ask(seed):
            stream = await client.generate("flux2_klein", "a hen", stream=True, options={"seed": seed}, **SMALL)
            heard = [line async for line in stream]
            # The line of the queue's place has no news for this parent, and no harm.
            without_news.extend(line for line in heard[:-1] if line.total is None)
            return heard[-1].image

        without_news = []
        together = await asyncio.gather(*(ask(seed) for seed in range(1, 5)))
        assert len(set(together)) == 4
        assert without_news
        assert [await ask(seed) for seed in range(1, 5)] == together


def test_a_client_that_goes_away_ends_its_picture_and_the_next_is_as_ever(server):
    expected = server.client.generate("flux2_klein", "a hen", options={"seed": 7}, **SMALL).image
    seen = server.seen
    with closing(server.client.generate("flux2_klein", "a hen", stream=True, **LONG)) as stream:
        next(stream)
    server.wait_for("image cancelled", seen)
    assert server.client.generate("flux2_klein", "a hen", options={"seed": 7}, **SMALL).image == expected
