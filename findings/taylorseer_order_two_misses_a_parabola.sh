#!/bin/sh
# diffusers 0.42.1's and cache-dit 1.5.3's TaylorSeer of order 2, fed the values of a parabola, with torch 2.13.0 on a CPU.
#
# Expected: three values fix a parabola, so that a forecast of order 2 made of three of its values is the parabola.
# Happens: both miss it from the first forecast on, by the interval times the distance: their first derivative is the
# difference of the last two values, which is the slope half an interval before the last one, and stands where the slope
# at the last one belongs. The polynomial through the same three values is exact, at the same cost. Order 1 is exact on a
# line, as everybody would guess.
# Matters: a higher order does not cure what a longer interval costs; forecasts of order 2 lag behind whatever bends, and
# whoever compares orders compares that. A law that interpolates needs no more memory.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 cache-dit==1.5.3

"$folder/env/bin/python" - 2>/dev/null <<'PYTHON'
from importlib.metadata import version

import torch
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState as OfCacheDit
from diffusers.hooks.taylorseer_cache import TaylorSeerState as OfDiffusers

INTERVAL, STEPS = 4, 40


def of_diffusers(order, curve):
    state = OfDiffusers(taylor_factors_dtype=torch.float64, max_order=order)
    for step in range(STEPS):
        state.current_step = step
        if step % INTERVAL == 0:
            state.update((curve(step),))
        else:
            yield step, state.predict()[0].item()


def of_cache_dit(order, curve):
    state = OfCacheDit(n_derivatives=order)
    for step in range(STEPS):
        state.mark_step_begin()
        if step % INTERVAL == 0:
            state.update(curve(step))
        else:
            yield step, state.approximate().item()


def through_three(step, curve):
    last = step - step % INTERVAL
    points = [last - n * INTERVAL for n in range(3)]
    total = 0.0
    for a in points:
        share = 1.0
        for b in points:
            share *= 1.0 if a == b else (step - b) / (a - b)
        total += share * curve(a).item()
    return total


def parabola(step):
    return torch.tensor([float(step) ** 2], dtype=torch.float64)


def line(step):
    return torch.tensor([3.0 * step], dtype=torch.float64)


print(f"diffusers {version('diffusers')}, cache-dit {version('cache-dit')}, a full step every {INTERVAL}")
for name, forecasts in (("diffusers", of_diffusers), ("cache-dit", of_cache_dit)):
    late = {step: value for step, value in forecasts(2, parabola) if step > 5 * INTERVAL}
    missed = {step: value - parabola(step).item() for step, value in late.items()}
    print(f"{name}: order 2 on t^2 is off by {[missed[step] for step in (37, 38, 39)]} at 1, 2 and 3 steps ahead")
    assert all(gap == -INTERVAL * (step % INTERVAL) for step, gap in missed.items())
    assert all(abs(value - line(step).item()) < 1e-9 for step, value in forecasts(1, line) if step > 2 * INTERVAL)
exact = [through_three(step, parabola) - parabola(step).item() for step in (37, 38, 39)]
print(f"the polynomial through the same three values is off by {exact}")
assert max(map(abs, exact)) < 1e-9
PYTHON
