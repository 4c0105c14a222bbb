"""Train the embedded default: a small class-conditional DiT on rendered capital letters.

    python -m bench.default_model.train --out runs/default --images 860000
    torchrun --nproc-per-node 2 -m bench.default_model.train --out runs/default --images 860000

It resumes from ``--out`` if a checkpoint is there. The learning rate warms up, stays, and falls to zero over the last
``--decay-images``, so a run can be made longer, or ended early, by resuming with another ``--images``. Until the fall
the loss is weighted towards noisy timesteps, from there on it is the plain one.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from bench.default_model.fonts import find_faces, most_typical, split_faces
from bench.default_model.letters import NARROW, SIDE, GlyphBank, render_bank
from ebcache_fast.models.modules import DiT
from ebcache_fast.samplers.schedule import NoiseSchedule

MODEL = dict(
    input_size=SIDE,
    patch_size=4,
    in_channels=3,
    hidden_size=96,
    depth=8,
    num_heads=3,
    num_classes=26,
    learn_sigma=True,
)
EMA_DECAY = 0.999
FACES = 48  # of the training faces, those nearest to their mean: fewer are learnt sooner
WARMUP_IMAGES = 50_000


@dataclass(frozen=True)
class Diffusion:
    """What the loss needs of the noise schedule, by timestep t, float32 (T,)."""

    signal: Tensor
    noise: Tensor
    posterior_log_variance: Tensor
    log_beta: Tensor
    mean_error_scale: Tensor  # the posterior mean's error is this times the error of eps
    structure_weight: Tensor  # SNR ** -0.5 within limits, of mean 1: half-way from the eps loss to the x0 loss

    @classmethod
    def linear(cls, device: torch.device) -> "Diffusion":
        """The linear schedule over 1000 timesteps."""
        schedule = NoiseSchedule.linear()
        alpha_bar = torch.tensor(schedule.train_alpha_bar.copy())
        beta = torch.tensor(schedule.beta[::-1].copy())
        structure = (alpha_bar / (1 - alpha_bar)).clamp(0.01, 100).rsqrt()
        arrays = (
            alpha_bar.sqrt(),
            (1 - alpha_bar).sqrt(),
            torch.tensor(schedule.posterior_log_variance[::-1].copy()),
            torch.tensor(schedule.log_beta[::-1].copy()),
            beta / ((1 - alpha_bar) * (1 - beta)).sqrt(),
            structure / structure.mean(),
        )
        return cls(*(array.float().to(device) for array in arrays))

    def loss(
        self, model: nn.Module, x0: Tensor, t: Tensor, y: Tensor, structure: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(what to minimise, mean squared error of eps, variational bound of the learned variance), batch means.

        With ``structure`` the squared error is weighted towards noisy timesteps, where the letter's shape is decided.

        Source: Nichol and Dhariwal, arXiv 2102.09672, section 3.1; at t = 0 the clipped posterior variance stands in
        for the discretised likelihood. The bound trains the variance alone: eps is detached in it.
        """
        eps = torch.randn_like(x0)
        signal, noise, low, high, scale = (
            array[t].view(-1, 1, 1, 1)
            for array in (
                self.signal,
                self.noise,
                self.posterior_log_variance,
                self.log_beta,
                self.mean_error_scale,
            )
        )
        predicted, v = model(signal * x0 + noise * eps, t, y).chunk(2, dim=1)
        error = predicted - eps
        log_variance = low + (v + 1) / 2 * (high - low)
        mean_error = scale * error.detach()
        bound = 0.5 * (
            log_variance - low - 1 + (low - log_variance).exp() + mean_error.square() * (-log_variance).exp()
        )
        squared, bound_mean = error.square().mean(dim=(1, 2, 3)), bound.mean() / math.log(2)
        weighted = squared * self.structure_weight[t] if structure else squared
        return weighted.mean() + bound_mean, squared.mean(), bound_mean


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))]


def learning_rate_factor(seen: int, images: int, decay_images: int) -> float:
    """Linear warm-up, a plateau, a linear fall to zero."""
    return max(0.0, min(1.0, seen / WARMUP_IMAGES, (images - seen) / decay_images))


def average_gradients(model: nn.Module, world: int) -> None:
    """Replace every gradient by its mean over the ranks, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.div_(world).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def load_bank(out: Path) -> GlyphBank:
    """The training faces' masks, rendered once and kept beside the checkpoint."""
    path = out / "bank.pt"
    if not path.exists():
        faces, _ = split_faces(find_faces())
        torch.save(render_bank([face.path for face in most_typical(faces, FACES)], NARROW).masks, path)
    return GlyphBank(torch.load(path, weights_only=True))


class Run:
    """A model in training with its average, optimizers and history; saved whole, and resumed from what was saved."""

    def __init__(self, out: Path, learning_rate: float, device: torch.device) -> None:
        self.model = DiT(**MODEL).to(device)
        self.ema = DiT(**MODEL).to(device).requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimizers = make_optimizers(self.model, learning_rate)
        self.seen, self.curve = 0, []
        self._path = out / "checkpoint.pt"
        if self._path.exists():
            state = torch.load(self._path, weights_only=True, map_location=device)
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.seen, self.curve = state["seen"], state["curve"]

    def step(self, learning_rate: float, images: int) -> None:
        """Apply the gradients of a step over ``images`` images, and let the average follow."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.seen += images
        steps = self.seen / images
        decay = min(EMA_DECAY, (1 + steps) / (10 + steps))
        for averaged, current in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            averaged.lerp_(current.detach(), 1 - decay)

    def save(self) -> None:
        """Replace the checkpoint, and curve.json: [images seen, mean squared error of eps, bound] by report."""
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "seen": self.seen, "curve": self.curve}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self._path.with_suffix(".tmp"))
        os.replace(self._path.with_suffix(".tmp"), self._path)
        self._path.with_name("curve.json").write_text(json.dumps(self.curve))


def train(args: argparse.Namespace) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(args.threads)
    if world > 1:
        distributed.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    bank = load_bank(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    run = Run(args.out, args.learning_rate, device)
    diffusion = Diffusion.linear(device)

    torch.manual_seed(args.seed + run.seen * world + rank)  # ranks, and resumed runs, draw different noise
    generator = torch.Generator().manual_seed(args.seed + 1 + run.seen * world + rank)
    started, seen_at_start, recent = time.time(), run.seen, []
    while run.seen < args.images:
        y = torch.randint(bank.letters, (args.batch,), generator=generator)
        x0 = bank.draw(y, generator).to(device)
        # One timestep from each of `batch` equal strata: the loss is less noisy than with independent draws.
        t = ((torch.arange(args.batch) + torch.rand(args.batch)) * (1000 / args.batch)).long().to(device)
        structure = run.seen < args.images - args.decay_images
        loss, mse, bound = diffusion.loss(run.model, x0, t, y.to(device), structure)
        loss.backward()
        if world > 1:
            average_gradients(run.model, world)
        factor = learning_rate_factor(run.seen, args.images, args.decay_images)
        run.step(args.learning_rate * factor, args.batch * world)
        recent.append((mse.item(), bound.item()))
        if rank == 0 and (len(recent) == args.report_every or run.seen >= args.images):
            means = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
            rate = (run.seen - seen_at_start) / (time.time() - started)
            print(f"{run.seen} images, {rate:.0f}/s, mse {means[0]:.5f}, bound {means[1]:.5f}", flush=True)
            run.curve.append([run.seen, *means])
            run.save()
            recent.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=860_000)
    parser.add_argument("--decay-images", type=int, default=260_000)
    parser.add_argument("--batch", type=int, default=128, help="images a step and rank")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
