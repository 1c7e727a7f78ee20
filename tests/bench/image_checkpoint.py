"""Writes the image pipeline that everyone loads, and what everyone is given: `python -m tests.bench.image_checkpoint`.

A Z-Image of a middle size with random weights, drawn from a seed: a text encoder of next to no size, a transformer of
218 million parameters, the autoencoder of the real model. Runs in diffusers' environment, but for `latents`.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SEED = 7
PROMPT = "a red kite"
"""With the chat template around it 29 tokens, so the transformer sees 32 and three of them are padding."""
SIDE = 256
"""Pixels."""
LATENT_SIDE, LATENT_CHANNELS = SIDE // 8, 16
HIDDEN = 256
"""Of the text encoder."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRANSFORMER = {
    "in_channels": LATENT_CHANNELS,
    "dim": 1024,
    "n_layers": 12,
    "n_refiner_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "cap_feat_dim": HIDDEN,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1024, 512, 512],
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
}


def write_latents(target: Path) -> None:
    """The noise that the runner draws for the seed; runs in the project's environment."""
    from models.image import blas

    blas.prepare()
    import mlx.core as mx

    shape = (1, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    with target.open("wb") as file:
        np.save(file, np.array(mx.random.normal(shape, key=mx.random.key(SEED))))


def write_tokenizer(folder: Path) -> None:
    """Bytes, and the three tokens of the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    config |= {"padding_side": "right", "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def settle(module: "torch.nn.Module") -> None:
    """Norms, biases and pad tokens away from the values at which a mistake in them would not show."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "pad_token" in name:
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)


def write_pipeline(folder: Path, latents: Path) -> None:
    """The pipeline's folder, with `inputs.npz` in it: latents, and the prompt's embedding."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    torch.manual_seed(SEED)
    write_tokenizer(folder / "tokenizer")
    encoder = Qwen3Config(
        vocab_size=259,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**AUTOENCODER).eval(),
        text_encoder=Qwen3Model(encoder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=ZImageTransformer2DModel(**TRANSFORMER).eval(),
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        settle(part)
    noise = torch.from_numpy(np.load(latents))
    with torch.inference_mode():
        caption = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0][0]
        scale_outputs(pipeline, noise, caption)
    pipeline.save_pretrained(folder)
    np.savez(folder / "inputs.npz", latents=noise.numpy(), caption=caption.numpy())


def scale_outputs(pipeline: Any, noise: "torch.Tensor", caption: "torch.Tensor") -> None:
    """So that a step moves the latents as a trained model's would, and a picture has contrast to compare."""
    import torch

    velocity = pipeline.transformer([noise[0].unsqueeze(1)], torch.tensor([0.5]), [caption], return_dict=False)[0][0]
    last = pipeline.transformer.all_final_layer["2-1"].linear
    last.weight /= velocity.std()
    last.bias /= velocity.std()
    picture = pipeline.vae.decode(noise[..., :8, :8] / 0.3611, return_dict=False)[0]
    out = pipeline.vae.decoder.conv_out
    out.bias -= picture.mean((0, 2, 3))
    out.weight *= 0.4 / picture.std()
    out.bias *= 0.4 / picture.std()


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("latents").add_argument("target", type=Path)
    pipeline = commands.add_parser("pipeline")
    pipeline.add_argument("target", type=Path)
    pipeline.add_argument("latents", type=Path)
    asked = parser.parse_args()
    if asked.what == "latents":
        write_latents(asked.target)
    else:
        write_pipeline(asked.target, asked.latents)


if __name__ == "__main__":
    main()
