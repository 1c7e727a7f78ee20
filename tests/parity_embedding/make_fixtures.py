"""Make the tiny checkpoints of the embedding tests and the vectors that transformers and torch give.

Needs torch (CPU), transformers, safetensors, tokenizers and gguf; the tests themselves need none of the first two.
Everything is seeded by name, so a second run on the same machine and versions gives the same bytes.

    python tests/parity_embedding/make_fixtures.py [NAME ...]
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf_twin
import numpy as np
import torch
import vocabularies
from cases import CASES, VOCAB_SIZE, Case
from safetensors.numpy import save_file
from texts import TEXTS
from transformers import AutoConfig, AutoModel, PreTrainedModel, logging

HERE = Path(__file__).parent
# Well above the tests' tolerance.
LEAST_EFFECT = 1e-4

Arrays = dict[str, np.ndarray]


def random_tensor(name: str, shape: Sequence[int]) -> np.ndarray:
    """No value is a default: norms are off one, biases off zero, attention scores wide enough to choose."""
    rng = np.random.default_rng([7, zlib.crc32(name.encode())])
    if name.endswith("bias") and "relative" not in name:
        return rng.normal(0.0, 0.4, shape).astype(np.float32)
    if "norm" in name.lower() or "emb_ln" in name:
        return rng.uniform(0.5, 1.6, shape).astype(np.float32)
    if "relative_attention_bias" in name:
        return rng.normal(0.0, 1.0, shape).astype(np.float32)
    if "embed" in name:
        return rng.normal(0.0, 0.2, shape).astype(np.float32)
    gain = (
        2.0
        if any(
            part in name for part in ("query", "key", "attn.q", "attn.k", "q_proj", "k_proj", "q_lin", "k_lin", "Wqkv")
        )
        else 1.1
    )
    return rng.normal(0.0, gain / shape[-1] ** 0.5, shape).astype(np.float32)


def reference_config(config: Mapping[str, object]) -> dict[str, object]:
    """The configuration in the words of the reference library, where published checkpoints use others."""
    if config["model_type"] != "nomic_bert":
        return dict(config)
    return {
        "model_type": "nomic_bert",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config["n_inner"],
        "max_position_embeddings": config["n_positions"],
        "layer_norm_eps": config["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(str(config["rotary_emb_base"]))},
    }


def build(config: Mapping[str, object]) -> PreTrainedModel:
    known = {k: v for k, v in reference_config(config).items() if k not in ("model_type", "architectures")}
    made = AutoConfig.for_model(str(config["model_type"]), **known)
    return AutoModel.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()


def published_names(model: PreTrainedModel, config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """The tensors as a published checkpoint has them, without a prefix."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if not name.startswith("pooler.")}
    if config["model_type"] != "nomic_bert":
        return shapes
    return {
        _nomic_name(name): _nomic_shape(name, shape)
        for name, shape in shapes.items()
        if "v_proj" not in name and "k_proj" not in name
    }


_NOMIC = {
    "self_attn.q_proj": "attn.Wqkv",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc11",
    "mlp.gate_proj": "mlp.fc12",
    "mlp.down_proj": "mlp.fc2",
    "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2",
}


def _nomic_name(name: str) -> str:
    name = name.replace("embeddings.LayerNorm", "emb_ln")
    for theirs, published in _NOMIC.items():
        name = name.replace(theirs, published)
    return f"encoder.{name}" if name.startswith("layers.") else name


def _nomic_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (3 * shape[0], *shape[1:]) if "q_proj" in name else shape


def load(model: PreTrainedModel, weights: Mapping[str, np.ndarray], config: Mapping[str, object]) -> None:
    own: Arrays = {}
    for name in model.state_dict():
        if name.startswith("pooler."):
            continue
        if config["model_type"] != "nomic_bert":
            own[name] = weights[name]
        elif part := next((part for part in "qkv" if f"self_attn.{part}_proj" in name), ""):
            whole = weights[_nomic_name(name.replace(f"{part}_proj", "q_proj"))]
            own[name] = np.split(whole, 3)["qkv".index(part)]
        else:
            own[name] = weights[_nomic_name(name)]
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in own.items()}, strict=False)
    if unexpected or [name for name in missing if not name.startswith("pooler.")]:
        raise SystemExit(f"missing {missing}, unexpected {unexpected}")


@torch.inference_mode()
def hidden_of(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0].float()


ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x}


def vector_of(case: Case, hidden: torch.Tensor, dense: Mapping[str, np.ndarray]) -> torch.Tensor:
    """What sentence-transformers does behind the transformer; see its `models.Pooling`, `Dense` and `Normalize`."""
    match case.pooling:
        case "pooling_mode_cls_token":
            x = hidden[0]
        case "pooling_mode_lasttoken":
            x = hidden[-1]
        case "pooling_mode_max_tokens":
            x = hidden.max(0).values
        case "pooling_mode_mean_sqrt_len_tokens":
            x = hidden.sum(0) / len(hidden) ** 0.5
        case "pooling_mode_weightedmean_tokens":
            weights = torch.arange(1, len(hidden) + 1).float()[:, None]
            x = (hidden * weights).sum(0) / weights.sum()
        case _:
            x = hidden.mean(0)
    for index, (_, activation, bias) in enumerate(case.dense):
        x = torch.from_numpy(dense[f"{index}.linear.weight"]) @ x
        x = x + torch.from_numpy(dense[f"{index}.linear.bias"]) if bias else x
        x = ACTIVATIONS[activation.rpartition(".")[2]](x)
    return torch.nn.functional.normalize(x, dim=0) if case.normalize else x


def write_modules(case: Case, folder: Path, dense: Mapping[str, np.ndarray], width: int) -> None:
    """What sentence-transformers keeps beside the model."""
    if not case.pooling:
        return
    kinds = ["Transformer", "Pooling", *["Dense"] * len(case.dense), *["Normalize"] * case.normalize]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=1))
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, case.pooling: True}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=1))
    limits = {"max_seq_length": case.max_seq_length, "do_lower_case": case.lower_case}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits, indent=1))
    inputs = width
    for index, (outputs, activation, bias) in enumerate(case.dense):
        own = folder / f"{index + 2}_Dense"
        own.mkdir()
        settings = {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": activation}
        (own / "config.json").write_text(json.dumps(settings, indent=1))
        arrays = {k.partition(".")[2]: v for k, v in dense.items() if k.startswith(f"{index}.")}
        save_file(arrays, own / "model.safetensors")
        inputs = outputs


def dense_weights(case: Case, width: int) -> Arrays:
    arrays, inputs = {}, width
    for index, (outputs, _, bias) in enumerate(case.dense):
        arrays[f"{index}.linear.weight"] = random_tensor(f"{case.name}.{index}.linear.weight", (outputs, inputs))
        if bias:
            arrays[f"{index}.linear.bias"] = random_tensor(f"{case.name}.{index}.linear.bias", (outputs,))
        inputs = outputs
    return arrays


def check_that_features_matter(
    case: Case, weights: Arrays, dense: Arrays, ids: Sequence[int], vector: np.ndarray
) -> None:
    for change in case.matters:
        changed = build({**case.config, **change})
        load(changed, weights, case.config)
        effect = float(np.abs(vector_of(case, hidden_of(changed, ids), dense).numpy() - vector).max())
        if effect < LEAST_EFFECT:
            raise SystemExit(f"{case.name}: {change} moves the vector by {effect:.2g} only")


def make(case: Case) -> None:
    tokenizer = vocabularies.build(case)
    if tokenizer.get_vocab_size() > VOCAB_SIZE:
        raise SystemExit(f"{case.name}: {tokenizer.get_vocab_size()} tokens")
    model = build(case.config)
    weights = {name: random_tensor(name, shape) for name, shape in published_names(model, case.config).items()}
    load(model, weights, case.config)
    width = model.config.hidden_size
    dense = dense_weights(case, width)
    reference: Arrays = {}
    for index, text in enumerate(TEXTS):
        ids = tokenizer.encode(text.lower() if case.lower_case else text).ids
        reference[f"ids.{index}"] = np.array(ids, np.int32)
        reference[f"vector.{index}"] = vector_of(case, hidden_of(model, ids), dense).numpy()
    check_that_features_matter(case, weights, dense, reference["ids.3"].tolist(), reference["vector.3"])

    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config, indent=1))
    vocabularies.write(tokenizer, folder, case)
    head = {name: random_tensor(name, shape) for name, shape in (case.head or {}).items()}
    named = {case.prefix + name: value for name, value in weights.items()}
    save_file(named | head, folder / "model.safetensors", {"format": "pt"})
    save_file(reference, folder / "reference.safetensors")
    write_modules(case, folder, dense, width)
    if case.gguf:
        gguf_twin.write(HERE / f"{case.name}.gguf", case, weights, dense, tokenizer)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{case.name}: {len(reference['ids.0'])} tokens, {size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedding fixtures.")
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
