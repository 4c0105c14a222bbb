"""The main job: the bundled model sampled with and without EB-Cache, with cost, quality and a picture."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ebcache_fast import ops, pictures
from ebcache_fast._version import __version__
from ebcache_fast.cache_table import CacheTable
from ebcache_fast.compare import Method, Result, Run, equal_cost_methods, judge_runs, run_methods
from ebcache_fast.errors import InputError
from ebcache_fast.files import make_folder, replacing
from ebcache_fast.models import as_denoiser
from ebcache_fast.presets import LETTERS, Preset, default_device, labels_in_turn, labels_of, load_letters
from ebcache_fast.sampling import DEFAULT_CFG_SCALE

if TYPE_CHECKING:
    from PIL import Image

TABLES = (("EB-Cache, about 1.5x", "letters-ddpm-50-1.5x"), ("EB-Cache, about 2.5x", "letters-ddpm-50-2.5x"))
DEFAULT_SAMPLES = 104  # four of each letter
MIN_SAMPLES = 32  # a Frechet distance of fewer says nothing
BATCH = 26


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
    runs, results = measure(preset, demo_methods(preset), labels, seed, on_start=on_start, on_step=on_step)
    pictures.save_picture(draw_comparison(results, runs, len(shown)), out / "comparison.png")
    write_report(out / "report.json", results, seed)
    return results


def measure(
    preset: Preset,
    methods: Sequence[Method],
    labels: Sequence[int],
    seed: int,
    cfg_scale: float = DEFAULT_CFG_SCALE,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[list[Run], list[Result]]:
    """Run and judge ``methods`` on the bundled model; InputError for no method, or too few samples to judge by."""
    check_count(len(labels))
    y = torch.tensor(labels)
    if on_start is not None:
        on_start(len(labels) * sum(len(method.plan) for method in methods))
    runs = run_methods(preset.model, methods, y, cfg_scale=cfg_scale, seed=seed, batch_size=BATCH, on_step=on_step)
    return runs, judge_runs(preset.model, methods, runs, y, preset.judge, preset.reference)


def check_count(samples: int) -> None:
    """Raise InputError unless there are enough samples to judge by."""
    if samples < MIN_SAMPLES:
        raise InputError(f"samples={samples} is below {MIN_SAMPLES}; a Frechet distance of so few says nothing")


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
            f"{result.speedup:.2f}x measured, {result.mac_limit:.2f}x by MACs, "
            f"{result.scores.recognised:.1%} of {result.scores.n} recognised",
            result.step_types,
            run.images[:kept],
        )
        for result, run in zip(results, runs, strict=True)
    ]
    subtitle = "Same model, same noise. Each cell of a strip is one sampling step, the first at the left."
    return pictures.comparison("EB-Cache on the bundled letter model", subtitle, rows, columns, scale)


def report_entry(result: Result) -> dict[str, object]:
    """One of the report's ``methods``: costs, scores, how many samples, and what spread stands behind them."""
    entry = asdict(result)
    scores: dict[str, object] = entry.pop("scores")
    return entry | scores


def write_report(path: Path, results: Sequence[Result], seed: int) -> None:
    """report.json: every method's figures, and what they were measured on."""
    report = {
        "methods": [report_entry(result) for result in results],
        "seed": seed,
        "machine": machine(),
        "units": {
            "macs": "multiply-accumulates of one sample's run, one guidance branch",
            "seconds": "wall clock of all samples",
            "speedup": "median over batches of the first method's time over this one's, interleaved in one process",
            "spread": "standard errors (delete-one-group jackknife); speedup_low and _high are the extreme batches",
        },
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=1))


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "ebcache_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "operations": ops.select(default_device(), torch.float32).name,
    }
