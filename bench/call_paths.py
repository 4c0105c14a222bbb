"""How much code one step passes through, and how the package is cut into files.

    python -m bench.call_paths [--list] [--out FILE]

Counted are the functions, as they are written with ``def``, and the files of ebcache_fast and kernels/ that run in one
step: in the middle of a run of our own loop, operation by operation and as a graph, and in one call of an enabled model
that is replayed as a graph. What is written within a function (a comprehension, a lambda) is of that function. Graphs
are those of `bench.host_cost`, whose replay does nothing. ``--list`` prints the functions, in the order in which they
are first called.

It writes bench/results/house.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch

from bench.host_cost import CFG_SCALE, LATENTS, STEPS, EmptyEngine, make_model
from ebcache_fast import enabled
from ebcache_fast.apps.report import machine
from ebcache_fast.dropin import cached_forward
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.samplers import make_sampler, trajectory_noise

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = ROOT / "ebcache_fast", ROOT / "kernels"
OUT = ROOT / "bench" / "results" / "house.json"
AT = 4  # the step that is looked at, of the kind of the one after the first; all before it came, each kind once


def house() -> dict[str, Any]:
    """Files, lines and folders of the package; kernels/ counts as one of its folders."""
    found = sorted((*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")))
    files = [path for path in found if not path.is_relative_to(PACKAGE / KERNELS.name)]  # which leads to the other
    lines = [len(path.read_text().splitlines()) for path in files]
    return {
        "files": len(files),
        "lines": sum(lines),
        "median_lines": statistics.median(lines),
        "above_250_lines": sum(length > 250 for length in lines),
        "top_level_modules": sum(path.parent == PACKAGE for path in files),
        "folders": len({path.parent for path in files} - {PACKAGE}),
    }


def passed_through(call: Callable[[], object]) -> list[str]:
    """The functions of ours that a call passes through, as "file::name", in the order in which they are first called.

    Nothing else may be profiling this thread.
    """
    seen: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen[frame.f_code] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(dict.fromkeys(name for code in seen if (name := _name(code)) is not None))


def _name(code: CodeType) -> str | None:
    """Of a function of ours, or of what is written within it; None of others."""
    path = Path(code.co_filename).resolve()
    if not path.is_relative_to(PACKAGE) and not path.is_relative_to(KERNELS):
        return None
    return f"{path.relative_to(ROOT)}::{code.co_qualname.partition('.<locals>')[0]}"


def own_loop(engine: Engine) -> list[str]:
    """One step of `ebcache_fast.sample`'s loop."""
    plan = make_model()[1]
    noise = trajectory_noise(0, range(1), STEPS, LATENTS)
    rows = torch.tensor(make_sampler("ddpm", STEPS).rows)
    with engine.sampling(plan, torch.tensor([1]), Guidance(CFG_SCALE), rows, noise) as trajectory:
        for _ in range(AT):
            trajectory.advance()
        return passed_through(trajectory.advance)


@torch.no_grad()
def drop_in(*, in_order: bool) -> list[str]:
    """One guided call of an enabled model."""
    model, plan = make_model()
    x, y, ts = torch.randn(2, *LATENTS), torch.tensor([1, 5]), [torch.tensor([t, t]) for t in plan.timesteps]
    with enabled(model, plan, in_order=in_order), patch.object(cached_forward, "Engine", EmptyEngine):
        for t in ts[:AT]:
            model.forward_with_cfg(x, t, y, CFG_SCALE)
        return passed_through(partial(model.forward_with_cfg, x, ts[AT], y, CFG_SCALE))


def paths() -> dict[str, list[str]]:
    """What each way passes through."""
    with _one_thread():
        return {
            "our own loop, eager": own_loop(Engine(make_model()[0], make_graphs=no_graphs)),
            "our own loop, graph": own_loop(EmptyEngine(make_model()[0])),
            "drop-in, graph": drop_in(in_order=False),
            "drop-in, graph, in_order=True": drop_in(in_order=True),
        }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def counted(names: Sequence[str]) -> dict[str, Any]:
    """How many functions these are, in how many files, and which."""
    return {"functions": len(names), "files": len({name.partition("::")[0] for name in names}), "names": list(names)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the functions")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    report = {"house": house(), "steps": {way: counted(names) for way, names in paths().items()}, "machine": machine()}
    print(", ".join(f"{value:g} {what.replace('_', ' ')}" for what, value in report["house"].items()))
    for way, step in report["steps"].items():
        print(f"{way}: {step['functions']} functions in {step['files']} files")
        for name in step["names"] if args.list else ():
            print(f"    {name}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main()
