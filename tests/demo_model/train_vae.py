"""First stage: train the codec on pictures of the world, then fit the scale of its latents.

    python -m tests.demo_model.train_vae --out FOLDER [--steps 3000]
    python -m tests.demo_model.train_vae --out FOLDER --refine [--steps 4000 --rate 1e-3]

The second line goes on with the decoder alone. As the latents stay what they are, it may run beside train.py. Both may
be stopped and started again; FOLDER/vae.pt or vae_decoder.pt is the state, the .csv beside it the curve.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from tests.demo_model import components, world

TRAINING = [c for c in world.combinations() if not world.is_held_out(c)]


def pictures(rng: np.random.Generator, count: int, choice: list[world.Combination]) -> torch.Tensor:
    """`count` pictures of random combinations out of `choice`: (B, 3, 64, 64) in -1..1."""
    where = world.place(rng, count)
    drawn = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8)
    for i, k in enumerate(rng.integers(len(choice), size=count)):
        one = world.Placement(*(field[i : i + 1] for field in (where.x, where.y, where.radius, where.turn)))
        drawn[i] = world.draw(choice[k], one)[0]
    return components.to_tensor(drawn)


def loss_of(vae: AutoencoderKL, x: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, float]:
    """The loss of a batch: absolute error, the same of its gradients, and a little KL; and the PSNR in dB."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        y = vae.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).float()
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    psnr = -10 * math.log10(max(functional.mse_loss(y, x).item() / 4, 1e-12))
    return error.abs().mean() + 0.5 * edges + kl_weight * kl, psnr


@torch.no_grad()
def measure(vae: AutoencoderKL, seed: int, count: int = 96) -> tuple[float, float]:
    """PSNR in dB on held-out combinations: of the mean over pictures, and of the worst picture."""
    x = pictures(np.random.default_rng(seed), count, [c for c in world.combinations() if world.is_held_out(c)])
    y = vae.decoder(vae.encoder(x)[:, : components.CHANNELS]).clamp(-1, 1)
    each = ((y - x) ** 2).mean(dim=(1, 2, 3)) / 4
    return -10 * math.log10(each.mean().item()), -10 * math.log10(each.max().item())


@torch.no_grad()
def fit_scale(vae: AutoencoderKL, seed: int, count: int = 512) -> tuple[float, float]:
    """Set scaling_factor and shift_factor such that latents have mean 0 and variance 1 over everything."""
    rng = np.random.default_rng(seed)
    z = torch.cat([vae.encoder(pictures(rng, 64, TRAINING))[:, : components.CHANNELS] for _ in range(count // 64)])
    shift, scale = z.mean().item(), 1 / z.std().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return scale, shift


class Training:
    """What a checkpoint holds: of the whole codec or, where it is refined, of its decoder alone."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.step = args, 0
        self.vae = AutoencoderKL.from_pretrained(args.out / "vae") if args.refine else components.make_vae()
        self.part = self.vae.decoder if args.refine else self.vae
        self.vae.requires_grad_(False)
        self.part.requires_grad_(True).train()
        self.name = "decoder" if args.refine else "vae"
        self.state = args.out / ("vae_decoder.pt" if args.refine else "vae.pt")
        self.optimiser = torch.optim.AdamW(self.part.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.0)
        if self.state.exists():
            saved = torch.load(self.state)
            self.part.load_state_dict(saved[self.name])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step = saved["step"]

    def update(self, x: torch.Tensor) -> tuple[float, float]:
        """One step; returns loss and PSNR in dB."""
        left = 1 - self.step / self.args.steps
        for group in self.optimiser.param_groups:
            group["lr"] = self.args.rate * min(1.0, (self.step + 1) / 100, left / self.args.decay)
        loss, psnr = loss_of(self.vae, x, self.args.kl)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.part.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.item(), psnr

    def save(self) -> None:
        """Write the state, whole or not at all."""
        saved = {self.name: self.part.state_dict(), "optimiser": self.optimiser.state_dict(), "step": self.step}
        part = self.state.with_suffix(".part")
        torch.save(saved, part)
        part.replace(self.state)


def run(training: Training) -> None:
    """Train until `steps`."""
    args = training.args
    rng = np.random.default_rng((args.seed, training.step))
    torch.manual_seed(args.seed + training.step)
    began = time.perf_counter()
    with training.state.with_suffix(".csv").open("a", newline="") as file:
        rows = csv.writer(file)
        while training.step < args.steps:
            loss, psnr = training.update(pictures(rng, args.batch, TRAINING))
            if training.step % 20 == 0:
                rows.writerow((training.step, f"{loss:.5f}", f"{psnr:.2f}", f"{time.perf_counter() - began:.0f}"))
                file.flush()
            if training.step % 500 == 0 or training.step == args.steps:
                training.save()
                print(training.step, "PSNR mean and worst, dB:", measure(training.vae, 7), flush=True)


def main() -> None:
    """Read the arguments and train; the whole codec is then written to FOLDER/vae as diffusers does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--refine", action="store_true", help="go on with the decoder alone, to FOLDER/vae_decoder.pt")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps in which the rate falls to 0")
    parser.add_argument("--kl", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args)
    run(training)
    if not args.refine:
        print("scale, shift:", fit_scale(training.vae, 8))
        training.vae.save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
