"""The least loop that decodes several rows with the runner's model: one line of JSON, the rates by number of rows."""

import argparse
import json
import time
from pathlib import Path

from models import backend

CHUNK_TOKENS = 64


def run(model_file: Path, texts: list[str], tokens: int, threads: int, counts: list[int]) -> dict[int, float]:
    """Tokens a second over all rows, by the number of rows."""
    report = backend.prepare(threads=threads)
    if report.warning is not None:
        raise SystemExit(report.warning)
    import mlx.core as mx

    from models import host
    from models.checkpoint import open_checkpoint
    from models.llm import Row, load_language_model
    from models.tokenizer import load_tokenizer

    backend.configure()
    checkpoint = open_checkpoint(str(model_file), Path())
    model = load_language_model(checkpoint, policy="float32")
    tokenizer = load_tokenizer(checkpoint)

    def prefill(text: str):
        ids = tokenizer.encode(text, add_bos=tokenizer.adds_bos)
        cache = model.new_cache()
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            hidden = model(mx.array(chunk, dtype=mx.int32), [Row(len(chunk), cache)])
            mx.async_eval([array for layer in cache for array in layer.arrays()])
        return cache, mx.argmax(model.logits(hidden[-1:]), axis=-1)

    def rate(count: int, tokens: int) -> float:
        caches, firsts = zip(*(prefill(text) for text in texts[:count]), strict=True)
        rows, token = [Row(1, cache) for cache in caches], mx.concatenate(list(firsts))
        host.to_ints(token)
        begin = time.perf_counter()
        for left in reversed(range(tokens)):
            following = token
            if left:
                following = mx.argmax(model.logits(model(token, rows)), axis=-1)
                mx.async_eval(following)
            host.to_ints(token)
            token = following
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
