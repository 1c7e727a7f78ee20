"""Write what was trained as a folder that diffusers' ZImagePipeline loads.

    python -m tests.demo_model.export --from FOLDER --to models/image/shapes

Weights are the running mean of the training's, rounded to 16 bits.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImagePipeline
from transformers import PreTrainedTokenizerFast

from tests.demo_model import components, vocabulary

DEFAULTS = {"num_inference_steps": 10, "guidance_scale": 2.0}
"""What a request that names none gets, read by models/image/z_image/config.py."""


def build(source: Path, shift: float, dtype: torch.dtype) -> ZImagePipeline:
    """The pipeline of the newest checkpoint in `source`; vae_decoder.pt, if there, replaces the codec's decoder."""
    vae = AutoencoderKL.from_pretrained(source / "vae")
    if (source / "vae_decoder.pt").exists():
        vae.decoder.load_state_dict(torch.load(source / "vae_decoder.pt")["decoder"])
    tokenizer = source / "tokenizer"
    vocabulary.save(tokenizer)
    size = vocabulary.make().get_vocab_size()
    text_encoder, transformer = components.make_text_encoder(size), components.make_transformer()
    saved = torch.load(source / "flow.pt")
    print("checkpoint of step", saved["step"], "after hours:", saved["seconds"] / 3600)
    components.Batched(text_encoder, transformer).load_state_dict(saved["mean"], strict=False)
    return ZImagePipeline(
        scheduler=components.make_scheduler(shift),
        vae=vae.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tokenizer),
        transformer=transformer.to(dtype),
    )


def tidy(folder: Path) -> None:
    """Take out of an exported folder what the machine and the installed versions have put in."""
    # The tokenizer as it was made, under the name that every version of transformers knows.
    shutil.rmtree(folder / "tokenizer")
    vocabulary.save(folder / "tokenizer")
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        values = json.loads(path.read_text())
        values.pop("_name_or_path", None)
        if "tokenizer" in values:
            values["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        path.write_text(json.dumps(values, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--shift", type=float, default=2.0)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    args = parser.parse_args()
    pipeline = build(args.source, args.shift, getattr(torch, args.dtype))
    if args.to.exists():
        shutil.rmtree(args.to)
    pipeline.save_pretrained(args.to, safe_serialization=True)
    tidy(args.to)
    (args.to / "generation_config.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    total = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file())
    for name in ("vae", "text_encoder", "transformer"):
        print(name, "parameters:", sum(p.numel() for p in getattr(pipeline, name).parameters()))
    print("bytes:", total)


if __name__ == "__main__":
    main()
