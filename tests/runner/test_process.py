"""The real process: how it starts, refuses and serves, and what it leaves behind."""

import asyncio
import json
import math
import os
import re
import signal
import socket
import struct
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from runner.config import DialectName
from runner.parent import ChildError, free_port
from tests.runner.child import ANY_DIALECT, ENDLESS, LONG_PROMPT, busy, consume

pytestmark = pytest.mark.process

LOADS_FIRST = pytest.mark.parametrize(
    "dialect", [DialectName.MLX, DialectName.IMAGEGEN], ids=lambda dialect: dialect.value
)


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
