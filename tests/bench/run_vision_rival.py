"""transformers on torch in its own interpreter, in process: `… -m tests.bench.run_vision_rival --model FOLDER …`.

Imports nothing of this project: the standard library, and in the rival's environment what is measured.
"""

import argparse
import json
import re
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--question", nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    asked = parser.parse_args()
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(asked.threads)
    processor = AutoProcessor.from_pretrained(asked.model, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype=torch.float32).eval()
    whole = []
    with torch.inference_mode():
        for question in asked.question:
            begin = time.perf_counter()
            picture = Image.open(asked.picture).convert("RGB")
            inputs = processor(text=[f"<start_of_image> {question}"], images=[[picture]], return_tensors="pt")
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            whole.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        model.get_image_features(pixel_values=inputs["pixel_values"])
        tower = time.perf_counter() - begin
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    peak = int(found[1]) * 1024 if found else 0
    print(json.dumps({"tower_s": tower, "first_s": whole[0], "again_s": whole[1], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
