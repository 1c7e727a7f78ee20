"""sentence-transformers in its own interpreter, in process: `… -m tests.bench.run_embed_rival --backend onnx …`.

Imports nothing of this project: the standard library, and in the rival's environment what is measured.
"""

import argparse
import json
import re
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--backend", choices=("torch", "onnx"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    asked = parser.parse_args()
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(asked.threads)
    more = {}
    if asked.backend == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = asked.threads
        more["model_kwargs"] = {"session_options": options, "provider": "CPUExecutionProvider"}
    model = SentenceTransformer(asked.model, device="cpu", backend=asked.backend, **more)
    shapes = json.loads(asked.texts.read_text())
    times, vectors = {}, []
    for name, texts in shapes.items():
        # As many together as there are: its own sorting and padding are its own business.
        model.encode(texts, batch_size=64, show_progress_bar=False)
        taken, end = [], time.perf_counter() + asked.seconds
        while len(taken) < 2 or time.perf_counter() < end:
            begin = time.perf_counter()
            made = model.encode(texts, batch_size=64, show_progress_bar=False)
            taken.append(time.perf_counter() - begin)
        times[name] = taken
        vectors = vectors or [float(value) for value in made[0]]
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    print(json.dumps({"times": times, "vector": vectors, "peak_bytes": int(found[1]) * 1024 if found else 0}))


if __name__ == "__main__":
    main()
