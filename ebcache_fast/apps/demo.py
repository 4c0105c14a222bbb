"""The main job: the bundled model sampled with and without EB-Cache, with cost, quality and a picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from ebcache_fast.apps import pictures
from ebcache_fast.apps.bundled import BUNDLED, LETTERS, Preset, default_device, labels_in_turn, labels_of, load_letters
from ebcache_fast.apps.compare import BATCH, Method, Result, Run, check_count, measure
from ebcache_fast.apps.quality import Judge
from ebcache_fast.apps.report import command_line, write_report
from ebcache_fast.apps.room import check_run
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan
from ebcache_fast.plan.files import make_folder
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies import fora_at_cost, taylorseer
from ebcache_fast.samplers import make_sampler
from ebcache_fast.sampling import DEFAULT_CFG_SCALE

if TYPE_CHECKING:
    from PIL import Image

STEPS: Final[Mapping[str, int]] = MappingProxyType({"ddim": 20, "ddpm": 50})  # by sampler; there are tables for these
SPEEDUPS = (1.5, 2.5)
SOLVER = "dpm-solver++"  # also without noise after the first, so that its samples can be held against DDIM's
DEFAULT_SAMPLER = "ddim"  # draws no noise after the first: whoever takes fewer steps goes towards the same picture
DEFAULT_SAMPLES = 156  # six of each letter


def demo(
    out: Path,
    text: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Result]:
    """Run every method on the same noise; write comparison.png and report.json into ``out``.

    ``text`` is what the picture spells, the alphabet by default. ``sampler`` is one of `STEPS`: under "ddpm" fewer
    steps draw other noise, and their error says nothing. ``on_start`` gets the number of sample-steps to come,
    ``on_step`` how many are done. Raises InputError for a bad text, sampler or sample count, JobError if ``out`` is
    unwritable.
    """
    check_count(samples)
    if sampler not in STEPS:
        raise InputError(f"sampler={sampler!r} has no tables of the bundled model; choose {' or '.join(STEPS)}")
    shown = labels_of(LETTERS if text is None else text)
    make_folder(out)
    preset = load_letters(default_device())
    judge = Judge(preset.judge, preset.reference)
    methods = demo_methods(preset, sampler)
    denoiser, plans = as_denoiser(preset.model), [method.plan for method in methods]
    draws = make_sampler(sampler, len(plans[0])).draws_noise
    check_run(denoiser, samples, BATCH, plans, draws_noise=draws, cfg_scale=DEFAULT_CFG_SCALE)
    labels = shown + labels_in_turn(samples, len(LETTERS))[: max(0, samples - len(shown))]
    runs, results = measure(preset.model, methods, labels, judge, seed=seed, on_start=on_start, on_step=on_step)
    pictures.save_picture(draw_comparison(results, runs, len(shown)), out / "comparison.png")
    command = command_line("demo", {"text": text, "out": out, "samples": samples, "seed": seed, "sampler": sampler})
    settings = {"model": BUNDLED, "sampler": sampler, "cfg_scale": DEFAULT_CFG_SCALE, "seed": seed}
    write_report(out / "report.json", results, labels, command, settings)
    return results


def demo_methods(preset: Preset, sampler: str = DEFAULT_SAMPLER) -> list[Method]:
    """No caching, and at two costs the path search, EB-Cache, FORA, TaylorSeer, and fewer steps, also of a solver."""
    shape, steps = as_denoiser(preset.model).shape, STEPS[sampler]
    timesteps = make_sampler(sampler, steps).timesteps
    methods = [Method(f"No cache, {steps} steps", Plan.uncached(timesteps, shape.sites), sampler)]
    for x in SPEEDUPS:
        named = [(name, CacheTable.named(table).plan(shape)) for name, table in tables_of(sampler, x)]
        path = named[0][1]
        computed = sum(bool(step.computed) for step in path.steps)
        named += [
            ("FORA at its cost", fora_at_cost(timesteps, path.macs(shape), shape)),
            ("TaylorSeer at its cost", taylorseer(timesteps, steps / computed, shape)),
        ]
        methods += [Method(name, plan, sampler) for name, plan in named]
        solvers = {sampler: f"{computed} steps"} | (
            {SOLVER: f"{computed} of DPM-Solver++"} if sampler == "ddim" else {}
        )
        methods += [
            Method(name, Plan.uncached(make_sampler(solver, computed).timesteps, shape.sites), solver)
            for solver, name in solvers.items()
        ]
    return methods


def tables_of(sampler: str, x: float) -> list[tuple[str, str]]:
    """The bundled model's tables for a sampler and a speed-up: what people call each, and its name."""
    about = f"{sampler}-{STEPS[sampler]}-{x}x"
    return [(f"Path search, about {x}x", f"letters-path-{about}"), (f"EB-Cache, about {x}x", f"letters-{about}")]


def draw_comparison(results: Sequence[Result], runs: Sequence[Run], shown: int) -> "Image.Image":
    """The first ``shown`` samples of every method, two alphabets of them where they fit, a short text enlarged."""
    columns = min(shown, len(LETTERS))
    scale = max(2, min(6, 2 * len(LETTERS) // columns))
    kept = shown if shown < len(LETTERS) else 2 * len(LETTERS)
    rows = [
        pictures.Row(
            result.name,
            _note(result),
            result.step_types,
            run.images[:kept],
        )
        for result, run in zip(results, runs, strict=True)
    ]
    subtitle = "Same model, same noise; errors are against the first row. Each cell of a strip is one sampling step."
    return pictures.comparison("EB-Cache on the bundled letter model", subtitle, rows, columns, scale)


def _note(result: Result) -> str:
    """A method's speed and quality in one line."""
    noise = "" if result.noise != "other noise" else " (other noise)"
    figures = f"{result.speedup:.2f}x measured, {result.mac_limit:.2f}x by MACs, error {result.paired_error:.3f}{noise}"
    scores = result.scores
    return figures if scores is None else f"{figures}, {scores.recognised:.1%} of {scores.n} recognised"
