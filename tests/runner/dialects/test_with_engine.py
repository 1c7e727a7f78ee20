"""The three dialects on the real loop and the real engine, over real sockets, with an executor in miniature."""

import asyncio
import json
import random
import socket
from contextlib import asynccontextmanager

import pytest

from runner.config import DialectName
from runner.dialects.base import Timeouts
from runner.engine.executor_thread import ExecutorThread
from runner.engine.loop import EngineLoop
from runner.engine.types import EngineState
from tests.fakes import POISON, FakeExecutor, Gate, SlowCompiler, scripted
from tests.fakes_wire import ScriptedLoader, serve
from tests.runner.engine.serving import make_engine

SAID = 'Hé, <b>"w\u00f6rld"</b>\n\U0001f600\u2028'
NAMES = {
    DialectName.IMAGEGEN: ("content", "done", "eval_count", "prompt_eval_count", "done_reason"),
    DialectName.MLX: ("Content", "Done", "EvalCount", "PromptEvalCount", "DoneReason"),
    DialectName.CLASSIC: ("content", "done", "eval_count", "prompt_eval_count", "done_reason"),
}

every_dialect = pytest.mark.parametrize("dialect", list(DialectName), ids=lambda dialect: dialect.value)


@asynccontextmanager
async def served_model(dialect, executor, *, loader=None, loaded=True, timeouts=None, send_buffer=None, **options):
    """A dialect with an engine on `executor`."""
    thread = ExecutorThread()
    loop = EngineLoop(thread)
    try:
        if loaded:
            await loop.load(lambda progress: make_engine(executor, **options))
        async with serve(dialect, loop, loader, timeouts=timeouts, send_buffer=send_buffer) as served:
            yield served
    finally:
        await loop.close(0)
        await thread.close()


async def complete(served, dialect, prompt, **fields):
    """Status, text and last line."""
    status, body = await served.post("/completion", json={"prompt": prompt, **fields})
    if status != 200:
        return status, body.decode(), None
    content = NAMES[dialect][0]
    lines = [json.loads(line) for line in body.splitlines()]
    return status, "".join(line.get(content, "") for line in lines), lines[-1]


async def idle(served, executor):
    """Wait until no row is left."""
    async with asyncio.timeout(60):
        while served.loop.status.running or served.loop.status.waiting or executor.living_slots():
            await served.get("/health")


@every_dialect
async def test_the_text_and_its_counts_arrive(dialect):
    async with served_model(dialect, FakeExecutor(SAID)) as served:
        status, text, last = await complete(served, dialect, scripted(0, "prompt"), options={"num_ctx": 200})
        assert (status, text) == (200, SAID)
        _, done, eval_count, prompt_eval_count, _ = NAMES[dialect]
        stop_token = dialect is DialectName.CLASSIC
        assert last[done] is True
        assert last[eval_count] == len(SAID.encode()) + stop_token
        assert last[prompt_eval_count] == len("prompt") + 1


@every_dialect
async def test_the_limit_is_told_as_the_reason(dialect):
    async with served_model(dialect, FakeExecutor("abcdef")) as served:
        _, text, last = await complete(served, dialect, scripted(0), options={"num_predict": 3})
        assert (text, last[NAMES[dialect][4]], last[NAMES[dialect][2]]) == ("abc", 1, 3)


@every_dialect
async def test_stop_strings_end_the_text(dialect):
    async with served_model(dialect, FakeExecutor("one two three")) as served:
        _, text, last = await complete(served, dialect, scripted(0), options={"stop": ["o th"]})
        assert (text, last.get(NAMES[dialect][4], 0)) == ("one tw", 0)


@pytest.mark.parametrize("dialect", [DialectName.MLX, DialectName.CLASSIC])
async def test_log_probabilities_are_complete_and_aligned_with_the_text(dialect):
    async with served_model(dialect, FakeExecutor(SAID)) as served:
        request = {"prompt": scripted(0), "Logprobs": True, "TopLogprobs": 5, "options": {"num_ctx": 200}}
        _, body = await served.post("/completion", json=request)
        lines = [{key.lower(): value for key, value in json.loads(line).items()} for line in body.splitlines()]
        logprobs = [entry for line in lines for entry in line.get("logprobs", ())]
        assert len(logprobs) >= len(SAID.encode())
        assert all(len(entry["top_logprobs"]) == 5 for entry in logprobs)
        assert "".join(line["content"] for line in lines) == SAID
        if dialect is DialectName.CLASSIC:
            # The parent drops them from lines without content, but for the last.
            assert all(line["content"] or line["done"] for line in lines if line.get("logprobs"))


@every_dialect
async def test_a_prompt_too_long_is_400_before_any_line(dialect):
    async with served_model(dialect, FakeExecutor(), context_length=32) as served:
        status, reason, _ = await complete(served, dialect, "x" * 40)
        assert status == 400
        assert reason.startswith("input length (")
        assert reason.endswith("40 tokens) exceeds the model's maximum context length (32 tokens)\n")
        assert (await complete(served, dialect, scripted(0)))[0] == 200


@every_dialect
async def test_an_empty_prompt_is_400(dialect):
    async with served_model(dialect, FakeExecutor()) as served:
        assert (await complete(served, dialect, ""))[0] == 400


@every_dialect
async def test_odd_characters_in_a_prompt_are_served(dialect):
    async with served_model(dialect, FakeExecutor("ok")) as served:
        body = json.dumps({"prompt": "\0\ud800\U0001f600" + scripted(0)}).encode()
        assert (await served.post("/completion", data=body))[0] == 200


@every_dialect
async def test_a_step_that_fails_ends_its_request_with_a_line_and_no_other(dialect):
    async with served_model(dialect, FakeExecutor("a" + chr(POISON) + "b")) as served:
        status, body = await served.post("/completion", json={"prompt": scripted(0)})
        assert status == 200
        last = json.loads(body.splitlines()[-1])
        match dialect:
            case DialectName.IMAGEGEN:
                assert last["done"] is True
                assert last["content"].startswith("error: ")
            case DialectName.MLX:
                assert last["Error"]["StatusCode"] == 500
            case DialectName.CLASSIC:
                assert last["done"] == "error"
                assert last["error"]
        assert (await complete(served, dialect, "again", options={"num_predict": 2}))[0] == 200


@every_dialect
async def test_a_format_that_proves_wrong_while_its_prompt_is_read_is_400_before_any_header(dialect):
    compiler, executor = SlowCompiler(), FakeExecutor("free")
    asked = {"prompt": "the prompt", "format": {"type": "foo"}, "grammar": ""}
    async with served_model(dialect, executor, grammars=compiler) as served:
        wrong = asyncio.create_task(served.post("/completion", json=asked))
        async with asyncio.timeout(60):
            while len(executor.slots.get(0, ())) < len("the prompt"):
                await served.get("/health")
        assert (await complete(served, dialect, scripted(0)))[1] == "free"
        assert not wrong.done()
        compiler.let_go.set()
        status, reason = await wrong
        assert status == 400
        assert reason.startswith(b"invalid structured output grammar: ")
        assert b"foo" in reason
        await idle(served, executor)


@every_dialect
@pytest.mark.parametrize("step", [0, 5], ids=["prefill", "decode"])
async def test_a_client_that_leaves_frees_its_row(dialect, step):
    gate = Gate(step)
    executor = FakeExecutor("x" * 200, before_step=gate)
    async with served_model(dialect, executor) as served:
        leaving = asyncio.create_task(served.post("/completion", json={"prompt": scripted(0)}))
        await gate.reached()
        leaving.cancel()
        await asyncio.wait({leaving})
        status, _ = await served.get("/v1/status" if dialect is DialectName.MLX else "/health")
        assert status == 200
        gate.open()
        await idle(served, executor)
        assert executor.steps < 50
        assert (await complete(served, dialect, scripted(0), options={"num_predict": 2}))[1] == "xx"


@every_dialect
async def test_a_client_that_leaves_the_queue_is_never_run(dialect):
    gate = Gate(2)
    executor = FakeExecutor("abc", before_step=gate)
    async with served_model(dialect, executor, parallel=1) as served:
        first = asyncio.create_task(complete(served, dialect, scripted(0)))
        await gate.reached()
        leaving = asyncio.create_task(served.post("/completion", json={"prompt": scripted(0)}))
        while len(served.loop._readers) < 2:
            await served.get("/health")
        leaving.cancel()
        await asyncio.wait({leaving})
        gate.open()
        assert (await first)[1] == "abc"
        await idle(served, executor)
        assert executor.steps <= 5


async def test_a_reader_that_never_reads_loses_its_row_and_holds_up_no_other():
    executor = FakeExecutor("x" * 3000)
    body = json.dumps(
        {"Prompt": scripted(0), "Logprobs": True, "TopLogprobs": 20, "Options": {"num_predict": -1}}
    ).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with served_model(
        DialectName.MLX, executor, context_length=4096, send_buffer=4096, timeouts=Timeouts(write_s=0.2)
    ) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.sendall(head + body)
            while not served.loop.status.running:
                await served.get("/health")
            assert (await complete(served, DialectName.MLX, scripted(0), options={"num_predict": 2}))[1] == "xx"
            await idle(served, executor)
        assert executor.steps < 3000


@every_dialect
async def test_clients_that_come_and_go_disturb_nobody(dialect):
    rng = random.Random(1)
    executor = FakeExecutor("the first of the scripts", "another one, a little longer than the first")
    async with served_model(dialect, executor, parallel=3) as served:

        async def visit(number):
            request = {"prompt": scripted(number % 2, "p" * number), "options": {"temperature": 0}}
            async with served.client.post("/completion", json=request) as response:
                lines = []
                async for line in response.content:
                    lines.append(json.loads(line))
                    if number % 3 == 0 and rng.random() < 0.3:
                        response.close()
                        return None
                return "".join(line.get(NAMES[dialect][0], "") for line in lines)

        texts = await asyncio.gather(*(visit(number) for number in range(30)))
        said = ("the first of the scripts", "another one, a little longer than the first")
        assert all(text in (None, said[number % 2]) for number, text in enumerate(texts))
        assert texts.count(None) > 3
        await idle(served, executor)


async def test_a_full_queue_is_503():
    gate = Gate(0)
    async with served_model(DialectName.MLX, FakeExecutor("a", before_step=gate), parallel=1, max_waiting=0) as served:
        first = asyncio.create_task(complete(served, DialectName.MLX, scripted(0)))
        await gate.reached()
        assert (await complete(served, DialectName.MLX, scripted(0)))[0] == 503
        gate.open()
        assert (await first)[0] == 200


@every_dialect
async def test_status_answers_while_a_step_is_stuck(dialect):
    gate = Gate(0)
    async with served_model(dialect, FakeExecutor("a", before_step=gate)) as served:
        first = asyncio.create_task(complete(served, dialect, scripted(0)))
        await gate.reached()
        async with asyncio.timeout(60):
            assert (await served.get("/health"))[0] == 200
        gate.open()
        await first


async def test_a_shutdown_ends_the_stream_with_an_error_line():
    gate = Gate(3)
    async with served_model(DialectName.MLX, FakeExecutor("x" * 100, before_step=gate)) as served:
        first = asyncio.create_task(served.post("/completion", json={"prompt": scripted(0)}))
        await gate.reached()
        closing = asyncio.create_task(served.loop.close(0))
        status, body = await first
        gate.open()
        await closing
        assert status == 200
        assert json.loads(body.splitlines()[-1])["Error"]["StatusCode"] == 503


class RealBuilds(ScriptedLoader):
    """A loader whose builds make engines; `before` runs in the executor's thread."""

    before = staticmethod(lambda progress: None)

    def builder(self, reference, options):
        super().builder(reference, options)

        def build(progress):
            self.before(progress)
            return make_engine(FakeExecutor("hello"), context_length=options.context_per_row, parallel=options.parallel)

        return build


async def load(served, operation):
    status, body = await served.post("/load", json={"Operation": operation, "Parallel": 2, "KvSize": 400})
    return status, json.loads(body) if status == 200 else body.decode()


async def status_when_settled(served):
    while (health := json.loads((await served.get("/health"))[1]))["status"] == 3:
        pass
    return health


async def test_the_life_of_a_classic_model():
    async with served_model(DialectName.CLASSIC, None, loader=RealBuilds(), loaded=False) as served:
        for _ in range(2):
            assert (await complete(served, DialectName.CLASSIC, scripted(0)))[0] == 503
            for operation in (0, 1, 2):
                assert (await load(served, operation))[1]["Success"] is True
            assert await load(served, 2) == (500, "model already loaded\n")
            assert (await complete(served, DialectName.CLASSIC, scripted(0)))[1] == "hello"
            assert (await status_when_settled(served))["status"] == 0
            assert served.loop.status.context_length == 200
            assert (await load(served, 3))[0] == 200
            assert served.loop.status.state is EngineState.LAUNCHED


async def test_a_classic_load_is_given_up_when_closed():
    gate = Gate(0)

    def before(progress):
        gate(0, ())
        progress(0.5)

    loader = RealBuilds()
    loader.before = before
    async with served_model(DialectName.CLASSIC, None, loader=loader, loaded=False) as served:
        await load(served, 2)
        await gate.reached()
        closing = asyncio.create_task(load(served, 3))
        gate.open()
        assert (await closing)[0] == 200
        assert (await status_when_settled(served))["status"] == 2
        assert (await load(served, 2))[0] == 200
        assert (await status_when_settled(served))["status"] == 0


async def test_a_classic_load_that_fails_is_status_5_and_the_next_works():
    def fail(progress):
        raise MemoryError("insufficient memory")

    loader = RealBuilds()
    loader.before = fail
    async with served_model(DialectName.CLASSIC, None, loader=loader, loaded=False) as served:
        await load(served, 2)
        assert await status_when_settled(served) == {"status": 5, "progress": 0.0, "error": "insufficient memory"}
        del loader.before
        assert (await load(served, 2))[0] == 200
        assert (await complete(served, DialectName.CLASSIC, scripted(0)))[1] == "hello"
