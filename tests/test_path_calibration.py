"""`calibrate(method="path")`: what it measures, fits and chooses, on a tiny model; resumed, and refused."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, relative_error, tiny_dit
from torch import Tensor

from ebcache_fast import enable, sample, stats
from ebcache_fast.calibration import path_fit, path_measure
from ebcache_fast.calibration.aim import at_milliseconds, reachable
from ebcache_fast.calibration.guided_run import Setting
from ebcache_fast.calibration.samples import Prompted
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.errors import InputError, JobError, TableError
from ebcache_fast.models import DiT, DiTDenoiser, as_denoiser
from ebcache_fast.ops.update import sampler_update
from ebcache_fast.plan import Plan
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies.forecast import forecast
from ebcache_fast.samplers import make_sampler, trajectory_noise

STEPS, SCALE = 7, 1.5
CALL = {"samples": 6, "steps": STEPS, "batch_size": 4, "seed": 7, "sampler": "ddim"}


@cache
def model() -> DiT:
    return tiny_dit(6)


def setting(name: str = "ddim", b: float = 1.0, on_step: object = None) -> Setting:
    denoiser = DiTDenoiser(model())
    return Setting(
        engine=Engine(model()),
        denoiser=denoiser,
        labels=torch.arange(6) % CLASSES,
        prompted=Prompted(denoiser.latent_shape, lambda samples: (), 0),
        sampler=make_sampler(name, STEPS),
        guidance=Guidance(SCALE),
        eps_scale=b,
        seed=7,
        on_step=on_step or (lambda _: None),  # type: ignore[arg-type]
    )


@cache
def table() -> CacheTable:
    return calibrate(model(), **CALL, target_speedup=1.6)


# ------------------------------------------------------------------------------------------------- by hand


def change_of(x: Tensor, t: float, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The embedded latents, of conditional rows and of the others, and what all layers add to them."""
    c = model().t_embedder(torch.full((len(labels),), t)) + model().y_embedder(labels)
    before = h = model().x_embedder(x.repeat(2, 1, 1, 1)) + model().pos_embed
    for block in model().blocks:
        h = block(h, c)
    return before, h - before


def head_of(h: Tensor, t: float, labels: Tensor) -> Tensor:
    """Guided noise (N, 4, 8, 8) of the stream after all layers; the fourth channel is not guided."""
    c = model().t_embedder(torch.full((len(labels),), t)) + model().y_embedder(labels)
    grid = model().final_layer(h, c).view(len(labels), 2, 2, 4, 4, -1)
    out = torch.einsum("nhwpqc->nchpwq", grid).reshape(len(labels), -1, 8, 8)
    cond, uncond = out.chunk(2)
    return torch.cat([uncond[:, :3] + SCALE * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], dim=1)


@torch.no_grad()
def test_a_gram_is_of_the_derivatives_of_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less and less mixed in, those of a head that is linearised by hand."""
    monkeypatch.setattr(path_measure, "SMALL", 1e-6)
    samples, window = range(2), 3
    found = path_measure.grams(setting(), samples, window)
    sampler, labels = make_sampler("ddim", STEPS), torch.tensor([0, 1, CLASSES, CLASSES])
    x, changes = trajectory_noise(7, samples, 0, (4, 8, 8), torch.float64)[0], []
    for k, t in enumerate(sampler.timesteps):
        before, change = change_of(x, t, labels)
        recent = changes[::-1][:window]
        moved = [
            torch.func.jvp(lambda h, t=t: head_of(h, t, labels)[:, :4], (before + change,), (other - change,))[1]
            for other in recent
        ]
        for a, one in enumerate(moved):
            for b, other in enumerate(moved):
                assert found[k, a, b] == pytest.approx(float((one * other).sum()) / x[0].numel(), rel=1e-4)
        assert not found[k, len(recent) :].any()
        changes.append(change)
        x = sampler_update(x, head_of(before + change, t, labels)[:, :4], None, None, sampler.rows[k])


@torch.no_grad()
def test_growth_is_of_the_displacement_that_a_forecast_causes() -> None:
    sampler, labels = make_sampler("ddim", STEPS), torch.tensor([0, 1, CLASSES, CLASSES])
    probed = (2, 5, 6)
    found = path_measure.growth(setting(), range(2), probed)

    def run(x: Tensor, first: int, pushed_at: int) -> tuple[Tensor, Tensor | None]:
        changes: list[Tensor] = []
        by = None
        for k, t in list(enumerate(sampler.timesteps))[first:]:
            before, change = change_of(x, t, labels)
            eps = head_of(before + change, t, labels)[:, :4]
            after = sampler_update(x, eps, None, None, sampler.rows[k])
            if k == pushed_at:
                mixed = 0.7 * change + 0.3 * (2 * changes[-1] - changes[-2])
                pushed = sampler_update(x, head_of(before + mixed, t, labels)[:, :4], None, None, sampler.rows[k])
                by, after = pushed - after, pushed
            changes.append(change)
            x = after
        return x, by

    start = trajectory_noise(7, range(2), 0, (4, 8, 8), torch.float64)[0]
    end, _ = run(start, 0, -1)
    for k, growth in zip(probed, found, strict=True):
        last, by = run(start, 0, k)
        assert growth == pytest.approx(float((last - end).norm() / by.norm()), rel=1e-6)


def test_growth_between_probes_is_interpolated_and_averaged() -> None:
    assert path_measure.probes(20, 16) == (2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18, 19)
    assert path_measure.probes(4, 16) == (2, 3)
    assert path_measure.probes(2, 16) == ()
    smooth = path_measure.smoothed((2, 6), np.array([1.0, np.e**4]), 8)
    logs = [0, 0, 0, 1, 2, 3, 4, 4]
    assert np.log(smooth) == pytest.approx([np.mean(logs[max(0, k - 2) : k + 3]) for k in range(8)])


# -------------------------------------------------------------------------------------------------- the fit


def plan() -> Plan:
    shape = DiTDenoiser(model()).shape
    return forecast(make_sampler("ddim", STEPS).timesteps, shape, [0, 2, 5], 1)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("b", [1.0, 0.9])
def test_a_run_step_by_step_is_what_sample_does(name: str, b: float) -> None:
    shape = DiTDenoiser(model()).shape
    timesteps = make_sampler(name, STEPS).timesteps
    bare = forecast(timesteps, shape, [0, 2, 5], 1, eps_scale=b)
    corrected = Plan(bare.steps, timesteps, b, [(1 + 0.05 * i, 0.01 * i) for i in range(STEPS)])
    for tried in (bare, corrected):
        x = path_fit.trajectory(setting(name, b), range(1, 4), tried)[-1]
        labels = [k % CLASSES for k in range(1, 4)]
        ours = sample(model(), labels, table=tried, sampler=name, seed=7, first_index=1)
        assert relative_error(x, ours) < 1e-12


def test_corrections_lead_back_to_the_uncached_trajectory() -> None:
    """At each step no others do better, given those before; all parts count."""
    here, parts = setting(), [range(2), range(2, 5)]
    references = [path_fit.uncached(here, part) for part in parts]
    fitted = path_fit.fitted(here, parts, plan(), references)
    assert fitted.corrections[0] == pytest.approx((1, 0), abs=1e-9)

    def error(tried: Plan, step: int) -> float:
        runs = [path_fit.trajectory(here, part, tried)[step + 1] for part in parts]
        ends = zip(runs, references, strict=True)
        return sum(float((x - reference[step + 1]).square().sum()) for x, reference in ends)

    for step in (1, 3, 6):
        least = error(fitted, step)
        for on_eps, on_x in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
            other = list(fitted.corrections)
            other[step] = (other[step][0] + on_eps, other[step][1] + on_x)
            assert error(Plan(plan().steps, plan().timesteps, 1.0, other), step) > least
    assert all(error(fitted, step) < error(plan(), step) for step in range(1, STEPS))


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_is_the_candidate_with_the_least_error_on_samples_that_nothing_was_fitted_on() -> None:
    made = table().made
    assert made is not None
    assert made.options["method"] == "path"
    labels = [k % CLASSES for k in range(3, 6)]
    uncached, ours = (
        sample(model(), labels, table=plan, steps=STEPS, sampler="ddim", seed=7, first_index=3)
        for plan in (None, table())
    )
    errors = path_fit.paired_errors(ours, uncached)
    assert made.options["paired_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert made.options["corrected"] is bool(table().corrections)
    steps = table().plan(DiTDenoiser(model()).shape).steps
    computed = [i for i, step in enumerate(steps) if step.computed]
    assert made.options["computed"] == len(computed)
    assert [i for i, error in enumerate(made.errors["FORECAST"]) if error is None] == computed
    assert table().type_names == ["KEEP" if i in computed else "FORECAST" for i in range(STEPS)]


def test_the_target_is_met_as_near_as_steps_allow(tmp_path: Path) -> None:
    shape, timesteps = DiTDenoiser(model()).shape, make_sampler("ddim", STEPS).timesteps
    speedups = reachable(shape, timesteps)
    file = tmp_path / "progress.json"
    for target in (1.0, 1.3, 1.6, max(speedups.values())):
        made = calibrate(model(), **CALL, target_speedup=target, progress_file=file)
        found = made.plan(shape).mac_limit(shape)
        assert found == pytest.approx(min(speedups.values(), key=lambda speedup: abs(speedup - target)))
        assert made.made is not None
        assert made.made.options["speedup"] == pytest.approx(found, abs=1e-4)
    usual = calibrate(model(), **CALL, progress_file=file)
    assert usual.made is not None
    assert usual.made.options["target_speedup"] == pytest.approx(min(2.0, max(speedups.values())))
    assert usual == calibrate(model(), **CALL, method="path")


def test_a_target_in_milliseconds_goes_by_the_times_of_its_steps() -> None:
    times = {"KEEP": 10.0, "FORECAST": 1.0}
    found = calibrate(model(), **CALL, target_ms=42.0, step_ms=times)
    assert found.type_names.count("KEEP") == 4  # 43 ms; 34 with one less
    assert found.made is not None
    assert (found.made.options["target_ms"], found.made.options["ms"]) == (42.0, 43.0)
    timesteps = tuple(range(STEPS))[::-1]
    for computed in range(1, STEPS + 1):
        assert at_milliseconds(10.0 * computed + (STEPS - computed), times, timesteps).computed == computed


def test_where_all_is_computed_nothing_is_left_to_correct() -> None:
    whole = calibrate(model(), **CALL, target_speedup=1.0)
    assert whole.made is not None
    assert whole.made.options["paired_error"] == pytest.approx(0, abs=1e-9)


def test_it_runs_in_a_forward_and_under_labels() -> None:
    pipe_like = tiny_dit(6)
    enable(pipe_like, table())
    t = table().timesteps
    with torch.no_grad():
        for moment in t:
            pipe_like(torch.zeros(2, 4, 8, 8, dtype=torch.float64), torch.full((2,), moment), torch.tensor([0, 1]))
    assert stats(pipe_like).refreshed == {}
    assert stats(pipe_like).steps == {
        name: table().type_names.count(name) for name in dict.fromkeys(table().type_names)
    }


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++"])
def test_other_samplers(sampler: str) -> None:
    found = calibrate(model(), **(CALL | {"sampler": sampler, "samples": 3}), eps_scale=0.95, target_speedup=1.5)
    assert (found.sampler.name, found.eps_scale) == (sampler, 0.95)  # type: ignore[union-attr]
    assert sample(model(), [0, 1], table=found).isfinite().all()


def test_a_model_whose_layers_add_nothing_has_no_errors() -> None:
    """As one that is fresh: its gates are zero."""
    fresh = DiT(input_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=5).eval()
    found = calibrate(fresh, samples=2, steps=5, sampler="ddim", target_speedup=1.2)
    assert found.made is not None
    assert found.made.options["paired_error"] == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs(steps: int) -> None:
    found = calibrate(model(), samples=1, steps=steps, sampler="ddim")
    assert len(found) == steps
    assert found.plan(as_denoiser(model()).shape).steps[0].computed


# --------------------------------------------------------------------------------------------- interruptions


def test_it_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    file, call = tmp_path / "progress.json", CALL | {"target_speedup": 1.6}
    heard: list[int] = []
    calibrate(model(), **call, on_step=heard.append)
    everything = sum(heard)
    for stop_after in (5, 30, 80):
        ran: list[int] = []

        def stop(count: int, ran: list[int] = ran, limit: int = stop_after) -> None:
            ran.append(count)
            if sum(ran) > limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(model(), **call, progress_file=file, on_step=stop)
    rest: list[int] = []
    assert calibrate(model(), **call, progress_file=file, on_step=rest.append) == table()
    assert sum(rest) < everything


def test_the_progress_bar_is_told_how_much_there_is() -> None:
    heard, totals = [], []
    calibrate(model(), **CALL, target_speedup=1.6, on_step=heard.append, on_total=totals.append)
    assert len(totals) == 1
    assert 0 < sum(heard) <= totals[0]


def test_another_calls_file_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    calibrate(model(), **CALL, progress_file=file)
    with pytest.raises(JobError, match="seed 7, not 8"):
        calibrate(model(), **(CALL | {"seed": 8}), progress_file=file)
    with pytest.raises(JobError, match="belongs to a calibration with"):
        calibrate(model(), **CALL, method="algorithm1", progress_file=file)
    content = json.loads(file.read_text())

    def spoil(key: str, value: object) -> None:
        file.write_text(json.dumps(content | {"tallies": content["tallies"] | {key: value}}))

    gram = content["tallies"]["gram"]
    for key, value in (
        ("gram", 3),
        ("gram", gram | {"arrays": [[1.0]]}),
        ("gram", gram | {"samples": "many"}),
        ("gram", {"samples": 4}),
        ("growth", {"samples": 1, "arrays": [[float("nan")] * 5]}),
    ):
        spoil(key, value)
        with pytest.raises(JobError, match=rf"entry '{key}' is damaged .*; delete the file"):
            calibrate(model(), **CALL, progress_file=file)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target_speedup": 0.5}, r"^target_speedup=0\.5 is outside \[1, \d\.\d+\], .* reachable are \d\.\d+ \(1 comp"),
        ({"target_speedup": 50}, r"^target_speedup=50 is outside \[1, \d\.\d+\], all that 7 steps allow by MACs; "),
        ({"target_speedup": "fast"}, r"^target_speedup='fast' is no number"),
        ({"target_speedup": float("nan")}, r"^target_speedup=nan is outside"),
        ({"target_speedup": True}, r"^target_speedup=True is no number"),
        (
            {"target_ms": 30},
            r"^step_ms=\{\} has to say how many milliseconds a step of KEEP and of FORECAST takes, each",
        ),
        ({"target_ms": 30, "step_ms": {"KEEP": 1}}, r"^step_ms=\{'KEEP': 1\} has to say"),
        ({"target_ms": 30, "step_ms": {"KEEP": 1, "FORECAST": -1}}, r"^step_ms=.* has to say"),
        ({"target_ms": 80, "step_ms": {"KEEP": 10, "FORECAST": 1}}, r"^target_ms=80 is outside \[16, 70\], what 7 st"),
        ({"target_ms": 30, "target_speedup": 2.0}, r"^target_ms is for method='path', and in the place of"),
        ({"target_ms": 30, "method": "algorithm1"}, r"^target_ms is for method='path', and in the place of"),
        ({"method": "guess"}, r"^method='guess' is unknown; choose path or algorithm1$"),
        ({"samples": 0}, r"^samples=0 and batch_size=4 must be 1 or more"),
    ],
)
def test_bad_input(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        calibrate(model(), **(CALL | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([1, 2],), r"^computed: expected indices from 0 to 6, 0 among them, got \[1, 2\]; a forecast needs"),
        (([],), r"^computed: expected indices from 0 to 6"),
        (([0, 7],), r"^computed: expected indices from 0 to 6"),
        (([0], 5), r"^order: expected 0 to 4, got 5$"),
        (([0], True), r"^order: expected 0 to 4, got True$"),
        (([0, 1], 1, "guess"), r"law: expected one of taylor, newton, "),
        (([0], 1, "taylor", "heads"), r"^of: expected stack or branches, got 'heads'$"),
    ],
)
def test_a_forecast_of_steps_that_there_are_not(arguments: Sequence[object], problem: str) -> None:
    shape = DiTDenoiser(model()).shape
    with pytest.raises(TableError, match=problem):
        forecast(tuple(range(STEPS))[::-1], shape, *arguments)  # type: ignore[arg-type]
