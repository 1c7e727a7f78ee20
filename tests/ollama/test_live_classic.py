"""What the classic parent alone does: GGUF files by `create`, two kinds of launch, texts cut and moved on."""

import asyncio

import psutil
import pytest

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.server import run_ollama  # noqa: E402
from tests.ollama.store import Store, with_context  # noqa: E402

pytestmark = [
    pytest.mark.ollama,
    pytest.mark.timeout(180),
    pytest.mark.parametrize("version", ["classic"], indirect=True, scope="module"),
]
GREEDY = {"temperature": 0, "num_predict": 12}
PROMPT = "<|im_start|>system\nYou are a fox.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MODELFILE = """FROM {file}
SYSTEM You are a fox.
PARAMETER temperature 0
PARAMETER num_predict 5
"""


@pytest.fixture
def client(server):
    return server.client


def test_a_gguf_file_is_created_run_copied_and_removed(start, tmp_path, parity):
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(MODELFILE.format(file=parity / "qwen2.gguf"))
    with start(Store(tmp_path / "models")) as server:
        created = run_ollama(server, "create", "fox", "-f", str(modelfile))
        assert created.returncode == 0, created.stderr
        shown = server.client.show("fox")
        assert shown.capabilities == ["completion"]
        # The file's own chat template was recognised.
        assert "<|im_start|>" in shown.template
        assert server.client.generate("fox", "the hen").eval_count == 5
        said = server.client.chat("fox", [{"role": "user", "content": "the hen"}])
        assert said.message.content == server.client.generate("fox", PROMPT.format("the hen"), raw=True).response
        assert run_ollama(server, "cp", "fox", "vixen").returncode == 0
        assert run_ollama(server, "rm", "fox").returncode == 0
        answer = run_ollama(server, "run", "vixen", "the hen")
        assert answer.returncode == 0, answer.stderr
        assert [model.model for model in server.client.list().models] == ["vixen:latest"]


def launched(server):
    """How the only child was started, without its port."""
    words = server.child().cmdline()
    return words[words.index("runner") + 1 : words.index("--port")]


def test_either_engines_child_is_this_runner_and_answers_alike(start):
    answers = []
    for flags, environ in ([], {}), (["--ollama-engine"], {"OLLAMA_NEW_ENGINE": 1}):
        with start(**environ) as server:
            answers.append(server.client.generate("tiny", "the fox", options=GREEDY).response)
            words = launched(server)
            assert words[:-1] == [*flags, "--model"]
            assert f"{server.environ['OLLAMA_MODELS']}/blobs/sha256-" in words[-1]
    assert answers[0] == answers[1]
    with start() as server:
        server.client.generate("fish", "the fox")
        assert "--ollama-engine" in launched(server)


def test_a_prompt_longer_than_the_context_is_cut_where_nothing_forbids_it(client):
    answer = client.generate("tiny", "the fox " * 200, raw=True, options=GREEDY)
    assert 64 <= answer.prompt_eval_count < 128
    assert answer.eval_count == 12


def test_an_answer_goes_on_beyond_the_context_where_nothing_forbids_it(client):
    answer = client.generate("tiny", "the fox", raw=True, options={"num_predict": 200, "temperature": 0})
    assert (answer.eval_count, answer.done_reason) == (200, "length")


def test_num_ctx_and_the_parallel_requests_share_out_the_cache(start):
    with start(OLLAMA_NUM_PARALLEL=3) as server:
        server.client.generate("roomy", "fox", options={**GREEDY, "num_ctx": 512})
        plan = server.wait_for(r"memory plan.*context=(\d+) parallel=(\d+)")
        assert (plan[1], plan[2]) == ("512", "3")
        child = server.child()
        # Another context is another child.
        server.client.generate("roomy", "fox", options={**GREEDY, "num_ctx": 1024})
        assert psutil.wait_procs([child], 10)[1] == []
        assert server.client.ps().models[0].context_length == 1024


async def test_two_requests_are_answered_together_by_one_child(start):
    wanted = {"num_predict": 300, "temperature": 0, "num_ctx": 1024}
    with start(OLLAMA_NUM_PARALLEL=2) as server:
        async with ollama.AsyncClient(host=server.address, timeout=60) as client:

            async def read(prompt):
                pieces = []
                async for part in await client.generate("roomy", prompt, options=wanted, stream=True):
                    pieces.append(part.response)
                    order.append(prompt)
                return "".join(pieces)

            order = []
            together = await asyncio.gather(read("the fox"), read("the hen"))
            # Neither waits for the other's end.
            assert order.index("the hen") < len(order) - 1 - order[::-1].index("the fox")
            assert order.index("the fox") < len(order) - 1 - order[::-1].index("the hen")
            assert len(server.children()) == 1
            assert [await read("the fox"), await read("the hen")] == together


def test_a_model_larger_than_memory_is_refused_by_what_the_runner_says_it_needs(start):
    reason = r"model requires more system memory \(.* GiB\) than is available"
    with start(OLLAMA_NEW_ENGINE=1, OLLAMA_NUM_PARALLEL=1024) as server:
        with pytest.raises(ollama.ResponseError, match=reason):
            server.client.generate("roomy", "fox", options={**GREEDY, "num_ctx": 10_000_000})
        assert server.client.generate("tiny", "fox", options=GREEDY).eval_count == 12


@pytest.mark.parametrize("engine", [0, 1])
def test_a_file_damaged_on_disk_is_refused_in_the_runners_words(start, tmp_path, parity, engine):
    store = Store(tmp_path / "models")
    store.add_gguf("broken", with_context(parity / "llama_gqa.gguf", tmp_path / "other.gguf", 64))
    store.add_gguf("whole", parity / "llama_gqa.gguf")
    blob = store.blob("broken", "model")
    blob.write_bytes(blob.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight"))
    with start(store, OLLAMA_NOPRUNE=1, OLLAMA_NEW_ENGINE=engine) as server:
        with pytest.raises(ollama.ResponseError, match=r"blk\.1\.ffn_no\.weight: the architecture has no such"):
            server.client.generate("broken", "fox", options=GREEDY)
        assert server.client.generate("whole", "fox", options=GREEDY).eval_count == 12


def test_a_quantised_cache_is_made_where_the_server_is_told_so(start):
    with start(OLLAMA_KV_CACHE_TYPE="q8_0", OLLAMA_FLASH_ATTENTION=1) as server:
        assert "Paris" in server.client.generate("smol", "Name the capital of France.", options=GREEDY).response
        server.wait_for("memory plan.*cache_type=q8_0")
        with pytest.raises(ollama.ResponseError, match="q8_0 cache needs heads of a multiple of 32"):
            server.client.generate("tiny", "fox", options=GREEDY)


def test_a_model_with_an_adapter_is_refused(start, tmp_path, parity):
    store = Store(tmp_path / "models")
    store.add_gguf("parts", parity / "llama_gqa.gguf", adapter=parity / "qwen2.gguf")
    with start(store) as server, pytest.raises(ollama.ResponseError, match="LoraPath is not supported"):
        server.client.generate("parts", "fox", options=GREEDY)


def test_a_models_projector_is_loaded_with_it_and_an_unknown_one_is_left_out(start, tmp_path, parity):
    store = Store(tmp_path / "models")
    folder = parity.with_name("parity_vision") / "projectors" / "llava"
    store.add_gguf("seeing", folder / "model.gguf", projector=folder / "mmproj.gguf")
    store.add_gguf("blind", parity / "llama_gqa.gguf", projector=parity / "qwen2.gguf")
    with start(store) as server:
        for name, said in (("seeing", "sees by the projector"), ("blind", "a projector of type 'qwen2'")):
            assert server.client.generate(name, "fox", options=GREEDY).eval_count
            server.wait_for(said)
