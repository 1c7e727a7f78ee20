"""Make the tiny checkpoints of the parity tests and what the reference library says of them.

Needs torch (CPU), transformers, safetensors, tokenizers and gguf; the tests themselves need none of the first two.
Everything is seeded by name, so a second run on the same machine and versions gives the same bytes.

    python tests/parity/make_fixtures.py [NAME ...]
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf_twin
import numpy as np
import tiny_tokenizer
import torch
from cases import CASES, Case
from safetensors.numpy import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    logging,
)

HERE = Path(__file__).parent
CONTINUATION = 16
# A greedy choice that hangs on the last bits of a sum is no reference: such a seed is passed over.
LEAST_MARGIN = 0.02
LEAST_EFFECT = 0.01
# A continuation that repeats one token would look right whatever its positions were.
LEAST_DISTINCT = 7

# What the numbers of a recurrent layer's heads lie between.
RATES = {"A_log": (-3.0, 1.0), "dt_bias": (-2.0, 1.0), "D": (0.5, 1.6)}

Arrays = dict[str, np.ndarray]


def is_norm_weight(name: str) -> bool:
    """Whether it is a norm's weight; biases of norms outside the text model count as such."""
    in_text = name.startswith(("model.layers.", "model.norm."))
    return "norm" in name and not (in_text and name.endswith("bias"))


def random_tensor(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """No value is a default: norms are off one, biases off zero, attention scores wide enough to choose."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if is_norm_weight(name):
        return rng.uniform(0.5, 1.6, shape).astype(np.float32)
    if ".act_fn." in name:
        # Apertus's: the last is where the curve below zero begins, and published as next to none.
        least, most = (-0.6, -0.2) if name.endswith("eps") else (-0.8, 0.8)
        return np.array(rng.uniform(least, most, shape), np.float32)
    if name.endswith(("scale", "scalar")):
        return rng.uniform(0.7, 1.4, shape).astype(np.float32)
    if (rate := name.rpartition(".")[2]) in RATES:
        # Some heads forget at once and some hardly at all; those that remember weigh a token little.
        low, high = RATES[rate]
        return rng.uniform(low, high, shape).astype(np.float32)
    if name.endswith("bias"):
        return rng.normal(0.0, 0.4, shape).astype(np.float32)
    if "embed_tokens" in name or "embeddings" in name:
        return rng.normal(0.0, 0.2, shape).astype(np.float32)
    gain = 1.6 if "q_proj" in name or "k_proj" in name else 2.0 if "lm_head" in name else 1.1
    if name.endswith("layers.3.feed_forward.router.weight"):
        gain = 16.0  # Llama 4's choice is by logits: here several scores are 1.
    return rng.normal(0.0, gain / shape[-1] ** 0.5, shape).astype(np.float32)


def auto_model(config_json: Mapping[str, object]) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    return AutoModelForImageTextToText if "vision_config" in config_json else AutoModelForCausalLM


def build(config_json: Mapping[str, object]) -> PreTrainedModel:
    """The reference model of a config.json, read from a file's form as a user's would be."""
    fields = {key: value for key, value in config_json.items() if key not in ("model_type", "torch_dtype", "dtype")}
    # Some configurations write into what they are given.
    config = AutoConfig.for_model(str(config_json["model_type"]), **deepcopy(fields))
    model = auto_model(config_json).from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def load(model: PreTrainedModel, weights: Mapping[str, np.ndarray]) -> None:
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise SystemExit(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()


def random_weights(model: PreTrainedModel, case: Case, seed: int) -> Arrays:
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config = case.config
    if config.get("tie_word_embeddings", "text_config" in config):
        del names["lm_head.weight"]
    weights = {name: random_tensor(name, shape, seed) for name, shape in names.items()}
    norms = {name for name in names if is_norm_weight(name) and name.endswith(case.adds_to)}
    added = {name for name in norms if not name.endswith(case.plain_norms)}
    return {name: w - np.float32(case.norms_add) if name in added else w for name, w in weights.items()}


def speaker(model: PreTrainedModel) -> PreTrainedModel:
    """What says words: of Llama 4 the part, for the whole fails in transformers 5.24 where it is given no picture."""
    part = getattr(model, "language_model", None)
    return part if isinstance(part, GenerationMixin) else model


@torch.inference_mode()
def logits_of(model: PreTrainedModel, tokens: Iterable[int]) -> np.ndarray:
    """The logits of every position, by one pass without a cache. Shapes: returns float32 (L, V)."""
    return speaker(model)(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()


def greedy(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[int], float]:
    """The continuation, each token by a whole pass; and the least distance of a first from a second choice."""
    tokens = list(prompt)
    margin = float("inf")
    for _ in range(CONTINUATION):
        last = logits_of(model, tokens)[-1]
        second, first = np.sort(last)[-2:]
        margin = min(margin, float(first - second))
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :], margin


@torch.inference_mode()
def check_cached_generation(model: PreTrainedModel, prompt: Sequence[int], expected: Sequence[int]) -> None:
    """The reference library agrees with itself: its own generate(), with its cache, gives the same tokens."""
    model = speaker(model)
    model.generation_config.eos_token_id = None
    generated = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=CONTINUATION,
        do_sample=False,
    )
    if generated[0, len(prompt) :].tolist() != list(expected):
        raise SystemExit("transformers' generate() and its own full passes disagree")


def reference_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[Arrays, float]:
    arrays: Arrays = {}
    margin = float("inf")
    for row, prompt in enumerate(prompts):
        continuation, row_margin = greedy(model, prompt)
        margin = min(margin, row_margin)
        arrays[f"prompt.{row}"] = np.array(prompt, dtype=np.int32)
        arrays[f"logits.{row}"] = logits_of(model, prompt)
        arrays[f"continuation.{row}"] = np.array(continuation, dtype=np.int32)
    return arrays, margin


def check_that_features_matter(case: Case, weights: Arrays, prompt: Sequence[int], logits: np.ndarray) -> None:
    for change in case.matters:
        changed = build({**case.config, **change})
        load(changed, weights)
        effect = float(np.abs(logits_of(changed, prompt) - logits).max())
        if effect < LEAST_EFFECT:
            raise SystemExit(f"{case.name}: {change} moves the logits by {effect:.2g} only")


def stray_tensors(case: Case, weights: Arrays) -> Arrays:
    """What published checkpoints carry beside the weights: old rotary tables, a copy of the tied head, other parts."""
    if case.whole:
        return {"model.vision_tower.stem.weight": np.ones((2, 2), np.float32)}
    if not case.stray:
        return {}
    if case.config["tie_word_embeddings"]:
        return {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    table = np.zeros(4, dtype=np.float32)
    layers = int(str(case.config["num_hidden_layers"]))
    return {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": table for n in range(layers)}


def write_weights(folder: Path, weights: Arrays, shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata)
        return
    names = sorted(weights)
    where = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file, metadata)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def read_back(folder: Path, weights: Arrays) -> PreTrainedModel:
    """The model of the folder's configuration with other weights, by the reference library's own loader."""
    with TemporaryDirectory() as temporary:
        shutil.copy(folder / "config.json", temporary)
        save_file(weights, Path(temporary, "model.safetensors"), {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        model = auto_model(config).from_pretrained(temporary, attn_implementation="eager", dtype=torch.float32)
        return model.eval()


def check_folder(folder: Path, prompt: Sequence[int], logits: np.ndarray) -> None:
    """The folder is a checkpoint like any other: the reference library's own loader gets the same model out of it."""
    config = json.loads((folder / "config.json").read_text())
    model = auto_model(config).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    difference = float(np.abs(logits_of(model, prompt) - logits).max())
    if difference > 1e-5:
        raise SystemExit(f"{folder.name}: read back, its logits differ by {difference:.2g}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.encode(tiny_tokenizer.PROMPTS[0]) != list(prompt):
        raise SystemExit(f"{folder.name}: read back, its tokenizer differs")


def make(case: Case) -> None:
    tokenizer = tiny_tokenizer.build()
    prompts = [tokenizer.encode(text).ids for text in tiny_tokenizer.PROMPTS]
    model = build(case.config)
    for seed in range(1, 100):
        weights = random_weights(model, case, seed)
        load(model, weights)
        reference, margin = reference_of(model, prompts)
        if margin >= LEAST_MARGIN and len(set(reference["continuation.0"].tolist())) >= LEAST_DISTINCT:
            break
    else:
        raise SystemExit(f"{case.name}: no seed gives clear choices")
    if case.generates:
        check_cached_generation(model, prompts[0], reference["continuation.0"].tolist())
    check_that_features_matter(case, weights, prompts[0], reference["logits.0"])
    weights = case.published(weights, case.config)

    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = {**case.whole, "text_config": case.config} if case.whole else case.config
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tiny_tokenizer.write(tokenizer, folder)
    stored = weights | stray_tensors(case, weights)
    write_weights(folder, {case.name_in_file(name): value for name, value in stored.items()}, case.shards)
    save_file(reference, folder / "reference.safetensors")
    if not case.whole:
        check_folder(folder, prompts[0], reference["logits.0"])
    described = {**case.config, **case.config.get("text_config", {})}
    if case.gguf:
        gguf_twin.write(HERE / f"{case.name}.gguf", case.gguf, described, weights, tokenizer)
    for kind in case.quantized:
        assert case.gguf is not None
        path = HERE / f"{case.name}-{kind}.gguf"
        # What the file has not, the text model does not need.
        rounded = weights | gguf_twin.write(path, case.gguf, described, weights, tokenizer, kind)
        named = {case.name_in_file(name): value for name, value in rounded.items()}
        logits = logits_of(read_back(folder, named), prompts[0])
        save_file({"logits.0": logits}, path.with_suffix(".safetensors"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{case.name}: seed {seed}, margin {margin:.3f}, {size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the parity fixtures.")
    parser.add_argument("name", nargs="*", help="fixtures to make; all if none is named")
    wanted = parser.parse_args().name
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for case in CASES:
        if not wanted or case.name in wanted:
            make(case)


if __name__ == "__main__":
    main()
