"""diffusers' schedulers at work: their loop with noise that we give them, and eps scaled outside of them."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]  # latents and a timestep -> a model's output


def scheduler_loop(
    scheduler: Any, x: Tensor, noise: Tensor, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """The latents at the end of as many steps as there is noise (S, *x.shape), as the pipelines take them."""
    kept: list[Tensor] = []
    scheduler.set_timesteps(len(noise))
    for i, t in enumerate(scheduler.timesteps):
        drawn = noise[i].clone()
        monkeypatch.setattr(
            sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, drawn=drawn, **__: drawn, raising=False
        )
        x = _step(scheduler, predict(x, int(t)), scheduler.timesteps, i, x, kept)
    return x


def _step(scheduler: Any, out: Tensor, timesteps: Sequence[Tensor], i: int, x: Tensor, kept: list[Tensor]) -> Tensor:
    """One step; ``kept`` holds what CogVideoX's pipelines carry over."""
    if type(scheduler).__name__ != "CogVideoXDPMScheduler":
        return scheduler.step(out, timesteps[i], x, return_dict=False)[0]
    data, before = (kept.pop(), timesteps[i - 1]) if i else (None, None)
    x, data = scheduler.step(out, data, timesteps[i], before, x, return_dict=False)
    kept.append(data)
    return x


def with_scaled_eps(
    scheduler: Any, predict: Predict, b: float, corrections: Mapping[int, tuple[float, float]] | None = None
) -> Predict:
    """The same model, its eps scaled by b, and corrected, outside of any sampler: the contract's formula."""

    def scaled(x: Tensor, t: int) -> Tensor:
        out, alpha_bar = predict(x, t), float(scheduler.alphas_cumprod[t])
        on_eps, on_x = (corrections or {}).get(t, (1.0, 0.0))
        if scheduler.config.prediction_type == "epsilon":
            return on_eps * b * out + on_x * x
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        eps = alpha * out + sigma * x
        return out if alpha < 0.05 else (on_eps * b * eps + on_x * x - sigma * x) / alpha

    return scaled
