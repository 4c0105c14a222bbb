"""eps scaling for models that predict velocity, of which noise is but a part."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.samplers import scaled_v


@dataclass(frozen=True)
class VelocityScaling:
    """Multiplies the noise within a velocity by b: ``v' = v + (b - 1) * eps / alpha`` with ``eps = sigma*x + alpha*v``.

    The predicted x0 then stays what it was with noise ``b * eps`` in its place. See `scaled_v`.
    """

    eps_scale: float
    alpha_bar: tuple[float, ...]  # by timestep

    @classmethod
    def of(cls, target: Any, module: nn.Module, eps_scale: float) -> Self | None:
        """What scaling by b takes for a pipeline with a scheduler, or a module alone; None for one that predicts noise.

        InputError where that can't be known.
        """
        scheduler = getattr(target, "scheduler", None)
        usual = as_denoiser(module).prediction_type
        predicted = getattr(getattr(scheduler, "config", None), "prediction_type", usual)
        if eps_scale == 1 or predicted == "epsilon":
            return None
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        if predicted != "v_prediction" or alpha_bar is None:
            raise InputError(
                f"eps_scale={eps_scale} needs to know the noise in what {type(module).__name__} predicts, "
                f"{predicted!r}; enable its pipeline, whose scheduler knows alphas_cumprod, or leave it at 1"
            )
        return cls(eps_scale, tuple(alpha_bar.tolist()))

    def apply(self, out: Tensor, x: Tensor, t: float) -> None:
        """Scale in place what a model predicts (R, Cout, ...) for latents x (R, C, ...) at timestep t.

        InputError for a timestep that the schedule does not have.
        """
        if t not in range(len(self.alpha_bar)):
            raise InputError(
                f"t={t} is none of the scheduler's {len(self.alpha_bar)} timesteps, by which "
                f"eps_scale={self.eps_scale} finds the noise; use a scheduler that keeps to them, or eps_scale=1"
            )
        of_v, of_x = scaled_v(self.eps_scale, self.alpha_bar[int(t)])
        channels = min(out.shape[1], x.shape[1])
        out[:, :channels].mul_(of_v).add_(x[:, :channels], alpha=of_x)
