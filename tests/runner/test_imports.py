"""What the runner's own modules drag in: arrays are the executors' business."""

import subprocess
import sys
from pathlib import Path

import pytest

ARRAY_LIBRARIES = {"mlx", "onnx", "onnxruntime", "torch"}
ENGINE = (
    "admission",
    "batch",
    "disk_cache",
    "drafting",
    "executor_thread",
    "executors",
    "load",
    "load_text",
    "loop",
    "prefix_cache",
    "preparation",
    "radix_tree",
    "reporting",
    "scheduler",
    "sequence",
    "step_times",
    "stop",
    "text",
    "types",
)

FOUND = """
import sys
print(*{name.partition(".")[0] for name in sys.modules})
"""

SERVED = """
import sys
from pathlib import Path
from runner.config import DialectName, RunnerConfig
from runner.engine.load import LoadOptions, ModelLoader
from runner.engine.types import TextRequest

config = RunnerConfig(DialectName.MLX, None, 0, Path("/no-store"), executor=sys.argv[2])
engine = ModelLoader(config).builder(sys.argv[1], LoadOptions(2, None, None))(lambda _: None)
engine.add(1, engine.prepare(TextRequest("hello", num_predict=3)))
while not engine.idle:
    engine.step()
    engine.proceed()
engine.close()
"""


def libraries_after(script: str, *arguments: str) -> set[str]:
    """The array libraries that a fresh process has imported when it has run the script."""
    command = [sys.executable, "-c", script + FOUND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return ARRAY_LIBRARIES & set(done.stdout.split())


@pytest.mark.parametrize("module", [*(f"runner.engine.{name}" for name in ENGINE), "runner.serve"])
def test_what_serves_text_imports_no_array_library(module: str):
    assert libraries_after(f"import {module}") == set()


@pytest.mark.process
@pytest.mark.parametrize(("executor", "library"), [("onnx", "onnxruntime"), ("mlx", "mlx")])
def test_a_process_that_has_served_text_has_imported_one_of_them(tiny_llama: Path, executor: str, library: str):
    # ONNX Runtime comes with the package that writes its graphs.
    assert libraries_after(SERVED, str(tiny_llama), executor) - {"onnx"} == {library}
