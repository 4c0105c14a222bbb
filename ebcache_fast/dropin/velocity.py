"""eps scaling for models that predict velocity, of which noise is but a part."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan
from ebcache_fast.samplers import scaled_v


@dataclass(frozen=True)
class VelocityScaling:
    """Multiplies the noise within a velocity by b: ``v' = v + (b - 1) * eps / alpha`` with ``eps = sigma*x + alpha*v``.

    The predicted x0 then stays what it was with noise ``b * eps`` in its place. See `scaled_v`.
    """

    eps_scale: float
    alpha_bar: tuple[float, ...]  # by timestep

    @classmethod
    def of(cls, target: Any, module: nn.Module, plan: Plan) -> Self | None:
        """The scaling that a plan's b takes for a pipeline with a scheduler, or a module alone; None for predicted eps.

        InputError where that can't be known, as of a scheduler of flow matching, or not at a timestep of the plan.
        """
        scheduler, eps_scale = getattr(target, "scheduler", None), plan.eps_scale
        config = getattr(scheduler, "config", None)
        usual = as_denoiser(module).prediction_type
        predicted = usual if config is None else getattr(config, "prediction_type", "flow")
        if eps_scale == 1 or predicted == "epsilon":
            return None
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        if predicted != "v_prediction" or alpha_bar is None:
            raise InputError(
                f"eps_scale={eps_scale} needs to know the noise in what {type(module).__name__} predicts, "
                f"{predicted!r}; enable its pipeline, whose scheduler knows alphas_cumprod, or leave it at 1"
            )
        scaling = cls(eps_scale, tuple(alpha_bar.tolist()))
        for t in plan.timesteps:
            scaling._alpha_bar_at(t)
        return scaling

    def apply(self, out: Tensor, x: Tensor, t: float) -> None:
        """Scale in place what a model predicts (R, Cout, ...) for latents x (R, C, ...) at timestep t.

        InputError for a timestep that the schedule does not have.
        """
        of_v, of_x = scaled_v(self.eps_scale, self._alpha_bar_at(t))
        channels = min(out.shape[1], x.shape[1])
        out[:, :channels].mul_(of_v).add_(x[:, :channels], alpha=of_x)

    def _alpha_bar_at(self, t: float) -> float:
        if t not in range(len(self.alpha_bar)):
            raise InputError(
                f"t={t} is none of the scheduler's {len(self.alpha_bar)} timesteps, by which "
                f"eps_scale={self.eps_scale} finds the noise; use a scheduler that keeps to them, or eps_scale=1"
            )
        return self.alpha_bar[int(t)]
