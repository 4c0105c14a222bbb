"""Profiling into files: one run, timed, drawn and traced."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebcache_fast.apps.pictures import save_picture
from ebcache_fast.apps.profiling import Probe, ProfiledEngine, time_run, trace_run
from ebcache_fast.apps.timeline import Timeline
from ebcache_fast.apps.timeline_picture import draw_timeline
from ebcache_fast.engine.graphs import cuda_graphs, no_graphs
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.plan.files import make_folder
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.sampling import sample


def profile_into(
    folder: Path,
    model: nn.Module,
    labels: Sequence[int],
    table: CacheTable,
    names: Mapping[str, str | int],
    *,
    eager: bool = False,
    trace: bool = True,
    options: EngineOptions | None = None,
    **arguments: Any,
) -> tuple[Timeline, list[Path]]:
    """Time one batch under ``table``, after one that warms up, and write timeline.json and timeline.png.

    ``names`` say what the files are of. ``eager`` does without CUDA graphs, ``trace`` runs once more under
    torch.profiler, into trace.json. ``options`` are the engine's, ``arguments`` those of `ebcache_fast.sample`. Returns
    the timeline and the files. Raises JobError before any sampling if the folder can't be written, and as that does.
    """
    make_folder(folder)
    probe = Probe()
    engine = ProfiledEngine(model, probe, options, make_graphs=no_graphs if eager else cuda_graphs)
    run = partial(sample, model, labels, table=table, batch_size=len(labels), engine=engine, **arguments)
    run()  # allocates, compiles, captures
    weight = engine.denoiser.weight()
    facts: dict[str, str | int] = {
        "samples": len(labels),
        "dtype": str(weight.dtype),
        "torch": torch.__version__,
        "device": _name(weight.device),
    }
    timeline = Timeline("ms", time_run(run, probe, weight.device), about={**names, **facts})
    written = [folder / "timeline.json", folder / "timeline.png"]
    timeline.save(written[0])
    save_picture(draw_timeline(timeline, f"{len(table)} steps, and how long each took"), written[1])
    if trace:
        written.append(folder / "trace.json")
        trace_run(run, probe, weight.device, written[2])
    return timeline, written


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, no GPU ({threads} thread{'s' * (threads != 1)})"
