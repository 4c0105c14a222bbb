"""``calibrate(method="path")``: measure once, search the best path for the target, fit its corrections, try, choose."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ebcache_fast.calibration import path_fit, path_measure
from ebcache_fast.calibration.aim import Aim, window_of
from ebcache_fast.calibration.guided_run import Setting
from ebcache_fast.calibration.path_search import Measurement, Path, best_path
from ebcache_fast.calibration.progress import CalibrationProgress
from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec
from ebcache_fast.policies.forecast import forecast

ORDERS, EXPONENTS = (1, 2), (1.0, 0.5)  # of candidates: one plan each, with corrections and without
LAW = "newton"
TOGETHER = 4  # batches that are run in lockstep, at most; an engine has memory for so many
PROBES = 16  # steps at which growth is measured, at most


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried."""

    path: Path
    order: int
    exponent: float
    plan: Plan
    error: float  # paired, the mean over samples that nothing was fitted on

    @property
    def is_corrected(self) -> bool:
        """True if it corrects the noise."""
        return bool(self.plan.corrections)


@dataclass(frozen=True, kw_only=True)
class PathCalibration:
    """Measurement of a model and a sampler, of which the best plan of any number of computed steps is searched.

    Of the samples, all are measured; a quarter says how errors grow; corrections are fitted on the first half, and the
    candidates tried on the second.
    """

    setting: Setting
    spec: SamplerSpec
    samples: int
    batch_size: int
    allow_amplify: bool
    progress: CalibrationProgress
    on_total: Callable[[int], None]
    options: dict[str, Any]  # that a table does not state elsewhere

    @property
    def shape(self) -> ModelShape:
        """Shape of the model."""
        return self.setting.denoiser.shape

    def table_at(self, aim: Aim) -> CacheTable:
        """The table of as many computed steps as an aim says, of the candidates the one with the least error."""
        self.on_total(self._steps_to_come())
        measured = self.measure()
        candidates = list(self._candidates(measured, aim.computed))
        best = min(candidates, key=lambda candidate: candidate.error)
        return self._table(best, measured, candidates, aim)

    def measure(self) -> Measurement:
        """Measure, or read what the progress file has of it."""
        setting, steps = self.setting, self.setting.steps
        window = window_of(steps)
        done, (sums,) = self.progress.read_array("gram", (steps, window, window))
        for start in range(done, self.samples, self.batch_size):
            part = range(start, min(start + self.batch_size, self.samples))
            sums = sums + path_measure.grams(setting, part, window)
            self.progress.write_array("gram", part.stop, sums)
        probed = path_measure.probes(steps, PROBES)
        growth = np.ones(steps)
        if probed:
            done, (found,) = self.progress.read_array("growth", (len(probed),))
            if not done:
                found = path_measure.growth(setting, self._grown, probed)
                self.progress.write_array("growth", len(self._grown), found)
            growth = path_measure.smoothed(probed, found, steps)
        scaled, factor = setting.sampler.scaling_eps(setting.eps_scale)
        return Measurement(sums / self.samples, scaled.rows[:, 1] * factor, growth)

    def _candidates(self, measured: Measurement, computed: int) -> Iterator[Candidate]:
        """Each plan that is searched, as it is and corrected; a plan that was searched before is tried once."""
        setting, timesteps = self.setting, self.setting.sampler.timesteps
        references = [path_fit.uncached(setting, part) for part in self._fitted]
        targets = [path_fit.uncached(setting, part)[-1] for part in self._tried]
        seen: set[Plan] = set()
        for order, exponent, path in self._paths(measured, computed):
            plan = forecast(timesteps, self.shape, path.computed, order, LAW, eps_scale=setting.eps_scale)
            if plan in seen:
                continue
            seen.add(plan)
            for tried in (plan, path_fit.fitted(setting, self._fitted, plan, references)):
                errors = [
                    error
                    for part, target in zip(self._tried, targets, strict=True)
                    for error in path_fit.paired_errors(path_fit.trajectory(setting, part, tried)[-1], target)
                ]
                yield Candidate(path, order, exponent, tried, float(np.mean(errors)))

    def _paths(self, measured: Measurement, computed: int) -> Iterator[tuple[int, float, Path]]:
        """The best path of each order and weighting; of order 0 where the others look back too far."""
        found = [
            (order, exponent, path)
            for order, exponent in product(ORDERS, EXPONENTS)
            if (path := best_path(measured, computed, order, exponent)) is not None
        ]
        reused = ((0, exponent, best_path(measured, computed, 0, exponent)) for exponent in EXPONENTS)
        yield from found or ((order, exponent, path) for order, exponent, path in reused if path is not None)

    def _table(self, best: Candidate, measured: Measurement, candidates: Sequence[Candidate], aim: Aim) -> CacheTable:
        samplings = self._samplings(candidates)
        options = self.options | {
            "method": "path",
            "samples": self.samples,
            **aim.options,
            "speedup": round(best.plan.mac_limit(self.shape), 4),
            "computed": len(best.path.computed),
            "order": best.order,
            "law": LAW,
            "growth_exponent": best.exponent,
            "corrected": best.is_corrected,
            "predicted_error": round(best.path.cost, 6),
            "paired_error": round(best.error, 6),
            "candidates": len(candidates),
            "samplings": round(samplings, 1),
            "samplings_a_sample": round(samplings / self.samples, 3),
        }
        origin = Provenance(
            by="ebcache_fast.calibrate",
            source="the path search of ebcache_fast: a shortest path over measured errors of forecasts",
            options=options,
            errors={"FORECAST": _errors(measured, best)},
        )
        return CacheTable.from_plan(
            best.plan,
            sampler=self.spec,
            model=dict(self.shape.sizes),
            made=origin,
            allow_amplify=self.allow_amplify,
        )

    @property
    def _half(self) -> int:
        return self.samples // 2

    @property
    def _grown(self) -> range:
        """The samples that say how errors grow: a quarter, in one batch."""
        return range(min(max(1, self.samples // 4), self.batch_size))

    @property
    def _fitted(self) -> list[range]:
        """The samples that corrections are fitted on, in batches that are run together."""
        return self._batches(range(max(1, self._half)))[:TOGETHER]

    @property
    def _tried(self) -> list[range]:
        """The samples that candidates are tried on."""
        return self._batches(range(self._half, self.samples))

    def _batches(self, samples: range) -> list[range]:
        return [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]

    def _steps_to_come(self) -> int:
        """Sample-steps at most, resumed or not; those that only embed are not counted."""
        steps, plans = self.setting.steps, len(ORDERS) * len(EXPONENTS)
        fitted, tried = (sum(map(len, parts)) for parts in (self._fitted, self._tried))
        return (
            self.samples * steps
            + len(self._grown) * (steps + self._steps_after_probes())
            + steps * (fitted + tried + plans * (fitted + 2 * tried))
        )

    def _steps_after_probes(self) -> int:
        steps = self.setting.steps
        return sum(steps - 1 - probed for probed in path_measure.probes(steps, PROBES))

    def _samplings(self, candidates: Sequence[Candidate]) -> float:
        """Cost of all of it in uncached samplings, by MACs."""
        steps, window = self.setting.steps, window_of(self.setting.steps)
        uncached = Plan.uncached(self.setting.sampler.timesteps, self.shape.sites).macs(self.shape)
        embedding = self.shape.fixed_macs * steps / uncached  # a step of nothing else, of a full one
        fitted, tried = (sum(map(len, parts)) for parts in (self._fitted, self._tried))
        full_steps = self.samples * steps + len(self._grown) * (steps + self._steps_after_probes())
        others = self.samples * sum(min(step, window) for step in range(steps))
        runs = sum(c.plan.macs(self.shape) / uncached * (tried + fitted * c.is_corrected) for c in candidates)
        return (full_steps + others * embedding) / steps + fitted + tried + runs


def _errors(measured: Measurement, best: Candidate) -> tuple[float | None, ...]:
    """The predicted RMS error of the noise at each forecast step, None at computed ones."""
    kept: list[int] = []
    found: list[float | None] = []
    for step in range(measured.steps):
        if step in best.path.computed:
            kept.insert(0, step)
            found.append(None)
        else:
            found.append(round(measured.error(kept[: best.order + 1], step), 8))
    return tuple(found)
