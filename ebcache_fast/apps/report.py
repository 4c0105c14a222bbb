"""report.json: what a comparison found, and all that somebody else needs to repeat it or to judge it anew."""

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from ebcache_fast._version import __version__
from ebcache_fast.apps.bundled import default_device
from ebcache_fast.apps.compare import Result
from ebcache_fast.ops.fallback import Fallback
from ebcache_fast.plan.files import replacing

CPUINFO = Path("/proc/cpuinfo")
UNITS: Final = {
    "macs": "multiply-accumulates of one sample's run, one guidance branch",
    "seconds": "wall clock of all samples; batch_seconds: of each batch",
    "speedup": "median over batches of the first method's time over this one's, interleaved in one process",
    "noise": "same: the first method's, at its timesteps; other steps: its initial noise, after which none is drawn, "
    "at other timesteps; other noise: drawn at other steps, so that the paired error says nothing of caching",
    "paired_error": "mean relative RMS difference from the first method's sample of the same number",
    "spread": "standard errors (delete-one-group jackknife); speedup_low and _high are the extreme batches",
    "per_sample": "in the order of labels; recognised is 1/n where n logits are the largest together",
}


def write_report(
    path: Path, results: Sequence[Result], labels: Sequence[int], command: str, settings: Mapping[str, object]
) -> None:
    """Write every method's figures, what they were measured on, and each sample's; JobError where it can't be.

    labels: of the samples, whose noise is drawn from settings["seed"] and their place in it. settings: all that the
    results depend on and no method says itself.
    """
    report = {
        "methods": [report_entry(result) for result in results],
        **settings,
        "labels": list(labels),
        "command": command,
        "machine": machine(),
        "units": UNITS,
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=1))


def report_entry(result: Result) -> dict[str, object]:
    """Entry of the report's ``methods``: costs, scores, how many samples, and what spread stands behind them."""
    entry = asdict(result)
    scores: dict[str, object] | None = entry.pop("scores")
    return entry | (scores or {})


def command_line(name: str, options: Mapping[str, object]) -> str:
    """The command as a shell takes it, every option said: whatever the defaults become, it does the same again."""
    words = ["ebcache-fast", name]
    for option, value in options.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def machine() -> dict[str, object]:
    """The machine and the versions that the figures were measured with."""
    return {
        "ebcache_fast": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "operations": Fallback.tried(default_device(), torch.float32).implementations()["gated_residual"],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, where the system says it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
