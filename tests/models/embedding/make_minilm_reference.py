"""Write minilm_reference.json: what transformers makes of ten texts with all-MiniLM-L6-v2, in float32, eager.

python tests/models/embedding/make_minilm_reference.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = (
    "The capital of France is Paris.",
    "Paris is where the French government sits.",
    "a",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "東京は日本の首都です。",
    "def add(a, b):\n    return a + b",
    "naïve café, coöperate; [SEP] is written out here",
    "🙂 emoji and \uff26\uff35\uff2c\uff2c width",
    "The mole had been dark for eleven years when the council decided to sell it. " * 3,
    "lighthouse " * 240,
)


@torch.inference_mode()
def main() -> None:
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    made = []
    for text in TEXTS:
        asked = tokenizer(text, return_tensors="pt")
        hidden = model(**asked).last_hidden_state[0]
        vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        ids = asked["input_ids"][0].tolist()
        made.append({"text": text, "tokens": len(ids), "vector": [round(value, 7) for value in vector.tolist()]})
    lines = ",\n".join(json.dumps(each) for each in made)
    Path(__file__).with_name("minilm_reference.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
