"""The checkpoint of `vision_checkpoint.py` as llama.cpp reads it, in float32: `… vision_twins FOLDER TARGET`.

A process of its own: everything is in memory at once, and the writers are scripts that find each other by path.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tests.bench.commands import REPOSITORY

MODEL, PROJECTOR = "model.gguf", "mmproj.gguf"


def write(folder: Path, target: Path) -> None:
    """Write the text model and the projector into the folder `target`, which is made."""
    sys.path += [str(REPOSITORY / "tests" / name) for name in ("parity", "parity_vision")]
    import gguf_twin
    import mmproj_twin
    from cases.gemma import NORMS, write_windows

    target.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    weights = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    text, seen = mmproj_twin.halves(weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said = config | config["text_config"]
    twin = gguf_twin.Twin("gemma3", NORMS, metadata=write_windows, norm_shift=1.0)
    gguf_twin.write(target / MODEL, twin, said, text, tokenizer, bos=True)
    kind = mmproj_twin.Projector("gemma3", mmproj_twin.GEMMA3, mmproj_twin.write_gemma3, mmproj_twin.with_one_added)
    mmproj_twin.write(target / PROJECTOR, kind, config, images, seen, said["hidden_size"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    write(asked.folder, asked.target)


if __name__ == "__main__":
    main()
