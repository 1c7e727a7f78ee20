"""A runner that is several processes: it serves as one, and whatever becomes of one of them, none is left behind."""

import asyncio
import os
import random
import re
import shutil
import signal
import sys
from contextlib import aclosing, suppress
from pathlib import Path

import aiohttp
import psutil
import pytest

from models.checkpoint import open_checkpoint
from models.tokenizer import load_tokenizer
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from runner.parent import ChildError, free_port
from tests.runner.engine.serving import real_executor, run
from tests.runner.ranks.rig import ELSEWHERE, LOOPBACK, left, ranks_of, write_hostfile, write_ssh

pytestmark = pytest.mark.process

GREEDY = {"temperature": 0, "num_predict": 12}
ENDLESS = {"temperature": 0, "num_predict": -1, "num_ctx": 10_000_000}
FLAGS = ("--parallel=4", "--context=100000", "--prefill-chunk=32")
ABORTS = 200


async def answer(child, prompt, options=GREEDY):
    return "".join([piece.content async for piece in child.complete(prompt, options)])


@pytest.mark.parametrize("sharding", ["tensor", "pipeline"])
async def test_ranks_serve_as_one_listen_where_they_are_told_and_go_with_their_parent(
    spawn_runner, tiny_llama, tmp_path, sharding
):
    prompts = ("abcabcabcabc", "hello", "abcabcabcabcabc")
    env = {
        **os.environ,
        "OLLAMA_MLX_RUNNER_HOSTFILE": str(write_hostfile(tmp_path, envs=["RANK_SAYS=yes"])),
        "OLLAMA_MLX_RUNNER_SHARD": sharding,
    }
    async with spawn_runner(flags=("--draft=4",), env=env) as child:
        await child.wait_ready()
        (other,) = others = ranks_of(child)
        assert other.environ()["RANK_SAYS"] == "yes"
        alone = [await answer(child, prompt) for prompt in prompts]
        assert alone == expected(tiny_llama, prompts)
        assert await asyncio.gather(*(answer(child, prompt) for prompt in prompts)) == alone
        assert heard_at([psutil.Process(child.pid), other]) == {LOOPBACK}
        await be_turned_away(await child.said("ranks started"))
        assert await answer(child, "hello") == alone[1]
        child.process.send_signal(signal.SIGINT)
        assert await child.wait() == 0
    assert left(others) == []


def expected(model, prompts):
    """What an engine on one machine answers, one prompt after another."""
    tokenizer = load_tokenizer(open_checkpoint(str(model), model))
    executor = real_executor(model, "mlx")
    engine = TextEngine(executor, tokenizer, context_length=128, parallel=4, prefill_chunk=32)
    asked = SamplingParams(temperature=0)
    count = GREEDY["num_predict"]
    answers = [run(engine, TextRequest(prompt, asked, count))[0].text for prompt in prompts]
    engine.close()
    return answers


def heard_at(processes):
    """The addresses where they listen."""
    connections = [each for process in processes for each in process.net_connections("inet")]
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


async def be_turned_away(line):
    """Connect where ranks do, without the secret."""
    reader, writer = await asyncio.open_connection(LOOPBACK, int(line.rpartition(":")[2].split()[0]))
    writer.write(b'{"rank": 1, "purpose": "orders", "proof": "none", "nonce": "a"}\n')
    async with asyncio.timeout(60):
        await reader.read()
    writer.close()


async def test_two_hundred_who_leave_are_forgotten_by_all_ranks(spawn_runner, roomy_llama, tmp_path):
    flags = (*FLAGS, f"--hostfile={write_hostfile(tmp_path)}", "--cache-bytes=200000")
    async with spawn_runner(roomy_llama, flags=flags) as child:
        await child.wait_ready()
        undisturbed = await answer(child, "once upon a time")
        numbers = iter(range(ABORTS))

        async def visitor():
            for number in numbers:
                rng = random.Random(number)
                async with aclosing(child.complete(f"{number} " * rng.randrange(1, 30), ENDLESS)) as stream:
                    for _ in range(rng.choice((0, 1, 2))):
                        await anext(stream)

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(visitor())
        assert await answer(child, "once upon a time") == undisturbed


async def _dies(child, end):
    """While a request runs, let `end` happen to the other rank; the error line, the exit code and the last line."""
    await child.wait_ready()
    (other,) = ranks_of(child)
    stream = child.complete("hello", ENDLESS)
    await anext(stream)
    end(other)
    with pytest.raises(ChildError) as caught:
        async for _ in stream:
            pass
    code = await child.wait()
    with suppress(psutil.NoSuchProcess):
        other.resume()
    assert left([other]) == []
    return str(caught.value), code, child.last_words()


async def test_a_rank_that_dies_ends_requests_with_an_error_and_the_process_with_a_line(
    spawn_runner, roomy_llama, tmp_path
):
    flags = (*FLAGS, f"--hostfile={write_hostfile(tmp_path)}")
    async with spawn_runner(roomy_llama, flags=flags) as child:
        error, code, last = await _dies(child, lambda other: other.kill())
    assert "rank" in error
    assert code == 1
    assert re.fullmatch(r"Error: rank 1 on 127\.0\.0\.1 ended with exit code -9 .*; look at 127\.0\.0\.1, .*", last)


async def test_a_rank_that_hangs_does_the_same_ten_seconds_later(spawn_runner, roomy_llama, tmp_path):
    flags = (*FLAGS, f"--hostfile={write_hostfile(tmp_path)}")
    async with spawn_runner(roomy_llama, flags=flags) as child:
        error, code, last = await _dies(child, lambda other: other.suspend())
    assert "has not answered for 10 s" in error
    assert code == 1
    assert last.startswith("Error: rank 1 on 127.0.0.1 has not answered for 10 s; check that the machine is awake")


async def test_nobody_is_left_when_the_first_rank_is_killed(spawn_runner, roomy_llama, tmp_path):
    async with spawn_runner(roomy_llama, flags=(*FLAGS, f"--hostfile={write_hostfile(tmp_path)}")) as child:
        await child.wait_ready()
        others = ranks_of(child)
        stream = child.complete("hello", ENDLESS)
        await anext(stream)
        child.process.kill()
        assert await child.wait() == -signal.SIGKILL
        await stream.aclose()
    assert len(others) == 1
    assert left(others) == []


async def test_a_host_that_ssh_cannot_reach_is_named(spawn_runner, tmp_path):
    env = write_ssh(tmp_path, 'echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255')
    flags = (f"--hostfile={write_hostfile(tmp_path, [LOOPBACK, ELSEWHERE])}",)
    async with spawn_runner(flags=flags, env=env) as child:
        assert await child.wait() == 1
        last = child.last_words()
    assert "rank 1 on mac-b ended with exit code 255 (ssh: connect to host mac-b port 22: No route to host)" in last
    assert "check that `ssh mac-b` works without a password" in last


async def test_ranks_elsewhere_are_started_by_ssh_and_have_the_same_files(spawn_runner, tiny_llama, tmp_path):
    env = write_ssh(tmp_path, 'exec bash -c "$remote"')
    flags = (f"--hostfile={write_hostfile(tmp_path, [LOOPBACK, ELSEWHERE])}",)
    async with spawn_runner(flags=flags, env=env) as child:
        await child.wait_ready()
        assert await answer(child, "hello")
        others = ranks_of(child)
    assert left(others) == []


async def test_other_weights_on_a_host_are_found_at_load(spawn_runner, tiny_llama, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        shutil.copytree(tiny_llama, folder / "model")
    file = there / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-64:] = bytes(64)
    file.write_bytes(data)
    # What differs is where the rank finds the folder of that name.
    env = write_ssh(tmp_path, f'cd {there}; exec bash -c "${{remote#*; }}"')
    env["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), env.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "runner", "--mlx-engine", "--model=./model", f"--port={free_port()}"),
        f"--hostfile={write_hostfile(tmp_path, [LOOPBACK, ELSEWHERE])}",
        cwd=here,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    last = said.decode().splitlines()[-1]
    assert process.returncode == 1
    assert "rank 1 on mac-b: model has other weights there than on the first rank; copy the same files" in last


async def test_another_version_on_a_host_is_found_at_load(spawn_runner, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '0.0.1' if name == 'mlx' else real(name)\n"
    )
    env = write_ssh(tmp_path, f'PYTHONPATH={other}:$PYTHONPATH exec bash -c "$remote"')
    flags = (f"--hostfile={write_hostfile(tmp_path, [LOOPBACK, ELSEWHERE])}",)
    async with spawn_runner(flags=flags, env=env) as child:
        assert await child.wait() == 1
        last = child.last_words()
    assert "rank 1 on mac-b has" in last
    assert "mlx 0.0.1" in last
    assert "install the same versions on all hosts" in last


async def test_mlx_launch_starts_them_by_hand_as_well(tiny_llama):
    port = free_port()
    runner = [sys.executable, "-m", "runner", "runner", "--mlx-engine", f"--model={tiny_llama}", f"--port={port}"]
    launch = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", launch, "--backend=ring", "-n", "2", f"--starting-port={free_port()}", "--", *runner),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        process_group=0,
    )
    try:
        async with asyncio.timeout(60):
            while b"msg=listening" not in await process.stderr.readline():
                pass
            others = psutil.Process(process.pid).children(recursive=True)
            assert b'"Done":true' in await completion(port)
    finally:
        process.kill()
        await process.communicate()
    assert len(others) >= 2
    assert left(others) == []


async def completion(port):
    """What is answered there."""
    async with aiohttp.ClientSession() as session:
        url = f"http://{LOOPBACK}:{port}/v1/completions"
        async with session.post(url, json={"Prompt": "hello", "Options": {"num_predict": 2}}) as response:
            return await response.read()
