"""The least loop that decodes several rows with the runner's model: one line of JSON, the rates by number of rows."""

import argparse
import json
import time
from pathlib import Path

from models.checkpoint import open_checkpoint
from models.tokenizer import load_tokenizer
from tests.bench.bare import BareRows, options


def run(model_file: Path, texts: list[str], tokens: int, threads: int, counts: list[int]) -> dict[int, float]:
    """Tokens a second over all rows, by the number of rows."""
    checkpoint = open_checkpoint(str(model_file), Path())
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tokenizer.encode(text, add_bos=tokenizer.adds_bos) for text in texts[: max(counts)]]
    longest = max(map(len, prompts)) + tokens
    rows = BareRows(checkpoint, options(float32=False, rows=max(counts), row_tokens=longest, threads=threads))

    def rate(count: int, tokens: int) -> float:
        firsts = [rows.prefill(row, 0, ids) for row, ids in enumerate(prompts[:count])]
        begin = time.perf_counter()
        for done in range(tokens - 1):
            places = [(row, len(ids) + done) for row, ids in enumerate(prompts[:count])]
            firsts = rows.step([(*place, token) for place, token in zip(places, firsts, strict=True)])
        return count * (tokens - 1) / (time.perf_counter() - begin)

    # Page faults and first-use set-up are not what is measured.
    rate(1, 4)
    return {count: rate(count, tokens) for count in counts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--length", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    asked = parser.parse_args()
    texts = json.loads(asked.texts.read_text())[asked.length]
    print(json.dumps(run(asked.model, texts, asked.tokens, asked.threads, asked.rows)), flush=True)


if __name__ == "__main__":
    main()
