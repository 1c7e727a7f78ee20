"""What importing costs and what it drags in."""

import subprocess
import sys
from pathlib import Path

import pytest

PARITY = Path(__file__).parents[1] / "parity"

# A child for each module, out of a parent that has imported nothing of ours: as good as a fresh interpreter. What takes
# long to import and is not ours is there already, but for what we import late on purpose.
EACH_FIRST = """
import os, sys, traceback, types
from pathlib import Path
import importlib

root, package, *heavy = sys.argv[1:]
for name in heavy:
    importlib.import_module(name)
for file in sorted(Path(root, package).rglob("*.py")):
    parts = file.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    failed = os.waitpid(child, 0)[1]
    print("failed" if failed else "fine", name, flush=True)
"""
HEAVY = (
    "numpy",
    "ml_dtypes",
    "gguf",
    "mlx.core",
    "mlx.nn",
    "PIL.Image",
    "psutil",
    "tokenizers",
    "jinja2",
    "onnxruntime",
    "safetensors",
)
HEAVIER = (*HEAVY, "aiohttp.web", "pydantic")


LONGEST_S = 280
"""Some hundred children take 40 s on a quiet core, and there are cores with other things to do."""


def in_a_process(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="there is no fork")
@pytest.mark.parametrize(("package", "heavy"), [("models", HEAVY), ("runner", HEAVIER), ("protocol", HEAVIER)])
def test_every_module_can_be_imported_first(package: str, heavy: tuple[str, ...]):
    root = PARITY.parents[1]
    done = in_a_process(EACH_FIRST, str(root), package, *heavy)
    said = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(said) == len(list((root / package).rglob("*.py")))
    assert [name for word, name in said if word == "failed"] == [], done.stderr


LOADED = """
import sys
from pathlib import Path
from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, load

checkpoint = open_checkpoint(sys.argv[1], Path("/no-store"))
model = build_model(checkpoint.config)
executor = OnnxExecutor(load(checkpoint, model, OnnxOptions(capacity=64)), model.config.vocab_size)
assert executor.forward(Step((Row(0, 0, (1, 2, 3)),))).read().shape == (1, model.config.vocab_size)
print(sorted({name.split(".")[0] for name in sys.modules} & {"mlx", "torch", "aiohttp", "pydantic"}))
"""


@pytest.mark.parametrize("checkpoint", ["llama_gqa", "qwen2.gguf", "llama_gqa-Q4_0.gguf"])
def test_a_language_model_is_loaded_and_run_on_a_cpu_without_mlx(checkpoint: str):
    done = in_a_process(LOADED, str(PARITY / checkpoint))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
