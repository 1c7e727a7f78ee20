"""The parts of the model, made of the library's classes, and a forward pass over a whole batch of them.

`latents` are (B, 4, 16, 16), scaled to a variance near 1; `t` is (B,), 0 for noise and 1 for a picture.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch.nn import functional
from transformers import Qwen3Config, Qwen3Model

CHANNELS, SIDE, PATCH = 4, 16, 2
CAPTION_TOKENS = 32


def make_vae() -> AutoencoderKL:
    """A codec that makes (3, 64, 64) pictures in -1..1 into (4, 16, 16) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_text_encoder(vocabulary: int) -> Qwen3Model:
    """A reader of captions. The pipeline takes the states before its last layer, whose weights are thus never used."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return Qwen3Model(config)


def make_transformer() -> ZImageTransformer2DModel:
    """A small Z-Image transformer whose modulated blocks begin close to the identity."""
    model = ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        all_f_patch_size=(1,),
        in_channels=CHANNELS,
        dim=192,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=128,
        rope_theta=256.0,
        axes_dims=[16, 16, 16],
        axes_lens=[512, 64, 64],
    )
    dim = model.dim
    for block in [*model.noise_refiner, *model.layers]:
        linear = block.adaLN_modulation[0]
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        for gate in (1, 3):
            torch.nn.init.constant_(linear.bias.data[gate * dim : (gate + 1) * dim], 0.3)
    last = model.all_final_layer[f"{PATCH}-1"]
    for linear in (last.linear, last.adaLN_modulation[1]):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    torch.nn.init.normal_(model.cap_pad_token, std=0.02)
    torch.nn.init.normal_(model.x_pad_token, std=0.02)
    return model


def make_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Z-Image: a fixed shift of the noise levels."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)


class Batched(torch.nn.Module):
    """The same modules, run over a batch of one size without the library's lists; `check` compares the two."""

    def __init__(self, text_encoder: Qwen3Model, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        cells = SIDE // PATCH
        positions = torch.zeros(CAPTION_TOKENS + cells * cells, 3, dtype=torch.long)
        rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        positions[: cells * cells, 0] = CAPTION_TOKENS + 1
        positions[: cells * cells, 1], positions[: cells * cells, 2] = rows.flatten(), columns.flatten()
        positions[cells * cells :, 0] = torch.arange(1, CAPTION_TOKENS + 1)
        with torch.no_grad():
            turns = transformer.rope_embedder(positions)
        self.register_buffer("cos", turns.real[None, :, None, :].clone())
        self.register_buffer("sin", turns.imag[None, :, None, :].clone())
        hidden = torch.zeros(1, CAPTION_TOKENS, 1)
        cos, sin = text_encoder.rotary_emb(hidden, torch.arange(CAPTION_TOKENS)[None])
        self.register_buffer("text_cos", cos.detach().clone())
        self.register_buffer("text_sin", sin.detach().clone())
        future = torch.full((CAPTION_TOKENS, CAPTION_TOKENS), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("causal", future[None, None])

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The states of (B, 32) tokens, padded on the right, before the last layer: (B, 32, 128)."""
        h = self.text_encoder.embed_tokens(ids)
        for layer in self.text_encoder.layers[:-1]:
            h = layer(h, attention_mask=self.causal, position_embeddings=(self.text_cos, self.text_sin))
        return h

    def _attend(self, attention: torch.nn.Module, x: torch.Tensor, places: slice) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (attention.heads, -1)) for f in (attention.to_q, attention.to_k, attention.to_v))
        cos, sin = self.cos[:, places], self.sin[:, places]

        def rotate(y: torch.Tensor) -> torch.Tensor:
            even, odd = y[..., 0::2], y[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)

        q, k = rotate(attention.norm_q(q)), rotate(attention.norm_k(k))
        y = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).to(x.dtype))
        return attention.to_out[0](y.transpose(1, 2).flatten(2))

    def _block(self, block: torch.nn.Module, x: torch.Tensor, places: slice, t: torch.Tensor | None) -> torch.Tensor:
        if t is None:
            x = x + block.attention_norm2(self._attend(block.attention, block.attention_norm1(x), places))
            return x + block.ffn_norm2(block.feed_forward(block.ffn_norm1(x)))
        scale, gate, ff_scale, ff_gate = block.adaLN_modulation(t)[:, None].chunk(4, dim=2)
        y = self._attend(block.attention, block.attention_norm1(x) * (1 + scale), places)
        x = x + gate.tanh() * block.attention_norm2(y)
        y = block.feed_forward(block.ffn_norm1(x) * (1 + ff_scale))
        return x + ff_gate.tanh() * block.ffn_norm2(y)

    def forward(self, z: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The direction picture - noise at (B, 4, 16, 16) latents for (B, 32) tokens of which `lengths` are real."""
        model, cells = self.transformer, SIDE // PATCH
        image, text = slice(0, cells * cells), slice(cells * cells, None)
        time = model.t_embedder(t * model.t_scale)
        x = (
            z.unflatten(3, (cells, PATCH))
            .unflatten(2, (cells, PATCH))
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3)
            .flatten(1, 2)
        )
        x = model.all_x_embedder[f"{PATCH}-1"](x)
        for block in model.noise_refiner:
            x = self._block(block, x, image, time)
        c = model.cap_embedder(self.read(ids))
        real = torch.arange(CAPTION_TOKENS, device=ids.device)[None] < lengths[:, None]
        c = torch.where(real[..., None], c, model.cap_pad_token.to(c.dtype))
        for block in model.context_refiner:
            c = self._block(block, c, text, None)
        x = torch.cat((x, c), dim=1)
        for block in model.layers:
            x = self._block(block, x, slice(None), time)
        x = model.all_final_layer[f"{PATCH}-1"](x[:, image], c=time)
        x = x.unflatten(2, (PATCH, PATCH, CHANNELS)).unflatten(1, (cells, cells)).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4).flatten(2, 3)


@torch.no_grad()
def check(batched: Batched, vocabulary: int) -> float:
    """The largest difference between `batched` and the library's forward pass, on random input of three lengths."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator)
    ids = torch.randint(3, vocabulary, (3, CAPTION_TOKENS), generator=generator)
    t, lengths = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([7, 20, CAPTION_TOKENS])
    mine = batched(z, t, ids, lengths)
    mask = (torch.arange(CAPTION_TOKENS)[None] < lengths[:, None]).long()
    states = batched.text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    captions = [s[:n] for s, n in zip(states, lengths.tolist(), strict=True)]
    theirs = batched.transformer(list(z[:, :, None]), t, captions, return_dict=False)[0]
    return (mine - torch.stack(theirs)[:, :, 0]).abs().max().item()
