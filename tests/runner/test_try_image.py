"""`try --image` as a person runs it, on a tiny random pipeline."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.config import TryImageConfig, parse
from runner.flags import UsageError
from runner.image_flags import PictureFlags
from runner.try_image import Figures, demonstration_model, file_of, wanted
from tests.runner.test_try_command import run_command

FIGURES = re.compile(
    r"load \d+\.\d\d s \| prompt \d+\.\d\d s \| \d+ steps \d+\.\d\d s \(\d+\.\d{3} s a step\) \| "
    r"decode \d+\.\d\d s \| in all \d+\.\d\d s( \| peak memory \d+ MiB)?"
)
HOME = {"HOME": "/home/somebody"}


def config_of(line: str) -> TryImageConfig:
    config = parse(["try", "--image", *line.split(), "a hen"], HOME)
    assert isinstance(config, TryImageConfig)
    return config


@pytest.fixture(scope="session")
def klein(parity: Path) -> Path:
    """A FLUX.2 klein of a few thousand weights."""
    return parity.parent / "parity_image" / "flux2_klein"


@pytest.mark.process
async def test_a_picture_is_written_and_the_figures_told(klein, tmp_path):
    file = tmp_path / "hen.png"
    flags = ("--width", 64, "--height", 48, "--steps", 2, "--seed", 7, "-o", file)
    code, out, err = await run_command("try", "--image", "--model", klein, *flags, "a hen")
    assert code == 0, err
    assert out == f"{file} (seed 7)\n"
    loading, drawing, figures = err.splitlines()
    assert re.fullmatch(r"loading flux2_klein \[#+\] 100% in \d+\.\d s", loading)
    assert re.fullmatch(r"drawing \[#+\] 100% in \d+\.\d s", drawing)
    assert FIGURES.fullmatch(figures)
    assert "| 2 steps " in figures
    image = Image.open(file)
    assert (image.size, image.text["prompt"], image.text["seed"]) == ((64, 48), "a hen", "7")
    assert image.text["model"] == "flux2_klein"


@pytest.mark.process
async def test_the_demonstration_model_draws_what_it_is_told(tmp_path):
    for text, shape, ground in (
        ("a red circle on a white background", (222, 36, 40), (250, 250, 250)),
        ("a blue square on a black background", (36, 84, 220), (16, 16, 16)),
    ):
        code, _, err = await run_command("try", "--image", text, "--seed=7", "-o", tmp_path / "x.png")
        assert code == 0, err
        drawn = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        middle, corner = drawn[28:36, 28:36].mean((0, 1)), drawn[:4, :4].mean((0, 1))
        assert np.abs(middle - shape).max() < 60
        assert np.abs(corner - ground).max() < 60


@pytest.mark.process
async def test_pictures_can_be_edited_and_several_be_made(klein, tmp_path):
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (80, 64), colour).save(tmp_path / name)
    inputs = ("--input-image", tmp_path / "a.png", "--input-image", tmp_path / "b.jpg")
    arguments = ("--model", klein, "--steps=1", "--seed=3", "--n=2", "-o", tmp_path / "out.webp", *inputs)
    code, out, err = await run_command("try", "--image", "both", *arguments)
    assert code == 0, err
    assert out.splitlines() == [f"{tmp_path}/out-1.webp (seed 3)", f"{tmp_path}/out-2.webp (seed 4)"]
    first, second = (Image.open(tmp_path / f"out-{number}.webp") for number in (1, 2))
    assert first.format == "WEBP"
    assert first.size == second.size == (80, 64)
    assert not np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.process
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--guidance=4",), "guidance 4 cannot be honoured"),
        (("--strength=0.5",), "strength cannot be honoured"),
        (("--input-image", "{text}"), "images[0] is not a picture"),
        (("--input-image", "{absent}"), "absent: No such file or directory"),
        (("--width=4096", "--height=4096"), "width and height are too large"),
        (("--model", "nobody/has-this"), "nobody/has-this"),
    ],
)
async def test_what_fails_is_one_line_with_its_reason(klein, tmp_path, flags, words):
    (tmp_path / "text").write_text("hello")
    flags = [flag.format(text=tmp_path / "text", absent=tmp_path / "absent") for flag in flags]
    arguments = ("--store", tmp_path, "--model", klein, "-o", tmp_path / "x.png", *flags)
    code, out, err = await run_command("try", "--image", "a hen", *arguments)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last
    assert "Traceback" not in err
    assert not (tmp_path / "x.png").exists()


def test_what_is_left_open_is_left_to_the_pipeline():
    config = config_of("")
    assert config.picture == PictureFlags(Path("image.png"), "png")
    assert config.model is None
    assert wanted(config.prompt, config.picture) == {"prompt": "a hen", "format": "png"}


def test_every_flag_reaches_the_request(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    config = config_of(
        f"--model=m -o {tmp_path}/x.jpg --width=64 --height=32 --steps=3 --seed=7 --guidance=2.5 "
        f"--negative-prompt=blur --strength=0.5 --input-image={tmp_path}/a.png --input-image={tmp_path}/b.png "
        "--n=2 --step-cache=0.1 --threads=2 --lora=l.safetensors"
    )
    assert config.model == "m"
    assert config.runner_flags == ("--threads=2", "--lora=l.safetensors")
    assert wanted(config.prompt, config.picture) == {
        "prompt": "a hen", "width": 64, "height": 32, "steps": 3, "seed": 7, "guidance": 2.5,
        "negative_prompt": "blur", "strength": 0.5, "format": "jpeg", "n": 2, "step_cache": 0.1,
        "images": [base64.b64encode(data).decode() for data in (b"a", b"b")],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "format_"),
    [
        ("-o x.png", "png"),
        ("-o x.JPG", "jpeg"),
        ("-o x.webp", "webp"),
        ("-o x", "png"),
        ("-o x.png --format=webp", "webp"),
    ],
)
def test_the_format_is_the_files_own_unless_it_is_named(line, format_):
    assert config_of(line).picture.format == format_


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--width=0", "--width must be at least 1"),
        ("--height=5000", "--height must be at most 4096"),
        ("--seed=0", "--seed must be at least 1"),
        ("--guidance=x", "--guidance must be a number"),
        ("--format=tiff", "--format must be one of png, jpeg, webp"),
        ("-o /nowhere/at/all/x.png", "there is no folder /nowhere/at/all"),
        ("--system=x", "unknown flag --system"),
    ],
)
def test_impossible_flags_are_refused_before_anything_is_loaded(line, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        config_of(line)


def test_a_prompt_is_needed():
    with pytest.raises(UsageError, match="try --image needs a prompt"):
        parse(["try", "--image"], HOME)


def test_a_picture_that_came_in_another_format_is_named_for_what_it_is():
    one, several = PictureFlags(Path("a/b.png"), "png"), PictureFlags(Path("a/b.png"), "png", count=3)
    assert [file_of(one, 0, "png"), file_of(one, 0, "jpeg")] == [Path("a/b.png"), Path("a/b.jpeg")]
    assert [file_of(several, 0, "png"), file_of(several, 2, "jpeg")] == [Path("a/b-1.png"), Path("a/b-3.jpeg")]
    assert file_of(PictureFlags(Path("b"), "png"), 0, "png") == Path("b")


def test_figures_without_steps_or_a_peak_are_still_a_line():
    assert Figures(load_s=1).line() == "load 1.00 s | prompt 0.00 s | 0 steps 0.00 s | decode 0.00 s | in all 0.00 s"


def test_a_demonstration_model_that_is_missing_is_named(monkeypatch, tmp_path):
    from runner.errors import StartupError

    monkeypatch.setattr("models.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(StartupError, match=r"name another: --model NAME"):
        demonstration_model()
    (tmp_path / "image" / "shapes").mkdir(parents=True)
    (tmp_path / "image" / "shapes" / "model_index.json").write_text("{}")
    assert demonstration_model() == tmp_path / "image" / "shapes"


def test_a_terminal_sees_the_step(capsys, monkeypatch):
    from runner.progress_bar import ProgressBar

    monkeypatch.setattr("sys.stderr", io.StringIO())
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ProgressBar("drawing").show(1 / 3, "3/9")
    assert sys.stderr.getvalue() == "\rdrawing [" + "#" * 10 + "-" * 20 + "] 3/9"
