"""Any plan of rules, run by a naive float64 loop over a tiny model's own layers, and by the engine."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from fake_graphs import FakeGraphs
from numpy.polynomial.hermite import hermval
from tiny import tiny_dit
from torch import Tensor

from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.models import DiT, as_denoiser
from ebcache_fast.plan import (
    Branch,
    Compute,
    Forecast,
    ForecastSpan,
    FullAndWindow,
    KeepSpan,
    Plan,
    Reuse,
    Rule,
    SharedByGuidance,
    SkipSpan,
    StepPlan,
    StepType,
    Tokens,
    Window,
    layered,
)
from ebcache_fast.plan.rules import Refill

DEPTH, ROWS = 3, 4
SITES = layered(DEPTH, (Branch.SELF_ATTN, Branch.MLP))
MODEL = tiny_dit(7, depth=DEPTH, input_size=16)  # 16 tokens
TIMESTEPS = (931, 800, 655, 420, 300, 111, 40, 3)
LABELS = torch.tensor([1, 4, 2, 5])
FULL = StepPlan.uniform(StepType.NO_CACHE, SITES)


# ------------------------------------------------------------------------------------------- the naive loop


class Kept(NamedTuple):
    """What the naive loop remembers: of each site, by age, outputs and their steps; rests; changes of spans."""

    outputs: dict[tuple[int, int], tuple[int, Tensor]]
    rests: dict[int, Tensor]
    changes: dict[tuple[int, int, int], tuple[int, Tensor]]


def windowed(model: DiT, layer: int, u: Tensor, width: int) -> Tensor:
    """Attention of a layer, one token at a time, over those at most half of ``width`` away."""
    attention = model.blocks[layer].attn
    heads, tokens = attention.num_heads, u.shape[1]
    q, k, v = (one.unflatten(2, (heads, -1)) for one in attention.qkv(u).chunk(3, dim=2))
    out = torch.empty_like(q)
    for i in range(tokens):
        near = [j for j in range(tokens) if abs(i - j) <= width // 2]
        scores = torch.einsum("nhd,njhd->nhj", q[:, i], k[:, near]) / math.sqrt(q.shape[-1])
        out[:, i] = torch.einsum("nhj,njhd->nhd", scores.softmax(dim=2), v[:, near])
    return attention.proj(out.flatten(2))


def forecast(values: Sequence[tuple[int, Tensor]], now: int, law: str) -> Tensor:
    """Each law by its own recurrence, on the tensors themselves."""
    recent = sorted(dict(values).items(), key=lambda one: -one[0])
    if law == "newton":
        return neville(recent, now)
    if law == "adams-bashforth" and len(recent) > 2:
        slopes = [(b - a) / (j - i) for (i, a), (j, b) in pairwise(recent[:3])]
        return recent[0][1] + (now - recent[0][0]) * (1.5 * slopes[0] - 0.5 * slopes[1])
    differences, total = [value for _, value in recent], torch.zeros_like(recent[0][1])
    for order in range(len(recent)):
        distance = now - recent[0][0]
        power = distance**order if law != "hermite" else hermval(distance / 2, [0] * order + [1]) / 2**order
        total = total + differences[0] * power / math.factorial(order)
        differences = [
            (differences[i] - differences[i + 1]) / (recent[i][0] - recent[i + 1][0])
            for i in range(len(differences) - 1)
        ]
    return total


def neville(points: Sequence[tuple[int, Tensor]], now: int) -> Tensor:
    """The polynomial through all points, by Neville's recurrence."""
    if len(points) == 1:
        return points[0][1]
    (first, _), (last, _) = points[0], points[-1]
    return ((now - last) * neville(points[:-1], now) - (now - first) * neville(points[1:], now)) / (first - last)


@torch.no_grad()
def naive(plan: Plan, xs: Tensor, y: Tensor) -> list[Tensor]:
    """Every step's output for rows of these labels, branch by branch."""
    kept, found = Kept({}, {}, {}), []
    for now, (step, t) in enumerate(zip(plan.steps, plan.timesteps, strict=True)):
        c = MODEL.t_embedder(torch.full((len(y),), t)) + MODEL.y_embedder(y)
        h = MODEL.x_embedder(xs[now]) + MODEL.pos_embed
        skipped_to, before = -1, h
        for site, rule in enumerate(step.rules):
            for span in step.spans:
                if span.first == site:
                    before = h
                    if isinstance(span, SkipSpan):
                        h, skipped_to = h + kept.changes[span.first, span.last, 0][1], span.last
                    if isinstance(span, ForecastSpan):
                        changes = [kept.changes[span.first, span.last, age] for age in range(span.order + 1)]
                        h, skipped_to = h + forecast(changes, now, span.law), span.last
            if site > skipped_to:
                h = naive_site(kept, site, rule, h, c, now)
            for span in step.spans:
                if span.last == site and isinstance(span, KeepSpan):
                    for age in range(span.age, span.age + span.ages):
                        kept.changes[span.first, span.last, age] = now, h - before
        side, patch = xs.shape[-1] // MODEL.patch_size, MODEL.patch_size
        grid = MODEL.final_layer(h, c).view(len(y), side, side, patch, patch, -1)
        found.append(torch.einsum("nhwpqc->nchpwq", grid).reshape(len(y), -1, *xs.shape[3:]))
    return found


def naive_site(kept: Kept, site: int, rule: Rule, h: Tensor, c: Tensor, now: int) -> Tensor:
    """The stream after one site."""
    layer, is_mlp = divmod(site, 2)
    block = MODEL.blocks[layer]
    shift, scale, gate = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)[3 * is_mlp : 3 * is_mlp + 3]
    u = (block.norm2 if is_mlp else block.norm1)(h) * (1 + scale) + shift
    run = block.mlp if is_mlp else block.attn
    match rule:
        case Compute(age):
            out = run(u)
            kept.outputs[site, age] = now, out
        case Refill(ages):
            out = run(u)
            kept.outputs.update(((site, age), (now, out)) for age in range(ages))
        case Reuse(age):
            out = kept.outputs[site, age][1]
        case Forecast(order, law):
            out = forecast([kept.outputs[site, age] for age in range(order + 1)], now, law)
        case Tokens(count):
            out = kept.outputs[site, 0][1].clone()
            for row in range(len(out)):
                largest = sorted(range(out.shape[1]), key=lambda i: -float(out[row, i].norm()))[:count]
                out[row, largest] = run(u[row : row + 1, largest])[0]
            kept.outputs[site, 0] = now, out
        case FullAndWindow(width):
            out = run(u)
            kept.outputs[site, 0], kept.rests[site] = (now, out), out - windowed(MODEL, layer, u, width)
        case Window(width):
            out = windowed(MODEL, layer, u, width) + kept.rests[site]
        case SharedByGuidance():
            out = run(u[: len(u) // 2]).repeat(2, 1, 1)
            kept.outputs[site, 0] = now, out
    return h + gate * out


# ---------------------------------------------------------------------------------------------- the engine


def latents(steps: int) -> Tensor:
    """(steps, rows, C, H, W); the halves of a guided batch are alike."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(steps, ROWS // 2, 4, 16, 16, generator=generator, dtype=torch.float64).repeat(1, 2, 1, 1, 1)


def ours(plan: Plan, xs: Tensor, *, guided: bool = False, graphs: FakeGraphs | None = None) -> list[Tensor]:
    engine = Engine(MODEL, make_graphs=no_graphs if graphs is None else lambda _: graphs)
    batch = Batch(LABELS, ROWS // 2 if guided else ROWS, 0, as_denoiser(MODEL).latent_shape)
    run = engine.forward_run(plan, batch, Tail())
    return [run.predict(i, xs[i]).clone() for i in range(len(plan))]
