"""The real process: how it starts, refuses, is stopped in every phase, and what it leaves behind."""

import asyncio
import ctypes
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import aclosing, suppress
from pathlib import Path

import psutil
import pytest

from runner.config import DialectName
from runner.parent import ChildError, free_port

pytestmark = pytest.mark.process

ANY_DIALECT = pytest.mark.parametrize("dialect", list(DialectName), ids=lambda dialect: dialect.value)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANY_SIGNAL = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
LOADS_FIRST = pytest.mark.parametrize(
    "dialect", [DialectName.MLX, DialectName.IMAGEGEN], ids=lambda dialect: dialect.value
)
ENDLESS = {"temperature": 0, "num_predict": -1, "num_ctx": 10_000_000, "seed": 1}
LONG_PROMPT = "the quick brown fox " * 4000
GONE_S = 15.0
"""The process leaves after 3.7 s; a machine that has much else to do may be late to notice."""
CUT_OFF = "requests cut off by shutdown"
"""Told when running requests have had all of their grace."""


async def ready(child):
    """Wait until it is, loading in the classic dialect."""
    if child.dialect is DialectName.CLASSIC:
        await child.wait_answering()
        await child.load(context=4096)
    return await child.wait_ready()


async def consume(child, prompt, options):
    """Read a completion to its end, whatever that is."""
    with suppress(ChildError):
        async for _ in child.complete(prompt, options):
            pass


async def stopped(child, number):
    """Send the signal; the exit code and the seconds it took."""
    begin = time.perf_counter()
    child.process.send_signal(number)
    code = await child.wait()
    return code, time.perf_counter() - begin


def assert_quiet_end(child, code, seconds):
    assert code == 0
    assert seconds < GONE_S
    assert [line for line in child.lines if "Traceback" in line or "Error" in line] == []


async def fatal(child):
    """Wait for its death; the exit code and the last line."""
    async with asyncio.timeout(60):
        code = await child.wait()
    assert [line for line in child.lines if line.startswith("Error:")] == [child.lines[-1]]
    assert not any("Traceback" in line for line in child.lines)
    return code, child.lines[-1]


@ANY_DIALECT
async def test_a_taken_port_is_told_before_anything_else_is_done(spawn_runner, dialect):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with spawn_runner(dialect=dialect, port=port) as child:
            code, line = await fatal(child)
            assert code == 1
            assert line.startswith(f"Error: port {port} on 127.0.0.1 is taken; choose another --port or ")
            assert len(child.lines) == 1


async def test_a_foreign_address_is_refused(spawn_runner):
    async with spawn_runner(flags=["--host", "192.0.2.1"]) as child:
        code, line = await fatal(child)
    assert code == 1
    assert line == "Error: 192.0.2.1 is no address of this machine; --host is usually 127.0.0.1"


async def test_wrong_usage_exits_with_2_and_one_line(spawn_runner):
    async with spawn_runner(flags=["--nonsense"]) as child:
        assert await fatal(child) == (2, "Error: unknown flag --nonsense; --help lists the flags")


@LOADS_FIRST
async def test_a_missing_model_is_the_last_line(spawn_runner, tmp_path, dialect):
    async with spawn_runner("nobody/has-this", dialect=dialect, flags=["--store", str(tmp_path)]) as child:
        code, line = await fatal(child)
    assert code == 1
    assert "nobody/has-this" in line


async def test_a_parent_that_waits_for_a_dead_child_learns_its_last_line(spawn_runner, tmp_path):
    async with spawn_runner(tmp_path / "absent.gguf") as child:
        with pytest.raises(ChildError, match=r"exit code 1: Error: .*absent\.gguf"):
            await child.wait_ready()


async def test_an_unsupported_architecture_is_named_with_those_that_are(spawn_runner, roomy_llama):
    file = roomy_llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MambaForCausalLM"]}))
    async with spawn_runner(roomy_llama) as child:
        code, line = await fatal(child)
    assert code == 1
    assert "MambaForCausalLM" in line
    assert "LlamaForCausalLM" in line


def truncate(folder: Path) -> str:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return "model.safetensors"


def scribble(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    return "model.safetensors"


def break_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": [')
    return "config.json"


def break_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


def lose_a_tensor(folder: Path) -> str:
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw.replace(b"model.layers.1.mlp.up_proj.weight", b"model.layers.1.mlp.up_proj.wEight", 1))
    return "model.layers.1.mlp.up_proj.w"


@pytest.mark.parametrize("damage", [truncate, scribble, break_config, break_tokenizer, lose_a_tensor])
async def test_a_damaged_file_is_named_in_the_last_line(spawn_runner, roomy_llama, damage):
    culprit = damage(roomy_llama)
    async with spawn_runner(roomy_llama) as child:
        code, line = await fatal(child)
    assert code == 1
    assert culprit in line


def vast_checkpoint(folder: Path) -> None:
    """Half a terabyte in two tables, of which the disk holds nothing."""
    words = (1 << 31) - 1
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    tensors = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors.pop("__metadata__", None)
    end = 0
    for name, entry in tensors.items():
        if name in {"model.embed_tokens.weight", "lm_head.weight"}:
            entry["shape"][0] = words
        begin, end = end, end + 4 * math.prod(entry["shape"])
        entry["data_offsets"] = [begin, end]
    header = json.dumps(tensors).encode()
    with weights.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": words}))


@LOADS_FIRST
async def test_too_little_memory_is_predicted_with_figures_and_remedy(spawn_runner, roomy_llama, dialect):
    vast_checkpoint(roomy_llama)
    async with spawn_runner(roomy_llama, dialect=dialect) as child:
        code, line = await fatal(child)
    assert code == 1
    assert re.match(r"Error: insufficient memory: \S+ needs \d+\.\d GiB \(weights 512\.0, ", line)
    assert "--check-memory=false" in line


async def test_the_prediction_can_be_overridden(spawn_runner, roomy_llama):
    context = ["--context", "1000000", "--parallel", "400"]
    async with spawn_runner(roomy_llama, flags=context) as child:
        code, line = await fatal(child)
        assert code == 1
        assert "insufficient memory" in line
    async with spawn_runner(roomy_llama, flags=[*context, "--check-memory=false"]) as child:
        health = await child.wait_ready()
        assert health["ContextLength"] == 1_000_000
        assert await child.said("loading all the same")


async def test_every_form_of_the_flags_reaches_the_process(tiny_llama, tmp_path):
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "--mlx-engine", f"-model={tiny_llama}", f"--port={port}", "-verbose"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    seen = b""
    while b"msg=listening" not in seen:
        line = await process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    _, rest = await process.communicate()
    assert process.returncode == 0
    assert f"port={port}".encode() in seen + rest


@pytest.mark.parametrize(("level", "shown"), [("2", True), ("true", True), ("0", False)])
async def test_ollama_debug_shows_debug_lines(spawn_runner, level, shown):
    async with spawn_runner(env=os.environ | {"OLLAMA_DEBUG": level}) as child:
        await child.wait_ready()
        await child.stop()
        assert any("level=DEBUG" in line for line in child.lines) is shown


@LOADS_FIRST
async def test_nobody_is_answered_before_the_model_is_loaded(spawn_runner, dialect):
    async with spawn_runner(dialect=dialect) as child:
        refused = 0
        async with asyncio.timeout(60):
            while (health := await child.health()) is None:
                assert child.process.returncode is None
                refused += 1
        assert refused > 0
        assert health in ({"status": "ok"}, health | {"Status": 0, "Progress": 100})


async def test_a_classic_runner_answers_at_once_and_loads_when_told(spawn_runner):
    async with spawn_runner(dialect=DialectName.CLASSIC) as child:
        assert (await child.wait_answering())["status"] == 2
        assert not any("memory plan" in line for line in child.lines)
        await child.load(context=128)
        assert (await child.wait_ready())["status"] == 0


async def test_a_failed_load_ends_a_classic_runner_with_the_reason(spawn_runner, roomy_llama):
    break_tokenizer(roomy_llama)
    async with spawn_runner(roomy_llama, dialect=DialectName.CLASSIC) as child:
        await child.wait_answering()
        await child.load(context=128)
        assert await child.wait() == 1
        assert re.search(r"^Error: .*tokenizer\.json", child.last_words())


async def test_a_checkpoint_that_lacks_a_tensor_is_refused_in_the_answer_to_a_load(spawn_runner, roomy_llama):
    lose_a_tensor(roomy_llama)
    async with spawn_runner(roomy_llama, dialect=DialectName.CLASSIC) as child:
        await child.wait_answering()
        with pytest.raises(ChildError, match=r"model\.safetensors.*up_proj"):
            await child.load(context=128)


@ANY_DIALECT
async def test_a_signal_while_idle_ends_it(spawn_runner, dialect):
    async with spawn_runner(dialect=dialect) as child:
        await ready(child)
        code, seconds = await stopped(child, signal.SIGINT)
        assert_quiet_end(child, code, seconds)
        assert not any(CUT_OFF in line for line in child.lines), "there was nobody to wait for"


@pytest.mark.parametrize(
    ("model", "line", "number"),
    [
        ("tiny_pipeline", "BLAS prepared", SIGNALS[0]),
        ("tiny_llama", "memory plan", SIGNALS[0]),
        ("tiny_llama", "memory plan", SIGNALS[1]),
        ("tiny_llama", "prefix cache", SIGNALS[0]),
    ],
)
async def test_a_signal_at_any_moment_of_the_start_ends_it(spawn_runner, request, model, line, number):
    async with spawn_runner(request.getfixturevalue(model)) as child:
        await child.said(line)
        assert_quiet_end(child, *await stopped(child, number))


@ANY_SIGNAL
async def test_a_signal_in_a_long_load_ends_it(spawn_runner, default_model, number):
    async with spawn_runner(default_model) as child:
        await child.said("memory plan")
        assert_quiet_end(child, *await stopped(child, number))
        assert not any("model loaded" in line for line in child.lines)


@pytest.mark.parametrize(("dialect", "number"), list(zip(DialectName, [*SIGNALS, SIGNALS[0]], strict=True)), ids=str)
async def test_a_signal_in_prefill_ends_it(spawn_runner, roomy_llama, dialect, number):
    async with spawn_runner(roomy_llama, dialect=dialect, flags=["--context=200000"]) as child:
        if dialect is DialectName.CLASSIC:
            await child.wait_answering()
            await child.load(context=200000)
        await child.wait_ready()
        reading = asyncio.create_task(consume(child, LONG_PROMPT, ENDLESS))
        await busy(child)
        assert_quiet_end(child, *await stopped(child, number))
        await reading


async def test_a_signal_in_decode_ends_it_and_the_stream(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama) as child:
        await child.wait_ready()
        async with aclosing(child.complete("hello", ENDLESS)) as pieces:
            await anext(pieces)
            ending = asyncio.create_task(stopped(child, signal.SIGTERM))
            with pytest.raises(ChildError, match="shutting down"):
                async for _ in pieces:
                    pass
        assert_quiet_end(child, *await ending)


async def test_a_second_signal_ends_it_at_once(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama) as child:
        await child.wait_ready()
        reading = asyncio.create_task(consume(child, "hello", ENDLESS))
        await busy(child)
        child.process.send_signal(signal.SIGINT)
        await child.said("msg=stopping")
        code, _ = await stopped(child, signal.SIGINT)
        assert code == 0
        assert not any(CUT_OFF in line for line in child.lines), "the grace was waited for"
        await reading


async def busy(child):
    """Wait until the child computes: it has used processor time that no idling explains."""
    process = psutil.Process(child.pid)
    begin = sum(process.cpu_times()[:2])
    while sum(process.cpu_times()[:2]) < begin + 0.3:
        assert await child.health() is not None


async def test_health_is_answered_in_milliseconds_while_a_long_prefill_runs(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama, flags=["--context=200000"]) as child:
        await child.wait_ready()
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(consume(child, LONG_PROMPT, ENDLESS))
            await busy(child)
            times = []
            for _ in range(50):
                begin = time.perf_counter()
                assert await child.health() is not None
                times.append(time.perf_counter() - begin)
            assert not reading.done()
            reading.cancel()
    # Where much else runs, many answers wait for a core; none of the quick ones waited for a step.
    assert sorted(times)[5] < 0.05


async def test_a_closed_connection_cancels_and_the_next_request_is_served(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama, flags=["--parallel=1", "--context=200000"]) as child:
        await child.wait_ready()
        async with aclosing(child.complete("hello", ENDLESS)) as pieces:
            await anext(pieces)
        await child.said("completion cancelled")
        reading = asyncio.create_task(consume(child, LONG_PROMPT, ENDLESS))
        await busy(child)
        reading.cancel()
        # There is one place, and its holder had no end.
        async for piece in child.complete("hello", {"temperature": 0, "num_predict": 3, "num_ctx": 128}):
            last = piece
        assert last.eval_tokens == 3


async def test_nothing_is_left_in_the_temporary_folder(spawn_runner, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    async with spawn_runner(env=os.environ | {"TMPDIR": str(folder)}) as child:
        await child.wait_ready()
        async for _ in child.complete("hello", {"num_predict": 3}):
            pass
        assert await child.stop() == 0
    assert list(folder.iterdir()) == []


ORPHAN_PARENT = """
import subprocess, sys
command = [sys.executable, "-m", "runner", *sys.argv[2:]]
quiet = subprocess.DEVNULL
child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE)
while sys.argv[1].encode() not in (line := child.stderr.readline()):
    if not line:
        sys.exit("it died")
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def adopt_orphans():
    """Become the parent of orphaned grandchildren, so that their end can be awaited."""
    set_child_subreaper = 36
    libc = ctypes.CDLL(None)
    libc.prctl(set_child_subreaper, 1)
    yield
    libc.prctl(set_child_subreaper, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl, to become the parent of orphans")
@pytest.mark.parametrize("phase", ["memory plan", "listening"])
async def test_a_killed_parent_takes_the_runner_with_it(tiny_llama, adopt_orphans, phase):
    flags = ["--mlx-engine", "--model", str(tiny_llama), "--port", str(free_port())]
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ORPHAN_PARENT, phase, *flags), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    end = asyncio.create_task(asyncio.to_thread(os.waitpid, pid, 0))
    done, _ = await asyncio.wait([end], timeout=60)
    if not done:
        os.kill(pid, signal.SIGKILL)
    _, status = await end
    assert os.waitstatus_to_exitcode(status) == 0


async def test_a_parent_that_died_before_it_could_be_noticed_is_known_by_its_pipe(tiny_llama):
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "--mlx-engine", "--model", str(tiny_llama)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=write_end,
    )
    os.close(read_end)
    os.close(write_end)
    try:
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_parent_that_closes_stdin_is_taken_for_dead(tiny_llama):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "--mlx-engine", "--model", str(tiny_llama)),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    assert process.stdin is not None
    while b"msg=listening" not in (line := await process.stderr.readline()):
        assert line
    process.stdin.write(b"what is said there is ignored\n")
    await process.stdin.drain()
    process.stdin.close()
    async with asyncio.timeout(60):
        _, rest = await process.communicate()
    assert process.returncode == 0
    assert b"closed stdin" in rest


async def test_a_runner_without_any_stdin_serves_all_the_same(tiny_llama):
    port = free_port()
    command = f'exec "$0" -m runner --mlx-engine --model "$1" --port {port} <&-'
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command, sys.executable, str(tiny_llama)), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    while b"msg=listening" not in (line := await process.stderr.readline()):
        assert line
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()
    process.send_signal(signal.SIGTERM)
    _, rest = await process.communicate()
    assert process.returncode == 0
    assert b"ERROR" not in rest
