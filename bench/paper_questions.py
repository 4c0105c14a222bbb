"""The paper's questions, asked of the bundled model.

    python -m bench.paper_questions --samples 520 --seeds 4

Every answer is one or more tasks, run in as many processes as ``--workers`` says, each on one thread; finished tasks
are kept in ``--out`` beside the result, so that the same command resumes. ``--only equal_cost`` runs one question. The
model is sampled in bfloat16 with latents in float32, as it would be served; the question ``precision`` shows what that
changes.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.default_model.calibrate_tables import SCHEDULES, all_tables
from ebcache_fast import sample
from ebcache_fast.apps.bundled import Preset, labels_in_turn, load_letters
from ebcache_fast.apps.compare import Method, equal_cost_methods
from ebcache_fast.apps.quality import paired_error, score
from ebcache_fast.apps.report import machine
from ebcache_fast.engine.cache import FeatureCache, every_output
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.runner import Runner
from ebcache_fast.engine.trajectory import Prediction, split
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.models import as_denoiser
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.update import sampler_update
from ebcache_fast.plan import Plan, lower
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies import fora
from ebcache_fast.samplers import make_sampler, trajectory_noise
from ebcache_fast.samplers.schedule import NoiseSchedule, respaced_timesteps

Task = tuple[str, dict[str, Any], int, int]  # question, setting, seed, samples
BATCH = 104
FEW_STEPS = 20  # few steps: exposure bias is larger, and more of b's values can be tried
SCALES = (0.955, 0.98, 0.99, 1.0, 1.01, 1.02, 1.036)


@cache
def letters() -> Preset:
    """The bundled model in bfloat16, loaded once a process."""
    torch.set_num_threads(1)
    preset = load_letters()
    preset.model.to(torch.bfloat16)
    return preset


def precision(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """Whether bfloat16 changes an answer: the same samples in float32."""
    labels = labels_in_turn(samples, 26)
    low = sample(letters().model, labels, steps=FEW_STEPS, seed=seed, batch_size=BATCH)
    high = sample(load_letters().model, labels, steps=FEW_STEPS, seed=seed, batch_size=BATCH)
    return {
        "bfloat16": score_of(low, labels),
        "float32": score_of(high, labels),
        "paired_error": float(paired_error(low, high).mean()),
    }


def score_of(images: Tensor, labels: list[int]) -> dict[str, float]:
    """All scores of some samples against the real data."""
    preset = letters()
    return asdict(score(preset.judge(images), torch.tensor(labels), preset.reference))


def scale(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """Table 5: which factor b on eps is best, with and without caching, and on which side of 1 it lies."""
    preset = letters()
    labels = labels_in_turn(samples, 26)
    table = CacheTable.named(setting["table"]) if setting["table"] else None
    images = sample(
        preset.model,
        labels,
        table=table,
        steps=FEW_STEPS,
        cfg_scale=setting["cfg_scale"],
        eps_scale=setting["eps_scale"],
        allow_amplify=True,
        seed=seed,
        batch_size=BATCH,
    )
    return score_of(images, labels)


def equal_cost(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """Table 1: EB-Cache, FORA and fewer steps at equal cost, each against the uncached samples of the same noise."""
    preset = letters()
    shape = as_denoiser(preset.model).shape
    labels = labels_in_turn(samples, 26)
    sampler, steps = setting["sampler"], setting["steps"]
    wanted = [w for w in all_tables() if (w.sampler, w.steps) == (sampler, steps)]
    plans = {w: CacheTable.load(w.path).plan(shape) for w in wanted}
    ours = [(f"EB-Cache, {w.described}, {w.target}x", plan) for w, plan in plans.items() if not w.criterion]
    methods = equal_cost_methods(shape, ours, sampler)
    methods += [
        Method(f"EB-Cache, {w.described}, {w.target}x", plan, sampler) for w, plan in plans.items() if w.criterion
    ]
    uncached: Tensor | None = None
    answers: dict[str, Any] = {}
    for method in methods:
        images = sample(preset.model, labels, table=method.plan, sampler=sampler, seed=seed, batch_size=BATCH)
        uncached = images if uncached is None else uncached
        limit = methods[0].plan.macs(shape) / method.plan.macs(shape)
        answers[f"{method.name} ({limit:.2f}x)"] = score_of(images, labels) | {
            "macs": method.plan.macs(shape),
            "mac_limit": limit,
            "paired_error": float(paired_error(images, uncached).mean()),
        }
    return answers


def exposure(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """Figures 2 and 3: eps norm and SNR along the trajectory, beside eps on really noised data, by cache interval."""
    preset = letters()
    denoiser = as_denoiser(preset.model)
    timesteps = respaced_timesteps(1000, 50)
    plan = fora(timesteps, setting["interval"], denoiser.shape)
    labels = torch.tensor(labels_in_turn(samples, 26))
    norms, snrs = torch.zeros(50), torch.zeros(50)
    for latents, predicted, final in trajectories(plan, labels, seed):
        alpha_bar = torch.tensor(NoiseSchedule.linear().respace(timesteps).alpha_bar.copy()).float()
        signal = alpha_bar.sqrt().view(-1, 1, 1, 1, 1) * final  # (S, N, C, H, W)
        noise = torch.stack(latents) - signal
        norms += torch.stack([eps.square().mean(dim=(1, 2, 3)).sqrt().sum() for eps in predicted])
        snrs += (signal.square().mean(dim=(2, 3, 4)) / noise.square().mean(dim=(2, 3, 4))).sum(dim=1)
    return {"eps_norm": (norms / samples).tolist(), "snr": (snrs / samples).tolist()}


def real_norm(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """The eps norm on really noised data at the same timesteps: what `exposure` is held against."""
    preset = letters()
    denoiser = as_denoiser(preset.model)
    timesteps = respaced_timesteps(1000, 50)
    alpha_bar = NoiseSchedule.linear().respace(timesteps).alpha_bar
    generator = torch.Generator().manual_seed(seed)
    real = preset.real.repeat(-(-samples // len(preset.real)), 1, 1, 1)[:samples]
    labels = torch.arange(samples) % 26
    norms = []
    for i in range(50):
        noise = torch.randn(real.shape, generator=generator)
        x = alpha_bar[i] ** 0.5 * real + (1 - alpha_bar[i]) ** 0.5 * noise
        total = 0.0
        for rows in torch.arange(samples).split(BATCH):
            plan = Plan.uncached(timesteps[i : i + 1], denoiser.shape.sites)
            run = Guided(plan, labels[rows])
            eps = run.predict(0, x[rows], fresh_cache(2 * len(rows))).eps
            total += float(eps.square().mean(dim=(1, 2, 3)).sqrt().sum())
        norms.append(total / samples)
    return {"eps_norm": norms}


def similarity(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """Figure 6: cosine similarity of each layer's attention and MLP output between consecutive steps."""
    preset = letters()
    denoiser = as_denoiser(preset.model)
    shape = denoiser.shape
    timesteps = respaced_timesteps(1000, 50)
    plan = Plan.uncached(timesteps, shape.sites)
    totals = {branch: torch.zeros(49, shape.depth) for branch in shape.branches}
    for part in torch.arange(samples).split(BATCH):
        labels = part % 26
        caches = [fresh_cache(2 * len(part)) for _ in range(2)]
        for i, _, _ in walk(plan, labels, seed, int(part[0]), caches):
            if i == 0:
                continue
            for branch, total in totals.items():
                for layer in range(shape.depth):
                    now, before = (
                        caches[(i - k) % 2].output(shape.sites.index((layer, branch))).flatten(1).float()
                        for k in (0, 1)
                    )
                    cosine = torch.cosine_similarity(now, before, dim=1)
                    total[i - 1, layer] += float(cosine.mean()) * len(part)
    return {branch.value: (total / samples).tolist() for branch, total in totals.items()}


def gating(setting: dict[str, Any], seed: int, samples: int) -> dict[str, Any]:
    """Whether to cache a branch before or after its gate: "gated" reuses the gate of the step that stored it."""
    preset = letters()
    shape = as_denoiser(preset.model).shape
    plan = fora(respaced_timesteps(1000, FEW_STEPS), setting["interval"], shape)
    labels = torch.tensor(labels_in_turn(samples, 26))
    finals = [final for _, _, final in trajectories(plan, labels, seed, gated=setting["gated"])]
    images = torch.cat(finals)
    uncached = sample(preset.model, labels, steps=FEW_STEPS, seed=seed, batch_size=BATCH)
    return score_of(images, labels.tolist()) | {"paired_error": float(paired_error(images, uncached).mean())}


def fresh_cache(rows: int) -> FeatureCache:
    denoiser = as_denoiser(letters().model)
    return FeatureCache.full(denoiser.shape, rows, torch.bfloat16, torch.device("cpu"))


class Guided:
    """A guided batch under one plan, with caches of the caller's choosing and modulation open to change."""

    @torch.no_grad()
    def __init__(self, plan: Plan, labels: Tensor) -> None:
        denoiser, guidance = as_denoiser(letters().model), Guidance(1.5)
        rows = guidance.row_labels(denoiser, labels)
        self._out_channels, self._rows = denoiser.out_channels, len(rows)
        shape, memory = denoiser.shape, every_output(denoiser.shape)
        self._programs = [lower(step, shape.site_shapes, memory, samples=False) for step in plan.steps]
        self.modulation = ModulationTable.of(denoiser, plan.timesteps, rows)
        guide = guidance.guide(denoiser, plan.eps_scale, torch.float32)
        workspace = Workspace(torch.bfloat16, torch.device("cpu"))
        self._runner = Runner(denoiser, ops.TORCH, self.modulation, guide, workspace, per_run=workspace)

    @torch.no_grad()
    def predict(self, i: int, x: Tensor, cache: FeatureCache) -> Prediction:
        """eps and variance of step ``i`` for latents x (N, C, H, W)."""
        out = x.new_empty(self._rows, self._out_channels, *x.shape[2:])
        self._runner.clock.set(i)
        self._runner.predict(self._programs[i], x, cache, out)
        return split(out, len(x), x.shape[1])


def walk(
    plan: Plan, labels: Tensor, seed: int, first: int, caches: list[FeatureCache], gated: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sample one batch step by step, yielding (i, latents after the step, eps); step i uses ``caches[i % n]``."""
    sampler = make_sampler("ddpm", len(plan))
    noise = trajectory_noise(
        seed, range(first, first + len(labels)), len(plan), as_denoiser(letters().model).latent_shape
    )
    run = Guided(plan, labels)
    gates = run.modulation.sites[:, :, 2]  # (S, K, U, D)
    x, stored = noise[0], 0
    for i, step_plan in enumerate(plan.steps):
        if not step_plan.reused:
            stored = i
        elif gated:
            gates[i] = gates[stored]
        eps, variance = run.predict(i, x, caches[i % len(caches)])
        x = sampler_update(x, eps, variance, noise[i + 1], sampler.rows[i])
        yield i, x, eps


def trajectories(
    plan: Plan, labels: Tensor, seed: int, gated: bool = False
) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
    """For each batch: the latents before every step, eps of every step, and the final latents."""
    denoiser = as_denoiser(letters().model)
    for start in range(0, len(labels), BATCH):
        part = labels[start : start + BATCH]
        first = trajectory_noise(seed, range(start, start + len(part)), 0, denoiser.latent_shape)[0]
        latents, predicted = [first], []
        for _, x, eps in walk(plan, part, seed, start, [fresh_cache(2 * len(part))], gated):
            latents.append(x)
            predicted.append(eps)
        yield latents[:-1], predicted, latents[-1]


QUESTIONS: dict[str, tuple[Callable[..., dict[str, Any]], list[dict[str, Any]]]] = {
    "equal_cost": (equal_cost, [{"sampler": sampler, "steps": steps} for sampler, steps in SCHEDULES]),
    "precision": (precision, [{}]),
    "exposure": (exposure, [{"interval": n} for n in (1, 2, 3)]),
    "real_norm": (real_norm, [{}]),
    "similarity": (similarity, [{}]),
    "gating": (gating, [{"interval": n, "gated": g} for n in (2, 3) for g in (False, True)]),
    "scale": (
        scale,
        [
            {"eps_scale": b, "cfg_scale": cfg, "table": table}
            for cfg, table in ((1.0, None), (1.5, None), (1.5, "letters-ddpm-20-1.5x"))
            for b in SCALES
        ],
    ),
}


def answer(task: Task) -> dict[str, Any]:
    """Run one task."""
    question, setting, seed, samples = task
    started = time.time()
    figures = QUESTIONS[question][0](setting, seed, samples)
    return {
        "question": question,
        "setting": setting,
        "seed": seed,
        "samples": samples,
        "seconds": round(time.time() - started, 1),
        "figures": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=520)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=sorted(QUESTIONS), nargs="*", default=list(QUESTIONS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/letters-paper-questions.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    finished = json.loads(args.out.read_text())["answers"] if args.out.exists() else []
    done = {json.dumps([a["question"], a["setting"], a["seed"], a["samples"]], sort_keys=True) for a in finished}
    tasks: list[Task] = [
        (question, setting, seed, args.samples)
        for seed in range(args.seeds)
        for question in args.only
        for setting in QUESTIONS[question][1]
    ]
    waiting = [task for task in tasks if json.dumps(list(task), sort_keys=True) not in done]
    with ProcessPoolExecutor(args.workers) as pool:
        for future in as_completed(pool.submit(answer, task) for task in waiting):
            finished.append(future.result())
            last = finished[-1]
            print(f"{len(finished)}/{len(tasks)} {last['question']} {last['setting']} {last['seconds']} s", flush=True)
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps({"machine": machine(), "answers": finished}, indent=1))
            partial.replace(args.out)


if __name__ == "__main__":
    main()
