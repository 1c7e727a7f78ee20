"""Second stage: train text encoder and transformer together on the codec's latents, as a flow from noise to pictures.

    python -m tests.demo_model.train --out FOLDER [--steps 8000]

FOLDER holds what train_vae.py left there. It may be stopped and started again, also with another number of steps:
FOLDER/flow.pt is the state (weights, their running mean, optimiser), FOLDER/flow.csv the curve, FOLDER/pid the process.
"""

import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from tests.demo_model import components, vocabulary, world
from tests.demo_model.train_vae import TRAINING

KEYS = {*world.SHAPES, *world.COLOURS, *world.GROUNDS, "gray"}


@torch.no_grad()
def latents(vae: AutoencoderKL, seed: int, each: int) -> torch.Tensor:
    """Scaled latents of `each` pictures of every training combination: (combinations, each, 4, 16, 16)."""
    rng, found = np.random.default_rng(seed), []
    for combination in TRAINING:
        drawn = components.to_tensor(world.draw(combination, world.place(rng, each)))
        found.append(vae.encoder(drawn)[:, : components.CHANNELS].clone())
    return (torch.stack(found) - vae.config.shift_factor) * vae.config.scaling_factor


class Captions:
    """Draws captions as tokens: (B, 32) ids, padded with 0, and the number of real ones."""

    def __init__(self, rng: np.random.Generator, dropout: float) -> None:
        self.rng, self.dropout = rng, dropout
        self.tokenizer = vocabulary.make()
        self.unknown = self.tokenizer.token_to_id(vocabulary.UNKNOWN)
        self.keys = {self.tokenizer.token_to_id(word) for word in KEYS}
        others = {self.tokenizer.token_to_id(word) for word in vocabulary.words()} - self.keys
        self.others = [*sorted(others), *[self.unknown] * len(others)]

    def one(self, combination: world.Combination) -> list[int]:
        """A caption; at times empty (for guidance), at times with unknown or arbitrary words between its own."""
        if self.rng.random() < self.dropout:
            return self.tokenizer.encode(vocabulary.frame("")).ids
        text = self.tokenizer.encode(world.caption(self.rng, combination)).ids
        if self.rng.random() < 0.2:
            text = [i if i in self.keys or self.rng.random() < 0.6 else self.rng.choice(self.others) for i in text]
            if self.rng.random() < 0.5:
                text.insert(self.rng.integers(len(text) + 1), self.rng.choice(self.others))
        frame = self.tokenizer.encode(vocabulary.frame("")).ids
        return frame[:2] + text + frame[2:]

    def batch(self, chosen: list[world.Combination]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions of the combinations."""
        ids = torch.zeros(len(chosen), components.CAPTION_TOKENS, dtype=torch.long)
        lengths = torch.zeros(len(chosen), dtype=torch.long)
        for row, combination in enumerate(chosen):
            tokens = self.one(combination)[: components.CAPTION_TOKENS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            lengths[row] = len(tokens)
        return ids, lengths


class Training:
    """What a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.state = args, args.out / "flow.pt"
        size = vocabulary.make().get_vocab_size()
        self.model = components.Batched(components.make_text_encoder(size), components.make_transformer())
        print("difference from the library's forward pass:", components.check(self.model, size), flush=True)
        self.forward = torch.compile(self.model) if args.compile else self.model
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)
        self.mean = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.step, self.seconds = 0, 0.0
        if self.state.exists():
            saved = torch.load(self.state)
            self.model.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.mean, self.step, self.seconds = saved["mean"], saved["step"], saved["seconds"]

    def save(self) -> None:
        """Write the state, whole or not at all."""
        saved = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "mean": self.mean}
        part = self.state.with_suffix(".part")
        torch.save({**saved, "step": self.step, "seconds": self.seconds}, part)
        part.replace(self.state)

    def rate(self) -> float:
        """A short rise, long constant, and a fall to 0 over the last steps."""
        left = (self.args.steps - self.step) / (self.args.decay * self.args.steps)
        return self.args.rate * min(1.0, (self.step + 1) / 200, left)

    def update(self, z: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """One step; returns the loss. The noise level is a logit-normal one."""
        noise = torch.randn_like(z)
        sigma = torch.sigmoid(0.3 + 1.2 * torch.randn(len(z)))
        level = sigma[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            guess = self.forward((1 - level) * z + level * noise, 1 - sigma, ids, lengths)
        loss = functional.mse_loss(guess.float(), z - noise)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        keep = min(self.args.keep, (1 + self.step) / (10 + self.step))
        names = list(self.mean)
        now = dict(self.model.named_parameters())
        torch._foreach_lerp_([self.mean[n] for n in names], [now[n].data for n in names], 1 - keep)
        return loss.detach()


def run(training: Training, data: torch.Tensor) -> None:
    """Train until `steps`."""
    args = training.args
    rng = np.random.default_rng((args.seed, training.step))
    torch.manual_seed(args.seed + training.step)
    captions = Captions(rng, args.dropout)
    losses: list[torch.Tensor] = []
    with (args.out / "flow.csv").open("a", newline="") as file:
        rows = csv.writer(file)
        while training.step < args.steps:
            began = time.process_time()
            kinds = rng.integers(len(TRAINING), size=args.batch)
            z = data[torch.from_numpy(kinds), torch.from_numpy(rng.integers(data.shape[1], size=args.batch))]
            losses.append(training.update(z, *captions.batch([TRAINING[k] for k in kinds])))
            training.seconds += time.process_time() - began
            if training.step % 20 == 0:
                loss = torch.stack(losses).mean().item()
                losses.clear()
                rows.writerow((training.step, f"{loss:.5f}", f"{training.rate():.2e}", f"{training.seconds:.0f}"))
                file.flush()
            if training.step % 250 == 0 or training.step == args.steps:
                training.save()


def main() -> None:
    """Read the arguments, make the data, train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.375, help="share of the steps in which the rate falls to 0")
    parser.add_argument("--keep", type=float, default=0.998, help="of the running mean of the weights, a step")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--each", type=int, default=128, help="pictures of a combination")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    (args.out / "pid").write_text(f"{os.getpid()}\n")
    kept = args.out / "latents.pt"
    if not kept.exists():
        torch.save(latents(AutoencoderKL.from_pretrained(args.out / "vae"), args.seed, args.each), kept)
    data = torch.load(kept)
    print("latents:", tuple(data.shape), "mean", data.mean().item(), "deviation", data.std().item(), flush=True)
    run(Training(args), data)


if __name__ == "__main__":
    main()
