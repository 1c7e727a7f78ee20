import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.device import Device
from models.errors import CheckpointError, ModelNotFoundError
from protocol.ollamarunner import LoadRequest
from runner.config import DialectName
from runner.dialects.ollamarunner import MAX_LINE, devices, load_options, memory_table
from runner.engine.load import DeviceMemory, LoadOptions
from runner.engine.types import EngineState, EngineStatus, Failed, TextRequest, TokenLogprob
from runner.errors import GenerationError, InsufficientMemory
from tests.fakes_wire import DONE, GIB, ScriptedLoader, ScriptedLoop, chunk, serve

CLASSIC = DialectName.CLASSIC
FIT, ALLOC, COMMIT, CLOSE = range(4)
TABLE = {
    "InputWeights": 5,
    "CPU": {"id": "", "Name": "CPU", "Weights": [10, 11, 12], "Cache": [20, 21, 0], "Graph": 30},
    "GPUs": None,
}


def launched():
    return ScriptedLoop(status=EngineStatus())


async def load(served, operation, **fields):
    status, body = await served.post("/load", json={"Operation": operation, "Parallel": 2, "KvSize": 8192, **fields})
    return status, json.loads(body) if status == 200 else body.decode()


async def health(served):
    status, body = await served.get("/health")
    assert status == 200
    return json.loads(body)


async def ready(served):
    """Wait until the scripted load is over."""
    while (await health(served))["status"] == 3:
        pass


def lines(body):
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("operation", [FIT, ALLOC])
async def test_fit_and_alloc_answer_the_table_and_load_nothing(operation):
    async with serve(CLASSIC, launched()) as served:
        assert await load(served, operation, BatchSize=512) == (200, {"Success": True, "Memory": TABLE})
        assert served.loader.planned == [("the-model", LoadOptions(2, 4096, 512))]
        assert served.loader.built == 0
        assert await health(served) == {"status": 2, "progress": 0.0}


async def test_commit_loads_in_the_background_and_health_counts():
    async with serve(CLASSIC, launched()) as served:
        assert await load(served, COMMIT) == (200, {"Success": True, "Memory": TABLE})
        assert (await health(served))["status"] == 3
        await asyncio.sleep(0)
        assert await health(served) == {"status": 3, "progress": 0.5}
        served.loop.may_load.set()
        await ready(served)
        assert (await health(served))["status"] == 0
        assert (await served.post("/completion", json={"Prompt": "p"}))[0] == 200


@pytest.mark.parametrize("operation", [FIT, ALLOC, COMMIT])
async def test_a_second_load_is_refused_while_loading_and_when_loaded(operation):
    async with serve(CLASSIC, launched()) as served:
        await load(served, COMMIT)
        assert await load(served, operation) == (500, "model already loaded\n")
        served.loop.may_load.set()
        await ready(served)
        assert await load(served, operation) == (500, "model already loaded\n")


async def test_two_commits_at_once_load_once():
    async with serve(CLASSIC, launched()) as served:
        answers = await asyncio.gather(load(served, COMMIT), load(served, COMMIT))
        assert sorted(status for status, _ in answers) == [200, 500]
        assert served.loader.built == 1


@pytest.mark.parametrize("finish", [True, False])
async def test_close_frees_everything_and_a_later_load_works(finish):
    async with serve(CLASSIC, launched()) as served:
        await load(served, COMMIT)
        if finish:
            served.loop.may_load.set()
            await ready(served)
        status, answer = await load(served, CLOSE)
        assert (status, answer["Success"]) == (200, False)
        assert (await health(served))["status"] == 2
        served.loop.may_load.set()
        assert (await load(served, COMMIT))[0] == 200
        await ready(served)
        assert (await health(served))["status"] == 0


async def test_close_without_a_model_is_fine():
    async with serve(CLASSIC, launched()) as served:
        status, answer = await load(served, CLOSE)
        assert status == 200
        assert answer["Memory"]["CPU"]["Weights"] is None


@pytest.mark.parametrize("operation", [FIT, ALLOC, COMMIT])
async def test_too_little_memory_is_no_success_but_the_table(operation):
    loader = ScriptedLoader()
    loader.shrink()
    async with serve(CLASSIC, launched(), loader) as served:
        assert await load(served, operation) == (200, {"Success": False, "Memory": TABLE})
        assert (await health(served))["status"] == 2


async def test_memory_that_vanishes_between_plan_and_build_is_no_success():
    class Vanishing(ScriptedLoader):
        def builder(self, reference, options):
            raise InsufficientMemory("insufficient memory")

    async with serve(CLASSIC, launched(), Vanishing()) as served:
        assert (await load(served, COMMIT))[1]["Success"] is False
        assert (await health(served))["status"] == 2


async def test_the_memory_check_can_be_switched_off():
    loader = ScriptedLoader()
    loader.shrink()
    async with serve(CLASSIC, launched(), loader, check_memory=False) as served:
        assert (await load(served, COMMIT))[1]["Success"] is True
        assert served.loader.built == 1


async def test_a_failed_load_is_status_5_with_its_reason_and_another_may_follow():
    loop = launched()
    loop.load_failure = CheckpointError("truncated", file="a.gguf")
    async with serve(CLASSIC, loop) as served:
        await load(served, COMMIT)
        waiting = asyncio.create_task(served.post("/completion", json={"Prompt": "p"}))
        loop.may_load.set()
        assert await waiting == (500, b"a.gguf: truncated\n")
        assert await health(served) == {"status": 5, "progress": 0.0, "error": "a.gguf: truncated"}
        loop.load_failure = None
        assert (await load(served, COMMIT))[0] == 200


async def test_a_completion_during_the_load_waits_for_it():
    async with serve(CLASSIC, launched()) as served:
        await load(served, COMMIT)
        waiting = asyncio.create_task(served.post("/completion", json={"Prompt": "p"}))
        assert (await health(served))["status"] == 3
        assert not waiting.done()
        served.loop.may_load.set()
        assert (await waiting)[0] == 200


async def test_a_completion_without_a_load_is_not_ready():
    async with serve(CLASSIC, launched()) as served:
        assert (await served.post("/completion", json={"Prompt": "p"}))[0] == 503


@pytest.mark.parametrize(
    ("failure", "status"),
    [(ModelNotFoundError("no model x"), 404), (CheckpointError("truncated", file="a.gguf"), 500)],
)
async def test_a_model_that_cannot_be_planned_is_an_error_with_its_reason(failure, status):
    async with serve(CLASSIC, launched(), ScriptedLoader(failure=failure)) as served:
        assert await load(served, FIT) == (status, f"{failure}\n")


async def test_loading_without_a_model_says_what_to_do():
    async with serve(CLASSIC, launched(), model=None) as served:
        status, reason = await load(served, FIT)
        assert status == 500
        assert "--model" in reason


@pytest.mark.parametrize(
    ("field", "value"),
    [("LoraPath", ["a.gguf"]), ("KvCacheType", "q5_1")],
)
async def test_what_a_load_cannot_honour_is_refused_by_name(field, value):
    async with serve(CLASSIC, launched()) as served:
        status, reason = await load(served, COMMIT, **{field: value})
        assert status == 501
        assert field in reason


@pytest.mark.parametrize(
    ("field", "value"), [("Parallel", -1), ("KvSize", -1), ("BatchSize", -1), ("KvSize", 1), ("Operation", 4)]
)
async def test_impossible_sizes_and_operations_are_bad_requests(field, value):
    async with serve(CLASSIC, launched()) as served:
        assert (
            await load(
                served, **{"operation": FIT, **({"operation": value} if field == "Operation" else {field: value})}
            )
        )[0] == 400


def test_absent_sizes_are_the_runners_choice():
    assert load_options(LoadRequest()) == LoadOptions(parallel=1, context_per_row=None, batch_tokens=None)


def test_a_projector_is_loaded_with_the_model():
    asked = LoadOptions(parallel=1, context_per_row=None, batch_tokens=None, projector=Path("p.gguf"))
    assert load_options(LoadRequest(projector_path="p.gguf")) == asked


def test_hints_and_f16_are_accepted():
    body = LoadRequest(
        flash_attention=1,
        num_threads=4,
        multi_user_cache=True,
        main_gpu=1,
        use_mmap=True,
        kv_cache_type="f16",
        parallel=1,
    )
    assert load_options(body) == LoadOptions(parallel=1, context_per_row=None, batch_tokens=None, cache_type="f16")


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_a_quantised_cache_is_the_parents_choice(cache_type):
    assert load_options(LoadRequest(kv_cache_type=cache_type)).cache_type == cache_type
    assert load_options(LoadRequest()).cache_type is None


def test_a_gpus_table_has_its_own_column_and_lists_of_one_length():
    plan = replace(ScriptedLoader().memory, device=DeviceMemory("0", "metal", "Apple M2", (10, 11, 12), (20, 21), 30))
    assert memory_table(plan).to_value() == {
        "InputWeights": 5,
        "CPU": {"id": "", "Name": "CPU", "Weights": [0, 0, 0], "Cache": [0, 0, 0], "Graph": 0},
        "GPUs": [
            {
                "id": "0",
                "backend": "Metal",
                "Name": "Apple M2",
                "Weights": [10, 11, 12],
                "Cache": [20, 21, 0],
                "Graph": 30,
            }
        ],
    }


def test_a_gpu_is_a_device_under_the_id_of_its_memory_table():
    (gpu,) = devices(Device("metal", "Apple M2", 16 * GIB, 8 * GIB))
    assert gpu.to_value() == {
        "id": "0",
        "backend": "Metal",
        "name": "Apple M2",
        "description": "Apple M2",
        "integration": True,
        "total_memory": 16 * GIB,
        "free_memory": 8 * GIB,
        "ComputeMajor": 0,
        "ComputeMinor": 0,
        "LibraryPath": None,
    }


def test_a_cpu_is_no_device_to_plan_for():
    assert devices(Device("cpu", "A CPU", GIB, GIB)) == ()


async def test_info_is_a_list():
    async with serve(CLASSIC, launched()) as served:
        status, body = await served.get("/info")
        assert status == 200
        assert isinstance(json.loads(body), list)


async def test_text_is_streamed_line_by_line():
    async with serve(CLASSIC) as served, served.client.post("/completion", json={"Prompt": "p"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        zero = {
            "done_reason": 0,
            "done": False,
            "prompt_eval_count": 0,
            "prompt_eval_duration": 0,
            "eval_count": 0,
            "eval_duration": 0,
        }
        first, second, last = lines(await response.read())
        assert first == {"content": "Hel", **zero}
        assert second == {"content": "lo", **zero}
        # The stop token counts here.
        counts = {"prompt_eval_count": 7, "prompt_eval_duration": 11, "eval_count": 4, "eval_duration": 13}
        assert last == {"content": "", "done_reason": 0, "done": True, **counts}


async def test_log_probabilities_wait_for_content():
    held, own = TokenLogprob("\ufffd", -1.0), TokenLogprob("é", -0.5)

    async def script(request):
        yield chunk("", [held])
        yield chunk("é", [own])
        yield chunk("", [held])
        yield DONE

    async with serve(CLASSIC, ScriptedLoop(script)) as served:
        first, last = lines((await served.post("/completion", json={"Prompt": "p", "Logprobs": True}))[1])
        assert (first["content"], [entry["token"] for entry in first["logprobs"]]) == ("é", ["\ufffd", "é"])
        assert last["done"] is True
        assert [entry["token"] for entry in last["logprobs"]] == ["\ufffd"]


async def test_no_line_is_longer_than_the_parents_buffer():
    async def script(request):
        yield chunk("\x01" * 400_000)
        yield DONE

    async with serve(CLASSIC, ScriptedLoop(script)) as served:
        body = (await served.post("/completion", json={"Prompt": "p"}))[1]
        assert all(len(line) < MAX_LINE for line in body.splitlines())
        assert "".join(line["content"] for line in lines(body)) == "\x01" * 400_000


async def test_a_failure_after_the_first_line_is_a_line_that_no_parent_takes_for_an_answer():
    async def script(request):
        yield chunk("a")
        yield Failed(1, GenerationError("the step failed"))

    async with serve(CLASSIC, ScriptedLoop(script)) as served:
        last = lines((await served.post("/completion", json={"Prompt": "p"}))[1])[-1]
        assert last == {"error": "the step failed", "done": "error"}


async def test_shift_and_truncate_and_the_requests_seed_are_passed_on():
    async with serve(CLASSIC) as served:
        await served.post("/completion", json={"Prompt": "p", "Shift": True, "Truncate": True, "seed": 9})
        (wanted,) = served.loop.requests
        assert (wanted.shift, wanted.truncate, wanted.sampling.seed) == (True, True, 9)


async def test_a_person_without_options_gets_ollamas_defaults():
    async with serve(CLASSIC) as served:
        await served.post("/completion", json={"prompt": "p"})
        assert served.loop.requests == [TextRequest(prompt="p")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 64),
        ("height", 64),
        ("steps", 3),
    ],
)
async def test_what_a_completion_cannot_honour_is_refused_by_name(field, value):
    async with serve(CLASSIC) as served:
        status, body = await served.post("/completion", json={"Prompt": "p", field: value})
        assert status == 501
        assert field in body.decode()


async def test_stopping_during_a_load_leaves_no_task_behind():
    async with serve(CLASSIC, launched()) as served:
        await load(served, COMMIT)
        assert served.loop.status.state in (EngineState.LAUNCHED, EngineState.LOADING)
    assert not [task for task in asyncio.all_tasks() if "ScriptedLoop.load" in repr(task.get_coro())]
