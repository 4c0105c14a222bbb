"""The main job: the bundled model sampled with and without EB-Cache, with cost, quality and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ebcache_fast import pictures
from ebcache_fast.cache_table import CacheTable
from ebcache_fast.compare import Method, Result, Run, check_count, equal_cost_methods, measure
from ebcache_fast.files import make_folder
from ebcache_fast.models import as_denoiser
from ebcache_fast.presets import BUNDLED, LETTERS, Preset, default_device, labels_in_turn, labels_of, load_letters
from ebcache_fast.quality import Judge
from ebcache_fast.report import command_line, write_report
from ebcache_fast.sampling import DEFAULT_CFG_SCALE

if TYPE_CHECKING:
    from PIL import Image

TABLES = (("EB-Cache, about 1.5x", "letters-ddpm-50-1.5x"), ("EB-Cache, about 2.5x", "letters-ddpm-50-2.5x"))
DEFAULT_SAMPLES = 104  # four of each letter


def demo(
    out: Path,
    text: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Result]:
    """Run every method on the same noise; write comparison.png and report.json into ``out``.

    ``text`` is what the picture spells, the alphabet by default. ``on_start`` gets the number of sample-steps to come,
    ``on_step`` how many are done. Raises InputError for a bad text or sample count, JobError if ``out`` is unwritable.
    """
    check_count(samples)
    shown = labels_of(LETTERS if text is None else text)
    labels = shown + labels_in_turn(samples, len(LETTERS))[: max(0, samples - len(shown))]
    make_folder(out)
    preset = load_letters(default_device())
    judge = Judge(preset.judge, preset.reference)
    methods = demo_methods(preset)
    runs, results = measure(preset.model, methods, labels, judge, seed=seed, on_start=on_start, on_step=on_step)
    pictures.save_picture(draw_comparison(results, runs, len(shown)), out / "comparison.png")
    command = command_line("demo", {"text": text, "out": out, "samples": samples, "seed": seed})
    settings = {"model": BUNDLED, "sampler": methods[0].sampler, "cfg_scale": DEFAULT_CFG_SCALE, "seed": seed}
    write_report(out / "report.json", results, labels, command, settings)
    return results


def demo_methods(preset: Preset) -> list[Method]:
    """No caching, EB-Cache at two costs, and FORA and fewer steps at each of those costs."""
    shape = as_denoiser(preset.model).shape
    return equal_cost_methods(shape, [(name, CacheTable.named(table).plan(shape)) for name, table in TABLES])


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
    subtitle = "Same model, same noise. Each cell of a strip is one sampling step, the first at the left."
    return pictures.comparison("EB-Cache on the bundled letter model", subtitle, rows, columns, scale)


def _note(result: Result) -> str:
    """What a method's speed and quality were, in one line."""
    speed = f"{result.speedup:.2f}x measured, {result.mac_limit:.2f}x by MACs"
    scores = result.scores
    return speed if scores is None else f"{speed}, {scores.recognised:.1%} of {scores.n} recognised"
