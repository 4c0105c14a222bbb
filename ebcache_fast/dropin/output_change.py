"""Changes of outputs that the engine can't make, as it knows no schedule: scaled velocity, corrected noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Correction, Plan
from ebcache_fast.samplers import scaled_v

NEUTRAL = Correction()


@dataclass(frozen=True)
class OutputChange:
    """Linear change of a model's output by its latents, so that the noise in it is scaled by b and corrected.

    Where it is a velocity, ``v' = v + (on_eps * b - 1) * eps / alpha + on_x * x / alpha`` with
    ``eps = sigma * x + alpha * v``: the predicted x0 then stays what it was with the changed noise in its place. See
    `scaled_v`. Where it is noise, the engine scales it by b.
    """

    eps_scale: float
    corrections: Mapping[float, Correction]  # by the timestep of a planned step
    alpha_bar: tuple[float, ...] | None  # by timestep; None where the output is noise

    @classmethod
    def of(cls, target: Any, module: nn.Module, plan: Plan) -> Self | None:
        """The change that a plan means for a pipeline with a scheduler, or a module alone; None for none.

        InputError where it can't be known, as of a scheduler of flow matching, or not at a timestep of the plan.
        """
        scheduler, corrections = getattr(target, "scheduler", None), plan.corrections
        config = getattr(scheduler, "config", None)
        usual = as_denoiser(module).prediction_type
        predicted = usual if config is None else getattr(config, "prediction_type", "flow")
        by_timestep = dict(zip(plan.timesteps, corrections, strict=True)) if corrections else {}
        if predicted == "epsilon":
            return cls(1.0, by_timestep, None) if corrections else None
        if plan.eps_scale == 1 and not corrections:
            return None
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        if predicted != "v_prediction" or alpha_bar is None:
            change = "corrections need" if corrections else f"eps_scale={plan.eps_scale} needs"
            remedy = "use a plan without" if corrections else "leave it at 1"
            raise InputError(
                f"{change} to know the noise in what {type(module).__name__} predicts, "
                f"{predicted!r}; enable its pipeline, whose scheduler knows alphas_cumprod, or {remedy}"
            )
        change_of_v = cls(plan.eps_scale, by_timestep, tuple(alpha_bar.tolist()))
        for t in plan.timesteps:
            change_of_v.factors(t, is_planned=True)
        return change_of_v

    def apply(self, out: Tensor, x: Tensor, t: float, *, is_planned: bool) -> None:
        """Change in place what a model predicts (R, Cout, ...) for latents x (R, C, ...) at timestep t.

        is_planned: the plan was followed there, for which its correction was fitted. InputError for a timestep that the
        schedule does not have.
        """
        of_output, of_x = self.factors(t, is_planned=is_planned)
        channels = min(out.shape[1], x.shape[1])
        out[:, :channels].mul_(of_output).add_(x[:, :channels], alpha=of_x)

    def factors(self, t: float, *, is_planned: bool) -> tuple[float, float]:
        """The factors of the output and of the latents at timestep t; InputError as `apply`."""
        on_eps, on_x = self.corrections.get(t, NEUTRAL) if is_planned else NEUTRAL
        if self.alpha_bar is None:
            return on_eps, on_x
        if t not in range(len(self.alpha_bar)):
            raise InputError(
                f"t={t} is none of the scheduler's {len(self.alpha_bar)} timesteps, by which "
                f"eps_scale={self.eps_scale} finds the noise; use a scheduler that keeps to them, or eps_scale=1"
            )
        return scaled_v(self.eps_scale * on_eps, self.alpha_bar[int(t)], on_x)
